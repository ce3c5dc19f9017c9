"""What integer dot products round: by hand, against plain loops, and within their budget."""

import numpy as np
import pytest

from kvant.ir.attention import EXACT, attend
from kvant.ir.encodings import Bfp, Int, Lut, Sparse
from kvant.ir.encodings.lut import LLOYD, NF4
from kvant.ir.integers import BLOCK, Coded, Integers, most_integer, round_weights, rounded_products

FORMATS = {
    "int4": Int(4, "token", 64),
    "int4-groups": Int(4, "token", 16, zero="int"),
    "int2": Int(2, "token", 32),
    "int8": Int(8, "token", 64),
    "int4-channel": Int(4, "channel", 32),
    "bfp": Bfp(4, 16),
    "nf4": Lut(4, 32, NF4),
    "lloyd2": Lut(2, 64, *LLOYD[2]),
}

NONE = np.zeros(())  # the sums of the softmax change nothing here


def coded(fmt, x, first=0):
    """x [1, H, N, C] as stored, and its scales."""
    fields = fmt.encode(x[0])
    return fmt.decode(fields)[None], Coded(first, fmt, fmt.scales(fields))


def test_weights_round_to_steps_of_the_largest_in_their_block():
    w = np.array([[127.0, 1.4, 1.5, 2.5] + [0.0] * (BLOCK - 4) + [12.7, 0.14]])
    rounded, tied = round_weights(w, 127)
    assert rounded[0, :4].tolist() == [127.0, 1.0, 2.0, 2.0]
    assert np.allclose(rounded[0, BLOCK:], [12.7, 0.1])
    assert tied[0, 1:3].tolist() == [0.0, 1.0]
    assert round_weights(np.zeros((1, 3)), 127)[0].tolist() == [[0.0, 0.0, 0.0]]


def test_products_round_to_steps_of_the_largest():
    q, scale = np.array([2.0, -1.0, 0.5]), np.array([1.0, 2.0, 0.125])
    got = rounded_products(q, scale, 127)
    step = np.float64(np.float32(2.0) / np.float32(127))
    assert got.tolist() == [127 * step, -127 * step, 4 * step]
    assert rounded_products(np.zeros(3), scale, 127).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", FORMATS)
