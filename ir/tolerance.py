"""How far a kernel may be from the reference: one bound, for the tests and for `verify`.

    R   attend in float64 over the decoded pages, with q as the plan rounds it
    B   the same sums in float32
    K   the kernel, output or log-sum-exp

    max|K - R|  <=  2 max|B - R|  +  2 max|(R + 0.3 - 0.3) - R|  +  floor
    floor = e max|v| of outputs, e of log-sum-exps,    e = 4 2^-24 max(1, scale max||q|| max||k||)

and the same of each query's length |K - R| against its own |R|, so that a query with small outputs
is not hidden behind one with large ones.

Why: a kernel may add in another order than B, but not with less precision: twice B's error. It
gives float32: twice the rounding of the result, 0.3 being a number that spoils the last bits. With
few elements B may be exact by luck, so four roundings of the largest possible score are always
allowed, as many as every score has: of q, of the scale, of the sum, of the exponential.

Nothing is added under compute = int. Integers of q come from float64 (`round_queries`), equal to
the last bit in every target, and their products with codes are exact. A bound that let one integer
differ would let a wrong scale pass.
"""

from __future__ import annotations

import numpy as np

from .arrays import Array

UNIT = 2.0**-24
"""Half the distance of float32 numbers at 1: the relative error of one rounding."""


def score_rounding(q: Array, k: Array, scale: float) -> float:
    """Return e: four roundings of the largest score that q [..., D] and k [..., D] could have."""
    return float(4 * UNIT * max(1.0, scale * _length(q) * _length(k)))


def share_of_allowed(kernel: Array, reference: Array, plain: Array, floor: float) -> float:
    """Return the largest error as a share of what is allowed; above 1 the kernel is wrong.

    Args:
        kernel: K, [..., Dv]: last axis the numbers of one query. -inf where R has it.
        reference: R.
        plain: B.
        floor: see the head of this file.

    Returns: inf where K is NaN or infinite and R is not, or the other way round.
    """
    if not np.array_equal(np.isneginf(kernel), np.isneginf(reference)):
        return float("inf")
    k, r, b = (np.where(np.isneginf(x), 0.0, x) for x in (kernel, reference, plain))
    if not np.isfinite(k).all():
        return float("inf")
    given = (r.astype(np.float32) + np.float32(0.3)) - np.float32(0.3)
    allowed = 2 * _largest(b - r) + 2 * _largest(given - r) + floor
    size, width = np.linalg.norm(r, axis=-1), r.shape[-1] ** 0.5
    twin = np.linalg.norm(b - r, axis=-1) + np.linalg.norm(given - r, axis=-1)
    ratio = _largest(np.divide(twin, size, out=np.zeros_like(twin), where=size > 0))
    error = np.linalg.norm(k - r, axis=-1)
    return max(
        _largest(k - r) / allowed if allowed else 0.0,
        _largest(error / (2 * ratio * size + floor * width)) if floor else 0.0,
    )


def _largest(x: Array) -> float:
    return float(np.abs(x).max(initial=0.0))


def _length(x: Array) -> float:
    """The largest length of a vector along the last axis."""
    return float(np.linalg.norm(x, axis=-1).max(initial=0.0))
