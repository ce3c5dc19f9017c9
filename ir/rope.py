"""Rotary position embedding: which channels of a head turn together, and by which table entry.

The first R channels of a head are turned, in pairs; the others pass through as they are.

    style      pair i of R / 2          seen in
    half       (i, i + R / 2)           Llama, Mistral, Qwen, Gemma, Phi-3, gpt-oss
    adjacent   (2 i, 2 i + 1)           Cohere, GLM-4

A pair (x, y) at angle a becomes (x cos a - y sin a, y cos a + x sin a). The pairs are said here
alone: a map that ties them, a kernel and a check all ask `partner`.
"""

import numpy as np

from .arrays import Array

STYLES = ("half", "adjacent")


def pair_of(style: str, rotated: int) -> Array:
    """Return the number of the pair of each of the R = `rotated` channels, int64[R]."""
    channel = np.arange(rotated)
    return channel % (rotated // 2) if style == "half" else channel // 2


def partner(style: str, rotated: int, width: int) -> Array:
    """Return for each channel of a head the other one of its pair, int64[D].

    Args:
        style: one of STYLES.
        rotated: R, the channels that are turned; even, at most `width`.
        width: D. Channels from R on have no partner: they get their own number.
    """
    other = np.arange(width)
    step = rotated // 2 if style == "half" else 1
    first = _is_first(style, rotated)
    other[:rotated] += np.where(first, step, -step)
    return other


def _is_first(style: str, rotated: int) -> Array:
    """Return whether each of the R channels is the first of its pair."""
    channel = np.arange(rotated)
    return channel < rotated // 2 if style == "half" else channel % 2 == 0


def spread(table: Array, rotated: int, style: str) -> Array:
    """Return a table by channel, [..., R], of one whose first R / 2 entries are by pair."""
    return np.asarray(table[..., pair_of(style, rotated)])


def turn(x: Array, cos: Array, sin: Array, style: str) -> Array:
    """Return x turned.

    Args:
        x: [B, H, T, D].
        cos: [B or 1, T, R], by channel.
        sin: like cos.
        style: one of STYLES.
    """
    rotated = cos.shape[-1]
    sign = np.where(_is_first(style, rotated), -1.0, 1.0).astype(x.dtype)
    other = x[..., partner(style, rotated, x.shape[-1])[:rotated]]
    turned = x[..., :rotated] * cos[:, None] + sign * other * sin[:, None]
    return np.concatenate((turned, x[..., rotated:]), axis=-1)
