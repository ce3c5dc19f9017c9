"""Codes into a table: by hand, the named tables by their definition, and what is refused."""

import math
from itertools import pairwise

import numpy as np
import pytest

from kvant.ir.arrangements import CHANNEL_QUADS, TOKEN_QUADS, holds
from kvant.ir.encodings import Lut, Sparse
from kvant.ir.encodings.lut import LARGEST, LLOYD, NF4, OFFSET
from kvant.ir.errors import KvantError
from kvant.ir.layouts import PageLayout

FOUR = (-10, -2, 4, 20)
# bitsandbytes, create_normal_map: what QLoRA calls NF4.
NF4_VALUES = """
-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635
-0.18477343022823334 -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725
0.24611230194568634 0.33791524171829224 0.44070982933044434 0.5626170039176941
0.7229568362236023 1.0
"""


def relative_error(fmt, x):
    return np.mean(np.sum(np.square(x - fmt.roundtrip(x)), -1) / np.sum(np.square(x), -1))


def test_codes_are_the_nearest_entries_and_ties_go_down():
    fmt = Lut(2, 8, FOUR, params="f32")
    x = np.array([[40.0, -12.0, -12.001, -11.999, 2.0, 2.001, 24.0, 24.1]])
    fields = fmt.encode(x)
    assert fields["scale"].tolist() == [[2.0]]
    assert fields["codes"].tolist() == [[3, 0, 0, 1, 1, 2, 2, 3]]
    assert fmt.decode(fields).tolist() == [[40.0, -20.0, -20.0, -4.0, -4.0, 8.0, 8.0, 40.0]]


def test_the_largest_entry_may_be_the_first():
    fields = Lut(2, 2, (-20, -4, 2, 10), params="f32").encode(np.array([[40.0, -40.0]]))
    assert fields["scale"].tolist() == [[2.0]]
    assert fields["codes"].tolist() == [[3, 0]]


def test_codes_are_those_of_the_stored_scale():
    """20 s rounds: with the scale before rounding the first number would get another code."""
    x = np.array([[float(np.float16(6000 / 20)) * 12 + 1e-9, 6000.5]])
    fields = Lut(2, 2, FOUR).encode(x)
    assert fields["scale"].tolist() == [[300.0]]
    assert fields["codes"].tolist() == [[3, 3]]
    assert Lut(2, 2, FOUR, params="f32").encode(x)["codes"].tolist() == [[2, 3]]


def test_a_scale_of_the_root_mean_square():
    fmt = Lut(2, 4, FOUR, sigmas=2.0, params="f32")
    x = np.array([[3.0, -4.0, 12.0, 0.0]])
    fields = fmt.encode(x)
    assert fields["scale"][0, 0] == pytest.approx(6.5 * 2.0 / 20, rel=1e-5)
    assert fields["codes"].tolist() == [[2, 0, 3, 1]]
    assert fmt.decode(fields)[0, 2] == pytest.approx(13.0, rel=1e-5)
    # What is beyond the largest entry becomes it.
    far = Lut(2, 4, FOUR, sigmas=1.0).roundtrip(np.array([[0.0, 0.0, 0.0, 8.0]]))
    assert far[0, 3] == pytest.approx(4.0, rel=1e-3)


def test_the_sum_of_squares_is_the_same_in_every_order():
    fmt, rng = Lut(3, 64, *LLOYD[3], params="f32"), np.random.default_rng(0)
    x = rng.standard_normal((200, 64)) * np.exp(3 * rng.standard_normal((200, 64)))
    shuffled = [rng.permutation(x, axis=1) for _ in range(20)]
    # Before rounding, which would hide most differences.
    assert len({fmt._wanted(y[:, None]).tobytes() for y in shuffled}) == 1
    exact = np.sqrt(np.mean(np.square(x), axis=-1)) * fmt.sigmas / fmt.most
    assert np.allclose(fmt.encode(x)["scale"][:, 0], exact, rtol=1e-4)
    assert len({np.square(y).sum(axis=1).tobytes() for y in shuffled}) > 1, "a plain sum would do"


