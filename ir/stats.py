"""Calibration statistics of one layer: what was seen of q, k and v after RoPE."""

from dataclasses import dataclass

from .arrays import Array


@dataclass(frozen=True, slots=True, eq=False)
class LayerStats:
    """Per head and channel, over all calibration tokens, in the units of the activations.

    Attributes:
        k_absmax: largest |k|, f64[H, D].
        k_second_moment: mean of k^2, f64[H, D].
        q_absmax: largest |q|, f64[Hq, D].
        q_second_moment: mean of q^2, f64[Hq, D].
        v_absmax: largest |v|, f64[H, Dv].
        v_second_moment: mean of v^2, f64[H, Dv].
        tokens: how many tokens were seen, at least 1.
        k_largest: the R largest |k| of each channel, descending, f64[R, H, D]; R is at most
            `tokens`. None where they were not recorded.
        v_largest: the same of v, f64[R, H, Dv].
    """

    k_absmax: Array
    k_second_moment: Array
    q_absmax: Array
    q_second_moment: Array
    v_absmax: Array
    v_second_moment: Array
    tokens: int
    k_largest: Array | None = None
    v_largest: Array | None = None
