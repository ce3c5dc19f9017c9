"""The numbers of an evaluation: what they are, and how far off they may be by chance.

    KL(p || q) = sum_w p(w) (log p(w) - log q(w))

An interval is that of a bootstrap: the statistic of as many tokens, drawn again and again.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

_RESAMPLES = 2000
_RUN = 16  # neighbouring tokens that are drawn together, because their errors are alike

Floats = NDArray[np.float64]
Statistic: TypeAlias = Callable[[Floats], float]


def log_softmax(logits: NDArray[Any]) -> Floats:
    """Return log softmax over the last axis, in float64."""
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(-1, keepdims=True)))


def kl(log_p: Floats, log_q: Floats) -> Floats:
    """Return KL(p || q) over the last axis, nats."""
    return np.asarray((np.exp(log_p) * (log_p - log_q)).sum(-1))


def mean(values: Floats) -> float:
    """Return the mean."""
    return float(values.mean())


def perplexity(losses: Floats) -> float:
    """Return exp of the mean loss."""
    return float(np.exp(losses.mean()))


def p99(values: Floats) -> float:
    """Return the 99th percentile."""
    return float(np.quantile(values, 0.99))


def with_interval(name: str, values: Floats, statistic: Statistic) -> dict[str, float]:
    """Return a statistic of all tokens with its interval: <name>, <name>_low, <name>_high."""
    low, high = interval(values, statistic)
    return {name: statistic(values), f"{name}_low": low, f"{name}_high": high}


def interval(values: Floats, statistic: Statistic = mean, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of a statistic, by runs of neighbouring values.

    Args:
        values: f64[n], one for each token, in order.
        statistic: of an array like it.
        seed: of the resampling.
    """
    run = max(1, min(_RUN, len(values) // 8))
    count = -(-len(values) // run)
    begins = np.random.default_rng(seed).integers(0, len(values), (_RESAMPLES, count, 1))
    drawn = (begins + np.arange(run)).reshape(_RESAMPLES, -1) % len(values)
    found = [statistic(values[row]) for row in drawn[:, : len(values)]]
    low, high = np.quantile(found, (0.025, 0.975))
    return float(low), float(high)