@pytest.mark.parametrize("sigmas", [None, 2.0])
def test_zeros_and_numbers_too_small_for_a_scale_read_zero(sigmas):
    fmt = Lut(2, 4, FOUR, sigmas)
    x = np.array([[0.0] * 4, [1e-9, -1e-9, 0.0, 1e-9], [1.0, 0.0, 0.0, 0.0]])
    fields = fmt.encode(x)
    assert fields["scale"][:2, 0].tolist() == [0.0, 0.0]
    assert fields["scale"][2, 0] > 0.0
    assert (fmt.decode(fields)[:2] == 0.0).all()


def cell(low, high):
    """The share of a normal distribution in (low, high), and its first moment there."""
    density = [math.exp(-x * x / 2) / math.sqrt(2 * math.pi) for x in (low, high)]
    below = [(1 + math.erf(x / math.sqrt(2))) / 2 for x in (low, high)]
    return below[1] - below[0], density[0] - density[1]


def mean_square_error(levels):
    edges = [-math.inf, *((a + b) / 2 for a, b in pairwise(levels)), math.inf]
    error = 1.0
    for level, (low, high) in zip(levels, pairwise(edges), strict=True):
        share, moment = cell(low, high)
        error += level * level * share - 2 * level * moment
    return error


def lloyd_max(entries):
    """Levels for which both conditions hold: thresholds in the middle, levels at the means."""
    levels = np.linspace(-2, 2, entries)
    for _ in range(2000):
        edges = [-math.inf, *(levels[1:] + levels[:-1]) / 2, math.inf]
        cells = [cell(low, high) for low, high in pairwise(edges)]
        levels = np.array([moment / share for share, moment in cells])
    return levels


# By bits: the error of Lloyd and Max' quantizer (Max, 1960, table I).
PUBLISHED = {2: 0.1175, 3: 0.03454, 4: 0.009497}


@pytest.mark.parametrize("bits", LLOYD)
def test_lloyds_tables_meet_lloyds_conditions(bits):
    table, sigmas = LLOYD[bits]
    levels = lloyd_max(1 << bits)
    unit = levels[-1] / table[-1]
    assert sigmas == pytest.approx(levels[-1], abs=1e-4)
    assert np.rint(levels / unit).tolist() == list(table)
    own = mean_square_error(np.array(table) * sigmas / table[-1])
    assert mean_square_error(levels) == pytest.approx(PUBLISHED[bits], rel=1e-3)
    assert 1.0 <= own / mean_square_error(levels) <= 1.003
    wrong = np.array(table) * sigmas / table[-1] * 1.1
    assert mean_square_error(wrong) / own > 1.01


def test_nf4_is_qloras():
    values = np.array([float(word) for word in NF4_VALUES.split()])
    assert np.rint(values * max(NF4)).tolist() == list(NF4)
    assert np.abs(np.array(NF4) / max(NF4) - values).max() < 0.008


MEASURED = [
    (Lut(4, 128, *LLOYD[4]), 0.0094),
    (Lut(3, 128, *LLOYD[3]), 0.0342),
    (Lut(2, 128, *LLOYD[2]), 0.1163),
    (Lut(4, 64, NF4), 0.00857),
]


@pytest.mark.parametrize(("fmt", "expected"), MEASURED, ids=lambda v: str(v)[:40])
def test_errors_on_gaussian_vectors_are_those_measured_before(fmt, expected):
    """The first three: methods of Lloyd and Max with the norm stored, at rates of n + 1/8 bits."""
    x = np.random.default_rng(19).standard_normal((4096, 128))
    assert relative_error(fmt, x) == pytest.approx(expected, rel=0.02)


def test_operands_are_bytes_whose_products_fit_16_bits():
    fmt = Lut(2, 4, (-LARGEST, 0, 1, LARGEST))
    assert fmt.operands == (1, 64, 65, 127)
    assert LARGEST + OFFSET == 127
    assert 2 * 127 * max(fmt.operands) <= 32767