def test_outputs_are_those_of_rounded_weights(name):
    fmt, rng = FORMATS[name], np.random.default_rng(1)
    first, n = 5, 96
    v, own = coded(fmt, rng.standard_normal((1, 2, n, 64)), first)
    v = np.concatenate([rng.standard_normal((1, 2, first, 64)), v], axis=2)
    p = rng.random((1, 2, 3, first + n))
    integers = Integers([[]], [[own]])
    got = integers.outputs(p, NONE, v)
    most = most_integer(fmt.mantissa if isinstance(fmt, Bfp) else fmt.bits)
    want = np.zeros_like(got)
    for h, r, c in np.ndindex(2, 3, 64):
        s = np.ones(n)
        if not own.per_channel:
            s = own.scale[h, :, c * own.scale.shape[2] // 64]
        w = p[0, h, r, first:] * s
        for block in range(0, n, BLOCK):
            part = slice(block, block + BLOCK)
            step = w[part].max() / most
            exact = v[0, h, first:, c][part]
            units = np.divide(exact, s[part], out=np.zeros_like(exact), where=s[part] > 0)
            want[0, h, r, c] += (np.rint(w[part] / step) * step) @ units
        want[0, h, r, c] += p[0, h, r, :first] @ v[0, h, :first, c]
    assert np.allclose(got, want, rtol=1e-12, atol=1e-12)
    assert np.abs(got - p @ v).max() > 1e-7, "nothing was rounded"


def test_scores_of_scaled_channels_are_those_of_rounded_products():
    fmt, rng = FORMATS["int4-channel"], np.random.default_rng(2)
    k, own = coded(fmt, rng.standard_normal((1, 1, 64, 32)), 3)
    k = np.concatenate([rng.standard_normal((1, 1, 3, 32)), k], axis=2)
    q, scale = rng.standard_normal((1, 1, 2, 32)), 0.125
    exact = scale * q @ k.swapaxes(-1, -2)
    got = Integers([[own]], [[]]).scores(q, k, scale)
    assert np.array_equal(got[..., :3], exact[..., :3])
    for token in range(64):
        s = own.scale[0, token // 32]
        u = rounded_products(q[0, 0] * scale, s, 127)
        assert np.allclose(got[0, 0, :, 3 + token], (u / s) @ k[0, 0, 3 + token])
    assert np.abs(got - exact).max() > 1e-4


def test_entries_of_a_sparse_format_are_not_rounded():
    """The rounding is that of the codes alone: what entries add comes on top, exact."""
    rng = np.random.default_rng(4)
    x, p, q = rng.standard_normal((1, 2, 64, 64)), rng.random((1, 2, 3, 64)), np.ones((1, 2, 1, 64))
    for dense in (FORMATS["int4-groups"], FORMATS["int4-channel"]):
        fmt = Sparse(dense, 3)
        fields = fmt.encode(x[0])
        codes, whole = dense.decode(fields), fmt.decode(fields)[None]
        own = Coded(0, dense, dense.scales(fields), codes)
        alone = Coded(0, dense, dense.scales(fields))
        added = p @ (whole - codes)
        got = Integers([[]], [[own]]).outputs(p, NONE, whole)
        assert np.allclose(got, Integers([[]], [[alone]]).outputs(p, NONE, codes[None]) + added)
        assert not np.allclose(got, Integers([[]], [[alone]]).outputs(p, NONE, whole))
        if not own.per_channel:
            continue
        got = Integers([[own]], [[]]).scores(q, whole, 1.0)
        added = q @ (whole - codes).swapaxes(-1, -2)
        assert np.allclose(got, Integers([[alone]], [[]]).scores(q, codes[None], 1.0) + added)


def test_slices_are_rounded_each_for_itself():
    rng, dense = np.random.default_rng(5), FORMATS["int4-channel"]
    x, p, q = rng.standard_normal((1, 2, 64, 64)), rng.random((1, 2, 3, 64)), np.ones((1, 2, 1, 64))
    parts, stored, owns = [slice(0, 16), slice(24, 64)], x.copy(), []
    for part in parts:
        fields = dense.encode(x[0][..., part])
        stored[..., part] = dense.decode(fields)
        owns.append(Coded(0, dense, dense.scales(fields), dense.decode(fields), part))
    got = Integers([[]], [owns]).outputs(p, NONE, stored)
    scores = EXACT.scores(q, stored, 1.0)
    for part, own in zip(parts, owns, strict=True):
        alone = Coded(0, dense, own.scale)
        one = Integers([[alone]], [[alone]])
        assert np.allclose(got[..., part], one.outputs(p, NONE, stored[..., part]))
        exact = EXACT.scores(q[..., part], stored[..., part], 1.0)
        scores += one.scores(q[..., part], stored[..., part], 1.0) - exact
    assert np.allclose(got[..., 16:24], (p @ stored)[..., 16:24])
    rounded = Integers([owns], [[]]).scores(q, stored, 1.0)
    assert np.allclose(rounded, scores)
    assert not np.allclose(rounded, EXACT.scores(q, stored, 1.0))


def test_ties_within_reach_are_counted_as_slack():
    fmt = Int(8, "token", 4, "none", "f32")
    x = np.ones((1, 1, BLOCK, 4))
    v, own = coded(fmt, x)
    p = np.full((1, 1, 1, BLOCK), 0.4)
    p[..., 0], p[..., 1] = 1.0, 0.25 + 0.5 / 32767
    for near, slack in ((0.0, 0.0), (1e-2, 1.0)):
        integers = Integers([[]], [[own]], near)
        integers.outputs(p, NONE, v)
        assert (integers.slack.max() > 0) == bool(slack)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("peaked", [0.3, 1.0, 3.0])
def test_rounding_of_weights_and_scaled_queries_costs_a_tenth_of_the_encoding(name, peaked):
    """Errors of outputs, root mean square, of spread and of peaked attention."""
    fmt, rng = FORMATS[name], np.random.default_rng(3)
    k, v = (rng.standard_normal((1, 2, 512, 64)) for _ in range(2))
    q = peaked * rng.standard_normal((1, 8, 1, 64))
    (stored_k, own_k), (stored_v, own_v) = coded(fmt, k), coded(fmt, v)
    call = {"lengths": np.array([512]), "scale": 0.125}
    exact = attend(q, k, v, **call)[0]
    stored = attend(q, stored_k, stored_v, **call)[0]
    rounded = attend(q, stored_k, stored_v, products=Integers([[own_k]], [[own_v]]), **call)[0]
    rms = [np.sqrt(np.mean(np.square(x - y))) for x, y in ((stored, exact), (rounded, stored))]
    assert 0 < rms[1] <= 0.1 * rms[0], rms
