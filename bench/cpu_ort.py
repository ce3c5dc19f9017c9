"""ONNX Runtime: its operator GroupQueryAttention over a float, 8-bit or 4-bit cache.

One decode step as a program does it: the cache is bound as input and as output, so nothing of it
is copied, and the operator stores the newest token before it attends. Scales are fixed before, for
the whole tensor or for each channel; both are tried, and both ways to attend.
"""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from cpu_contest import Array, Contestant, Setting, aligned_copy, threads_up_to
from numpy.typing import NDArray

BITS = {"f32": None, "int8": 8, "int4": 4}
NO_FLASH = "ORT_GQA_DISABLE_FLASH_ATTENTION"
INPUTS = ("query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length")
PRESENT = ("present_key", "present_value")


def settings(kind: str, threads: int) -> Iterator[Setting]:
    """Yield every way to quantize and call that is tried."""
    for count in threads_up_to(threads):
        for scales in ("PER_CHANNEL", "PER_TENSOR") if BITS[kind] else ("none",):
            for flash in ("flash", "naive"):
                yield {"threads": count, "scales": scales, "path": flash}


def quantize(x: Array, bits: int, scales: str) -> tuple[NDArray[Any], Array]:
    """Return codes as the operator stores them, and scales: symmetric, to nearest.

    Args:
        x: [B, H, N, D].
        bits: 8, or 4 with two channels a byte, the even one low.
        scales: PER_CHANNEL: one for each head and channel; PER_TENSOR: one.
    """
    most, axes = 2 ** (bits - 1) - 1, (0, 2) if scales == "PER_CHANNEL" else None
    step = np.maximum(np.abs(x).max(axis=axes, keepdims=True), 1e-6).astype(np.float32) / most
    codes = np.empty(x.shape, np.int8)
    for row in range(x.shape[0]):
        own = step if step.shape[1] == 1 else step[0]
        codes[row] = np.clip(np.rint(x[row] / own.reshape(-1, 1, own.shape[-1])), -most - 1, most)
    if bits == 8:
        return codes, step.reshape(-1)
    unsigned = (codes + 8).astype(np.uint8)
    return unsigned[..., 0::2] | (unsigned[..., 1::2] << 4), step.reshape(-1)


def _model(qkv: tuple[Array, Array, Array], kind: str, scale: float, scales: str) -> bytes:
    """Return the graph: one operator."""
    from onnx import TensorProto, helper

    q, k, _ = qkv
    batch, heads, _, width = q.shape
    kv_heads, tokens, bits = k.shape[1], k.shape[2], BITS[kind]
    stored = {None: TensorProto.FLOAT, 8: TensorProto.INT8, 4: TensorProto.UINT8}[bits]
    cache = [batch, kv_heads, tokens, width // 2 if bits == 4 else width]
    rows = {"query": [batch, 1, heads * width]}
    rows |= {name: [batch, 1, kv_heads * width] for name in ("key", "value")}
    given = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in rows.items()]
    given += [helper.make_tensor_value_info(n, stored, cache) for n in INPUTS[3:5]]
    given += [helper.make_tensor_value_info("seqlens_k", TensorProto.INT32, [batch])]
    given += [helper.make_tensor_value_info("total_sequence_length", TensorProto.INT32, [1])]
    names, more = list(INPUTS), dict[str, Any]()
    if bits:
        names += ["", "", "", "", "", "k_scale", "v_scale"]
        given += [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names[-2:]]
        more = {"k_quant_type": scales, "v_quant_type": scales, "kv_cache_bit_width": bits}
    result = [helper.make_tensor_value_info("out", TensorProto.FLOAT, rows["query"])]
    result += [helper.make_tensor_value_info(n, stored, cache) for n in PRESENT]
    node = helper.make_node(
        "GroupQueryAttention",
        names,
        ["out", *PRESENT],
        domain="com.microsoft",
        num_heads=heads,
        kv_num_heads=kv_heads,
        scale=scale,
        **more,
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "attention", given, result)
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString())


def _session(model: bytes, setting: Setting) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(setting["threads"])
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    os.environ[NO_FLASH] = "1" if setting["path"] == "naive" else "0"
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _feeds(qkv: tuple[Array, Array, Array], kind: str, scales: str) -> tuple[dict[str, Any], int]:
    """Return the inputs by name, and the bytes of those that are the cache."""
    q, k, v = qkv
    batch, tokens, bits = q.shape[0], k.shape[2], BITS[kind]
    feeds: dict[str, Any] = {
        "query": q.reshape(batch, 1, -1),
        "key": np.ascontiguousarray(k[:, :, -1]).reshape(batch, 1, -1),
        "value": np.ascontiguousarray(v[:, :, -1]).reshape(batch, 1, -1),
        "seqlens_k": np.full(batch, tokens - 1, np.int32),
        "total_sequence_length": np.array([tokens], np.int32),
    }
    stored = 0
    for past, name, x in (("past_key", "k_scale", k), ("past_value", "v_scale", v)):
        if bits is None:
            feeds[past] = aligned_copy(x)
        else:
            codes, feeds[name] = quantize(x, bits, scales)
            feeds[past] = aligned_copy(codes)
            stored += feeds[name].nbytes
        feeds[past][:, :, -1] = 0  # the operator writes the newest token
        stored += feeds[past].nbytes
    return feeds, stored


def open_peer(
    kind: str, qkv: tuple[Array, Array, Array], scale: float, setting: Setting
) -> Contestant:
    """Return one decode step over a cache that holds all tokens but the newest.

    Args:
        kind: of BITS.
        qkv: [B, Hq, 1, D], [B, H, N, D], [B, H, N, D].
        scale: of the logits.
        setting: of `settings`.
    """
    from onnxruntime import OrtValue

    batch, heads, _, width = qkv[0].shape
    scales = str(setting["scales"])
    session = _session(_model(qkv, kind, scale, scales), setting)
    feeds, stored = _feeds(qkv, kind, scales)
    values = {name: OrtValue.ortvalue_from_numpy(x) for name, x in feeds.items()}
    out = OrtValue.ortvalue_from_numpy(np.zeros((batch, 1, heads * width), np.float32))
    binding = session.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_ortvalue_output("out", out)
    for past, present in zip(INPUTS[3:5], PRESENT, strict=True):
        binding.bind_ortvalue_output(present, values[past])

    def run() -> None:
        session.run_with_iobinding(binding)

    def output() -> Array:
        return np.array(out.numpy(), np.float32).reshape(batch, heads, width)

    def close() -> None:
        values.clear()
        feeds.clear()

    return Contestant(f"ort_{kind}", setting, run, output, stored, close)