def test_pages_hold_them_as_they_hold_integers():
    layout = PageLayout(64, 2, 64, Lut(3, 32, *LLOYD[3]))
    assert [field.name for field in layout.fields] == ["codes", "high", "scale"]
    x = np.random.default_rng(1).standard_normal((2, 64, 64))
    fields = layout.format.encode(x)
    for kind in (CHANNEL_QUADS, TOKEN_QUADS):
        assert holds(kind, layout.format, 64, 64)
        quads = PageLayout(64, 2, 64, layout.format, kind)
        got = quads.unpack(quads.pack(fields))
        assert all(np.array_equal(got[name], fields[name]) for name in fields)


def test_sparse_entries_beside_a_table():
    fmt, x = Sparse(Lut(4, 16, NF4), 1), np.random.default_rng(2).standard_normal((4, 16))
    x[:, 3] = 100.0
    assert np.allclose(fmt.roundtrip(x)[:, 3], 100.0, rtol=1e-3)
    rest = np.delete(np.arange(16), 3)
    assert np.abs(fmt.roundtrip(x) - x)[:, rest].max() < 0.5
    assert np.abs(Lut(4, 16, NF4).roundtrip(x) - x)[:, rest].max() > 0.5


REFUSED = {
    "unsorted": ((1, 0, 2, 3), "table is (1, 0, 2, 3)", "sort the entries, each one once"),
    "twice": ((0, 1, 1, 3), "table is (0, 1, 1, 3)", "sort the entries, each one once"),
    "short": ((0, 1, 2), "a table of 3 entries", "give 4 of them"),
    "far": (
        (-64, 0, 1, 2),
        "table is (-64, 0, 1, 2)",
        "use integers of -63..63; the scale does the rest",
    ),
    "floats": ((-1.0, 0, 1, 2), "table is (-1.0, 0, 1, 2)", "give integers"),
    "no table": ("nf4", "table is 'nf4'", "give integers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_tables_are_refused(name):
    table, what, fix = REFUSED[name]
    with pytest.raises(KvantError) as caught:
        Lut(2, 4, table)
    assert str(caught.value) == f"{what}\n  where: lut\n  fix: {fix}  [bad-encoding]"


@pytest.mark.parametrize("sigmas", [0.0, -1.0, 65.0, math.nan, math.inf, 2, True])
def test_wrong_sigmas_are_refused(sigmas):
    with pytest.raises(KvantError) as caught:
        Lut(2, 4, FOUR, sigmas)
    assert str(caught.value) == (
        f"sigmas is {sigmas!r}\n  where: lut\n"
        "  fix: use a number over 0.0, up to 64.0, or none  [bad-encoding]"
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: Lut(1, 4, (-1, 1)),
        lambda: Lut(5, 4, tuple(range(32))),
        lambda: Lut(2, 0, FOUR),
        lambda: Lut(2, 4, FOUR, params="f64"),
    ],
)
def test_wrong_fields_are_refused(make):
    with pytest.raises(KvantError) as caught:
        make()
    assert caught.value.code == "bad-encoding"


@pytest.mark.parametrize("sigmas", [None, 2.0])
@pytest.mark.parametrize(
    ("value", "code"), [(math.nan, "not-finite"), (math.inf, "scale-overflow"), (1e9, None)]
)
def test_numbers_that_no_scale_takes_are_refused(sigmas, value, code):
    x = np.array([[value, 0.0, 1.0, 2.0]])
    with pytest.raises(KvantError) as caught:
        Lut(2, 4, FOUR, sigmas).encode(x)
    assert caught.value.code == (code or "scale-overflow")
    if code is None:
        assert Lut(2, 4, FOUR, sigmas, "bf16").roundtrip(x)[0, 0] == pytest.approx(1e9, rel=0.01)


def test_groups_divide_the_channels():
    with pytest.raises(KvantError) as caught:
        Lut(2, 48, FOUR).check(64, "layer 0: k")
    assert str(caught.value).startswith("groups of 48 do not divide 64 channels\n  where: layer 0")
