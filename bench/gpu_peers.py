"""What ours is compared with on a GPU: each kernel that is installed, under each of its settings.

Keys and values are bfloat16, [B, H, T, D]. Every peer is a call that does the same each time. One
that raises, or whose output is wrong, takes no part and says why.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

Tensor = Any
Call = Callable[[], Tensor]
PAGE = 64
WORKSPACE = 256 << 20
"""Bytes that FlashInfer asks for."""
PACKAGES = ("torch", "triton", "flash-attn", "flash-attn-3", "flashinfer-python", "cuda-core")


@dataclass(frozen=True, slots=True)
class Case:
    """One query a row over the same keys and values.

    Attributes:
        q: [B, Hq, D], bf16.
        k: [B, H, T, D], bf16.
        v: [B, H, T, D], bf16.
    """

    q: Tensor
    k: Tensor
    v: Tensor

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return int(self.q.shape[1] // self.k.shape[1])

    def folded(self) -> Tensor:
        """Return q as [B, H, G, D]: the heads of a group as queries of one head."""
        batch, _, width = self.q.shape
        return self.q.view(batch, self.k.shape[1], self.group, width)


def versions() -> dict[str, str]:
    """Return the versions of what is installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def decoders(case: Case) -> Iterator[tuple[str, Callable[[], Call]]]:
    """Yield (name, what makes the call) of every 16-bit peer of a decode step."""
    for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
        label = f"torch {backend.split('_')[0].lower()}"
        yield f"{label}, group folded", partial(_sdpa, case, backend, folded=True)
        yield f"{label}, enable_gqa", partial(_sdpa, case, backend, folded=False)
    yield "flash-attn 2", partial(_flash, case, "flash_attn")
    yield "flash-attn 3", partial(_flash, case, "flash_attn_interface")
    for cores in (False, True):
        yield f"flashinfer{', tensor cores' if cores else ''}", partial(_flashinfer, case, cores)


def _sdpa(case: Case, backend: str, *, folded: bool) -> Call:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    chosen = getattr(SDPBackend, backend)
    q = case.folded() if folded else case.q[:, :, None]

    def call() -> Tensor:
        with sdpa_kernel(chosen):
            out = scaled_dot_product_attention(q, case.k, case.v, enable_gqa=not folded)
        return out.reshape(case.q.shape)

    return call


def _flash(case: Case, module: str) -> Call:
    import torch

    flash = import_module(module)
    # That library has tokens before heads.
    q = case.q[:, None]
    k, v = (x.transpose(1, 2).contiguous() for x in (case.k, case.v))
    lengths = torch.full((len(q),), k.shape[1], dtype=torch.int32, device=q.device)

    def call() -> Tensor:
        out = flash.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, causal=True)
        return (out[0] if isinstance(out, tuple) else out)[:, 0]

    return call


def _flashinfer(case: Case, cores: bool) -> Call:
    import torch

    flashinfer = import_module("flashinfer")
    batch, heads, tokens, width = case.k.shape
    pages = tokens // PAGE
    # [pages, 2, PAGE, heads, D]
    cache = torch.stack((case.k, case.v), 1).view(batch, 2, heads, pages, PAGE, width)
    cache = cache.permute(0, 3, 1, 4, 2, 5).reshape(batch * pages, 2, PAGE, heads, width)
    whole = {"dtype": torch.int32, "device": case.q.device}
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(WORKSPACE, dtype=torch.uint8, device=case.q.device),
        "NHD",
        use_tensor_cores=cores,
    )
    wrapper.plan(
        torch.arange(0, batch * pages + 1, pages, **whole),
        torch.arange(batch * pages, **whole),
        torch.full((batch,), PAGE, **whole),
        case.q.shape[1],
        heads,
        width,
        PAGE,
        q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16,
    )
    return partial(wrapper.run, case.q, cache)


def plain_int4(case: Case) -> Call:
    """Return the straightforward 4-bit kernel of `gpu_int4.py`. It needs Triton."""
    int4 = import_module("gpu_int4")
    call: Call = int4.new_int4(case.q.half(), case.k.float(), case.v.float())
    return call


def prefills(case: Case) -> Iterator[tuple[str, Callable[[], Call]]]:
    """Yield the 16-bit peers of a prompt; here q is [B, Hq, T, D]."""
    for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
        yield f"torch {backend.split('_')[0].lower()}", partial(_prompt, case, backend)
    yield "flash-attn 2", partial(_flash_prompt, case, "flash_attn")
    yield "flash-attn 3", partial(_flash_prompt, case, "flash_attn_interface")


def _prompt(case: Case, backend: str) -> Call:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    chosen = getattr(SDPBackend, backend)

    def call() -> Tensor:
        with sdpa_kernel(chosen):
            return scaled_dot_product_attention(
                case.q, case.k, case.v, is_causal=True, enable_gqa=True
            )

    return call


def _flash_prompt(case: Case, module: str) -> Call:
    flash = import_module(module)
    q, k, v = (x.transpose(1, 2).contiguous() for x in (case.q, case.k, case.v))

    def call() -> Tensor:
        out = flash.flash_attn_func(q, k, v, causal=True)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return call


def appends(case: Case) -> Iterator[tuple[str, Callable[[], Call]]]:
    """Yield what stores one token a row in a 16-bit cache: k, then v."""
    import torch

    place = torch.full((1,), case.k.shape[2] - 1, device=case.k.device)
    new = [x[:, :, -1:].clone() for x in (case.k, case.v)]

    def call() -> Tensor:
        for cache, token in zip((case.k, case.v), new, strict=True):
            cache.index_copy_(2, place, token)
        return new[0]

    yield "torch index_copy_", lambda: call
