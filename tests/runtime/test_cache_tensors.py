"""What goes in and out of the cache: kinds, dtypes, strides; and what is refused, and how."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvant.ir.encodings import Int, Tokens
from kvant.ir.errors import KvantError
from kvant.ir.plan import AttentionPlan, StreamPlan
from kvant.runtime.cache import Cache
from kvant.runtime.launch_reference import Kernels
from kvant.runtime.tensors import Kind, read_floats, read_integers, write_floats

TOKENS = Tokens(Int(8, "token", 16))
PLAN = AttentionPlan(
    q_heads=4,
    scale=0.25,
    softcap=None,
    window=None,
    q_maps=(),
    k=StreamPlan("k", 2, 16, (), TOKENS, 64),
    v=StreamPlan("v", 2, 32, (), TOKENS, 64),
    out_maps=(),
)


def make_cache() -> Cache:
    return Cache([PLAN], Kernels([PLAN], [{}]), batch=1, max_tokens=64)


def refused(code: str, call: Callable[[], object]) -> KvantError:
    with pytest.raises(KvantError) as caught:
        call()
    assert caught.value.code == code, caught.value
    return caught.value


def normal(*shape: int) -> Any:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_torch_in_torch_out(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    cache, twin = make_cache(), make_cache()
    k, v, q = (torch.from_numpy(normal(1, h, 5, d)) for h, d in ((2, 16), (2, 32), (4, 16)))
    k, v, q = (x.to(getattr(torch, dtype)).requires_grad_() for x in (k, v, q))
    cache.append(0, k, v)
    twin.append(0, *(x.detach().float().numpy() for x in (k, v)))
    out, lse = cache.attend(0, q, return_lse=True)
    want = twin.attend(0, q.detach().float().numpy())
    assert out.dtype == q.dtype
    assert lse.dtype == torch.float32
    assert out.shape == (1, 4, 5, 32)
    assert torch.equal(out, torch.from_numpy(want).to(q.dtype))
    assert not out.requires_grad


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_numpy_in_numpy_out(dtype: str) -> None:
    cache = make_cache()
    cache.append(0, normal(1, 2, 5, 16).astype(dtype), normal(1, 2, 5, 32))
    out, lse = cache.attend(0, normal(1, 4, 2, 16).astype(dtype), return_lse=True)
    assert isinstance(out, np.ndarray)
    assert out.dtype == dtype
    assert lse.dtype == np.float32


def test_numpy_bfloat16() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = normal(3, 4).astype(ml_dtypes.bfloat16)
    array, kind = read_floats("x", x)
    assert kind == Kind("numpy", "bfloat16")
    assert (array == x.astype(np.float32)).all()
    assert write_floats(array, kind).dtype == ml_dtypes.bfloat16


def test_strides_are_read_as_they_mean() -> None:
    """Transposed, reversed, broadcast, Fortran, read-only and unaligned arrays."""
    x = normal(1, 2, 6, 16)
    frozen = x.copy()
    frozen.flags.writeable = False
    unaligned = np.frombuffer(b"0" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape)
    for y in (
        np.asfortranarray(x),
        x[:, :, ::-1],
        x[:, ::-1],
        x.swapaxes(1, 2).copy().swapaxes(1, 2),
        np.broadcast_to(x[:, :1], x.shape),
        frozen,
        unaligned,
    ):
        array, _ = read_floats("x", y)
        assert (array == y).all()
        assert array.flags.c_contiguous
        assert array.flags.aligned
        assert array.flags.writeable
    assert read_floats("x", x)[0] is x  # and what is right already is not copied
    torch = pytest.importorskip("torch")
    t = torch.from_numpy(x)
    assert np.shares_memory(read_floats("x", t)[0], x)
    moved = t.transpose(1, 2)
    assert (read_floats("x", moved)[0] == x.swapaxes(1, 2)).all()


def test_inputs_are_not_kept() -> None:
    cache = make_cache()
    k, v, q = normal(1, 2, 5, 16), normal(1, 2, 5, 32), normal(1, 4, 1, 16)
    cache.append(0, k, v)
    out = cache.attend(0, q)
    k[:], v[:] = 9, 9
    assert (cache.attend(0, q) == out).all()


@pytest.mark.parametrize("dtype", ["float64", "int8", "uint16", "complex64", "bool", ">f4", "O"])
def test_other_numpy_dtypes_are_refused(dtype: str) -> None:
    k, v = normal(1, 2, 5, 16), normal(1, 2, 5, 32)
    error = refused("wrong-dtype", lambda: make_cache().append(0, k.astype(dtype), v))
    assert "expected float32 or bfloat16 or float16" in error.what
    refused("wrong-dtype", lambda: make_cache().append(0, k, v.astype(dtype)))


def test_other_torch_tensors_are_refused() -> None:
    torch = pytest.importorskip("torch")
    v = torch.zeros(1, 2, 5, 32)
    for dtype in (torch.float64, torch.int64, torch.bool):
        refused(
            "wrong-dtype",
            lambda dtype=dtype: make_cache().append(0, torch.zeros(1, 2, 5, 16, dtype=dtype), v),
        )
    meta = torch.zeros(1, 2, 5, 16, device="meta")
    error = refused("wrong-device", lambda: make_cache().append(0, meta, v))
    assert str(error) == (
        "k is a torch.strided tensor on device meta, expected torch.strided on cpu\n"
        "  where: k\n"
        "  fix: move it first, for example with k.cpu()  [wrong-device]"
    )
    sparse = torch.zeros(1, 2, 5, 16).to_sparse()
    refused("wrong-device", lambda: make_cache().append(0, sparse, v))


@pytest.mark.parametrize("value", [None, 3.0, "k", [[1.0]], object()])
def test_other_types_are_refused(value: object) -> None:
    error = refused("wrong-type", lambda: make_cache().append(0, value, normal(1, 2, 5, 32)))
    assert "expected a torch tensor or a NumPy array" in error.what
    refused("wrong-type", lambda: make_cache().attend(0, value))


@pytest.mark.parametrize(
    ("k", "v"),
    [
        ((2, 5, 16), (1, 2, 5, 32)),
        ((2, 2, 5, 16), (2, 2, 5, 32)),
        ((1, 4, 5, 16), (1, 4, 5, 32)),
        ((1, 2, 5, 32), (1, 2, 5, 16)),
        ((1, 2, 5, 16), (1, 2, 4, 32)),
        ((1, 2, 5, 16, 1), (1, 2, 5, 32)),
    ],
)
def test_wrong_shapes_are_refused(k: tuple[int, ...], v: tuple[int, ...]) -> None:
    cache = make_cache()
    refused("wrong-shape", lambda: cache.append(0, normal(*k), normal(*v)))
    assert cache.length == 0


def test_the_message_of_a_wrong_shape() -> None:
    cache = make_cache()
    cache.append(0, normal(1, 2, 5, 16), normal(1, 2, 5, 32))
    error = refused("wrong-shape", lambda: cache.attend(0, normal(1, 3, 1, 16)))
    assert str(error) == (
        "q has shape [1, 3, 1, 16], expected [1, 4, T, 16]\n"
        "  where: layer 0, attend\n"
        "  fix: pass [batch, heads, tokens, channels] as the cache was created for  [wrong-shape]"
    )


@pytest.mark.parametrize("lengths", [[6], [-1]])
def test_lengths_out_of_range_are_refused(lengths: list[int]) -> None:
    k, v = normal(1, 2, 5, 16), normal(1, 2, 5, 32)
    refused("wrong-value", lambda: make_cache().append(0, k, v, lengths))


def test_integers() -> None:
    torch = pytest.importorskip("torch")
    for good in ([1, 2], (1, 2), np.array([1, 2], np.int32), np.array([1, 2], np.uint8)):
        assert read_integers("x", good, 2).tolist() == [1, 2]
        assert read_integers("x", good, 2).dtype == np.int64
    assert read_integers("x", torch.tensor([1, 2]), 2).tolist() == [1, 2]
    assert read_integers("x", [], 0).tolist() == []
    mine = np.array([1, 2])
    assert not np.shares_memory(read_integers("x", mine, 2), mine)
    for code, bad in (
        ("wrong-dtype", [1.0, 2.0]),
        ("wrong-dtype", np.array([True, False])),
        ("wrong-dtype", torch.tensor([1.0, 2.0])),
        ("wrong-dtype", ["a", "b"]),
        ("wrong-type", 3),
        ("wrong-type", None),
        ("wrong-shape", [1, 2, 3]),
        ("wrong-shape", [[1, 2]]),
        ("wrong-device", torch.tensor([1, 2], device="meta")),
    ):
        refused(code, lambda bad=bad: read_integers("x", bad, 2))


def test_importing_the_cache_loads_no_torch() -> None:
    code = (
        "import sys, kvant.runtime.cache, kvant.runtime.launch_reference;"
        "print([m for m in ('torch', 'transformers', 'tvm', 'triton') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
