"""Say how keys and values are stored.

    cache_write(x) {store = as captured}   ->   cache_write(x) {store = tokens(sink, recent, rest)}

Lossy: attention reads k + dk and v + dv instead of k and v. With d = max_t |scale <q, dk_t>| no
score moves by more than d (a softcap moves less), each probability by a factor within
exp(-2d)..exp(2d), hence

    |o' - o|  <=  (exp(2d) - 1) max_t |v_t|  +  max_t |dv_t|      per query, head and channel

Source: the definition of softmax. A layer with a sliding window keeps its keys and values in the
model's dtype, as a ring of as many tokens as it sees, unless window = "quantize" is asked for.
"""

from typing import Literal

import numpy as np

from ..ir.arrays import Array, FloatName
from ..ir.encodings import Raw, Slices, Tokens
from ..ir.errors import KvantError
from ..ir.graph import Graph, Op, Value
from ..ir.rewrite import Builder, rewrite
from .checks import check_word
from .sites import basis_of, emit_write, find_site


def store(
    graph: Graph,
    *,
    k: Tokens,
    v: Tokens,
    window: Literal["keep", "quantize"] = "keep",
    context: int | None = None,
    dtype: FloatName = "f32",
) -> Graph:
    """Set how keys and values are stored; those of a sliding window stay floats by default.

    Args:
        graph: of a layer.
        k: encoding of the keys.
        v: encoding of the values.
        window: what to do with a layer that has a sliding window.
        context: most tokens that the model can hold, if known: an encoding must quantize within it.
        dtype: of the model; that of a layer with a sliding window if window = "keep".

    Returns: the new graph; `graph` itself if it has no attention.
    Raises: KvantError ("quantizes-nothing", "group-does-not-divide", "bad-option").
    """
    check_word("store", "window", window, ("keep", "quantize"))
    site = find_site(graph)
    if site is None:
        return graph
    sliding = site.attend.attr("window")
    k.check(site.k.width, "stream k")
    v.check(site.v.width, "stream v")
    if sliding is not None and window == "keep":
        # Rounded at append, so that nothing changes when a token moves from the tail to a page.
        k = v = Tokens(rest=Raw(dtype), raw=Raw(dtype))
    else:
        limits = [limit for limit in (sliding, context) if isinstance(limit, int)]
        check_quantizes("k", k, min(limits, default=None))
        check_quantizes("v", v, min(limits, default=None))

    def rule(b: Builder, op: Op, args: tuple[Value, ...]) -> Value | None:
        if op not in (site.k_write, site.v_write):
            return None
        return emit_write(b, op, args[0], basis_of(op), k if op == site.k_write else v)

    return rewrite(graph, rule)


def check_quantizes(role: str, tokens: Tokens, limit: int | None) -> None:
    """Refuse an encoding that leaves every token as it is although it asks for something else.

    Args:
        role: "k" or "v".
        tokens: the encoding.
        limit: tokens that attention can see at most, or None.

    Raises: KvantError ("quantizes-nothing").
    """
    raw = tokens.sink + (tokens.recent if tokens.flush == "group" else 0)
    if isinstance(tokens.rest, Slices) and tokens.rest.is_raw:
        raise _nothing(
            role,
            "every slice of the channels is raw",
            "use one raw format for all channels, or give a slice fewer bits",
        )
    if tokens.quantizes and limit is not None and limit <= raw:
        raise _nothing(
            role,
            f"attention sees {limit} tokens, and sink + recent = {raw} of them stay raw",
            f"use sink + recent below {limit}, or keep this layer as it is",
        )
    if not tokens.quantizes and raw and tokens.rest == tokens.raw:
        raise _nothing(
            role,
            f"sink = {tokens.sink} and recent = {tokens.recent} stay raw, and so does the rest",
            "set both to 0, or give the rest a format with fewer bits",
        )


def store_error_bound(
    q: Array, k: Array, v: Array, k_read: Array, v_read: Array, scale: float
) -> Array:
    """Return the most that attention's output can move when k and v are read as stored.

    Args:
        q: queries as they meet k (mapped, after RoPE), [B, H, T, D]; heads repeated as needed.
        k: keys as given, [B, H, N, D], in the basis of the stream.
        v: values as given, [B, H, N, Dv], in the basis of the stream.
        k_read: keys as attention reads them.
        v_read: values as attention reads them.
        scale: factor of the logits.

    Returns: [B, H, T, Dv], in the basis of v.
    """
    moved = np.abs(scale * q @ (k_read - k).swapaxes(-1, -2)).max(axis=-1, keepdims=True)
    largest = np.abs(v).max(axis=-2, keepdims=True)
    return np.asarray(np.expm1(2.0 * moved) * largest + np.abs(v_read - v).max(-2, keepdims=True))


def _nothing(role: str, what: str, fix: str) -> KvantError:
    return KvantError("quantizes-nothing", what, where=f"stream {role}", fix=fix)
