"""The meaning of attention over a cache, in float64. Every kernel is compared with this.

How far a kernel may be from it: `ir/tolerance.py`.

    s[i, j] = cap(scale <q_i, k_j>),    cap(s) = softcap tanh(s / softcap), or s
    out_i   = sum_j softmax_j(s[i, j]) v_j        over the keys j that query i sees
    lse_i   = log sum_j exp(s[i, j])

A learned sink adds exp(sink[h]) to the sum of query head h, in softmax and lse alike: it is a key
without a value. So lse is always the log of the softmax's denominator. A query that sees no key is
padding: it does not see the sink either.

In a row of n valid tokens the Tq queries are its last positions, p_i = n - Tq + i. Query i sees key
j if 0 <= j < n, j <= p_i (causal) and j > p_i - window. A query before the row's first token
(p_i < 0) sees nothing. Query head h reads kv head h // (Hq / H).
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from .arrays import Array
from .errors import KvantError


class Products(Protocol):
    """The two products of attention; kernels may round what they multiply."""

    def scores(self, rows: Array, k: Array, scale: float) -> Array:
        """Return scale times rows [B, H, R, D] by keys [B, H, N, D]: scores [B, H, R, N]."""

    def outputs(self, weights: Array, log_total: Array, v: Array) -> Array:
        """Return the sums [B, H, R, Dv] of v [B, H, N, Dv] with weights [B, H, R, N] of sum 1.

        `log_total` [B, H, R, 1]: log of what the exponentials were divided by; -inf without keys.
        """


class Exact:
    """Products without rounding but that of the type."""

    def scores(self, rows: Array, k: Array, scale: float) -> Array:
        """See `Products`."""
        return np.asarray(scale * (rows @ k.swapaxes(-1, -2)))

    def outputs(self, weights: Array, log_total: Array, v: Array) -> Array:
        """See `Products`."""
        return np.asarray(weights @ v)


EXACT = Exact()


def attend(
    q: Array,
    k: Array,
    v: Array,
    *,
    lengths: Array,
    scale: float,
    causal: bool = True,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Array | None = None,
    dtype: type[np.floating[Any]] = np.float64,
    products: Products = EXACT,
) -> tuple[Array, Array]:
    """Return attention's output and the log of the sum of exponentials.

    Args:
        q: [B, Hq, Tq, D]; the last Tq positions of each row.
        k: [B, H, N, D]; key j of a row is at position j. What lies at lengths[b] and beyond is
            never read, NaN included.
        v: [B, H, N, Dv].
        lengths: int64[B], valid keys of each row, 0..N.
        scale: factor on the dot products.
        causal: whether a query sees only keys up to its own position.
        softcap: bound of the scores, or None.
        window: keys that a query sees, itself included, or None for all.
        sinks: [Hq], one logit per query head, neither scaled nor capped; or None.
        dtype: of all arithmetic; float32 only to measure what rounding does.
        products: how products are taken; `ir/integers.py` has another way.

    Returns: out [B, Hq, Tq, Dv] and lse [B, Hq, Tq], of `dtype`. A query that sees no key gives
        zeros and -inf, sink or not.
    Raises: KvantError("attend-shape") if the shapes or lengths do not fit.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    _check_shapes(q, k, v, lengths, sinks)
    batch, heads, keys, _ = k.shape
    q_heads, queries = q.shape[1:3]
    # Multiplying by a zero probability would keep a NaN, so what is not valid is replaced.
    valid = (np.arange(keys) < lengths[:, None])[:, None, :, None]
    k_valid, v_valid = (np.where(valid, x, 0.0).astype(dtype) for x in (k, v))
    # The query heads of a group are rows of one matrix product.
    rows = np.asarray(q, dtype=dtype).reshape(batch, heads, -1, q.shape[-1])
    scores = products.scores(rows, k_valid, scale)
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    seen = visible(lengths, queries, keys, causal=causal, window=window)
    seen = np.tile(seen, (1, q_heads // heads, 1))
    scores = np.where(seen[:, None], scores, -np.inf)
    top = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    sink = _sinks_of(sinks, top, q_heads // heads)
    top = np.maximum(top, sink)
    # A row without keys has top = -inf; -inf - (-inf) would be NaN.
    shift = np.where(np.isneginf(top), 0.0, top)
    weights = np.exp(scores - shift)
    total = weights.sum(axis=-1, keepdims=True) + np.exp(sink - shift)
    with np.errstate(divide="ignore"):
        lse = np.where(total > 0.0, top + np.log(total), -np.inf)
    out = products.outputs(weights / np.where(total > 0.0, total, 1.0), lse, v_valid)
    return out.reshape(*q.shape[:3], v.shape[-1]), lse.reshape(q.shape[:3])


def _sinks_of(sinks: Array | None, top: Array, group: int) -> Array:
    """Return the sink of each row of scores, like `top` [B, H, G Tq, 1].

    Minus infinity where there is none, or where the row sees no key.
    """
    if sinks is None:
        return np.full_like(top, -np.inf)
    heads, rows = top.shape[1:3]
    by_row = np.repeat(np.asarray(sinks).reshape(heads, group), rows // group, axis=1)
    return np.where(np.isneginf(top), top, by_row[..., None]).astype(top.dtype)


def visible(
    lengths: Array, queries: int, keys: int, *, causal: bool = True, window: int | None = None
) -> Array:
    """Return which keys each query sees, bool [B, Tq, N]; see the head of this file."""
    position = lengths[:, None, None] - queries + np.arange(queries)[:, None]
    key = np.arange(keys)
    seen = (key < lengths[:, None, None]) & (position >= 0)
    if causal:
        seen = seen & (key <= position)
    if window is not None:
        seen = seen & (key > position - window)
    return np.asarray(seen)


def largest_query(bits: int) -> int:
    """Return n, the largest integer that q becomes: one of 16 bits is two signed bytes."""
    return 127 * 256 + 127 if bits == 16 else 2 ** (bits - 1) - 1


def round_queries(q: Array, bits: int) -> Array:
    """Return q as a plan with integer arithmetic reads it: rounded per (row, head, query).

        s = max|q| / n with n = `largest_query`,    q^ = s round(q / s),    0 where q is all zero

    In float64 and with these operations, so every target gets the same integers: none may differ.

    Args:
        q: [..., D], finite.
        bits: of the integers with the sign, at least 2.

    Returns: float64, the shape of q.
    """
    x = np.asarray(q, dtype=np.float64)
    step = np.abs(x).max(axis=-1, keepdims=True) / largest_query(bits)
    safe = np.where(step > 0.0, step, 1.0)
    return np.asarray(np.rint(x / safe) * step)


def _check_shapes(q: Array, k: Array, v: Array, lengths: Array, sinks: Array | None) -> None:
    """Refuse shapes that do not make one attention."""
    if sinks is not None and np.shape(sinks) != q.shape[1:2]:
        raise KvantError(
            "attend-shape",
            f"sinks {np.shape(sinks)} with {q.shape[1]} query heads",
            where="attend",
            fix="pass one sink for each query head",
        )
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}, lengths {lengths.shape}"
    fits = (
        q.ndim == k.ndim == v.ndim == 4
        and k.shape[:3] == v.shape[:3]
        and q.shape[0] == k.shape[0]
        and q.shape[3] == k.shape[3]
        and lengths.shape == k.shape[:1]
    )
    if not fits or q.shape[1] % k.shape[1]:
        raise KvantError(
            "attend-shape",
            shapes,
            where="attend",
            fix="pass q [B, Hq, Tq, D], k [B, H, N, D], v [B, H, N, Dv], lengths [B]; H divides Hq",
        )
    if ((lengths < 0) | (lengths > k.shape[2])).any():
        raise KvantError(
            "attend-shape",
            f"lengths {lengths.tolist()} with {k.shape[2]} keys",
            where="attend",
            fix=f"pass lengths from 0 to {k.shape[2]}",
        )
