"""The straightforward 4-bit kernel that ours is compared with computes attention."""

import gpu_int4
import pytest
import torch


@pytest.mark.parametrize(("heads", "kv_heads", "tokens"), [(8, 2, 150), (3, 3, 64)])
def test_the_plain_kernel_is_attention(heads: int, kv_heads: int, tokens: int) -> None:
    draw = torch.Generator().manual_seed(2)
    k, v = (torch.randn(2, kv_heads, tokens, 32, generator=draw) for _ in range(2))
    q = torch.randn(2, heads, 32, generator=draw).half()
    call = gpu_int4.new_int4(q, k, v, split_tokens=64)
    k, v = gpu_int4.unpack(call.k), gpu_int4.unpack(call.v)
    folded = q.float().view(2, kv_heads, heads // kv_heads, 32)
    want = torch.nn.functional.scaled_dot_product_attention(folded, k, v).view(2, heads, 32)
    assert torch.allclose(call().float(), want, atol=4e-3)


def test_four_bits_are_four_bits() -> None:
    x = torch.linspace(-1, 2, 64).view(1, 1, 2, 32)
    packed = gpu_int4.pack(x)
    assert packed.codes.shape == (1, 1, 2, 16)
    step = packed.scale.float()[..., None]
    assert ((gpu_int4.unpack(packed) - x).abs() <= 0.51 * step + 1e-3).all()
