"""Formats: against their definition in plain loops, pinned errors, degenerate groups, refusals."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvant.ir.arrays import from_bf16_bits, from_stored, to_bf16_bits, to_stored
from kvant.ir.encodings import Bfp, Int, Raw
from kvant.ir.errors import KvantError

F32_MAX = float(np.finfo(np.float32).max)


def relative_error(fmt, x):
    return float(((fmt.roundtrip(x) - x) ** 2).sum() / (x**2).sum())


# bf16


def test_every_bf16_number_survives():
    bits = np.arange(65536, dtype=np.uint16)
    values = from_bf16_bits(bits)
    numbers = ~np.isnan(values)
    assert np.array_equal(to_bf16_bits(values[numbers]), bits[numbers])
    assert np.isnan(from_bf16_bits(to_bf16_bits(values[~numbers]))).all()


def test_bf16_rounds_to_nearest_and_ties_to_even():
    step = 2.0**-7
    cases = {
        1.0 + 0.5 * step: 1.0,
        1.0 + 1.5 * step: 1.0 + 2 * step,
        1.0 + 0.5001 * step: 1.0 + step,
        1.0 + 1.4999 * step: 1.0 + step,
        -(1.0 + 1.5 * step): -(1.0 + 2 * step),
        F32_MAX: math.inf,
    }
    got = from_stored(to_stored(np.array(list(cases)), "bf16"), "bf16")
    assert got.tolist() == list(cases.values())


def test_a_nan_whose_low_bits_alone_are_set_stays_nan():
    nan = np.array([0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(from_bf16_bits(to_bf16_bits(nan))).all()


# The definition, in plain loops


def int_by_loops(fmt, x):
    """One group at a time, as the head of affine.py says; params = f32 or f16."""
    cast = {"f32": np.float32, "f16": np.float16}[fmt.params]
    y = np.zeros_like(x)
    tokens, channels = x.shape
    gt, gc = (fmt.group, 1) if fmt.axis == "channel" else (1, fmt.group)
    n, q = 2**fmt.bits - 1, 2 ** (fmt.bits - 1) - 1
    for t, c in itertools.product(range(0, tokens, gt), range(0, channels, gc)):
        group = x[t : t + gt, c : c + gc]
        low, high = group.min() * fmt.clip, group.max() * fmt.clip
        if fmt.zero == "none":
            s = float(cast(np.abs(group).max() * fmt.clip / q)) or 1.0
            codes = np.clip([[round(v / s) for v in row] for row in group], -q, q)
            y[t : t + gt, c : c + gc] = codes * s
            continue
        if fmt.zero == "int":
            low, high = min(low, 0.0), max(high, 0.0)
        s = float(cast((high - low) / n)) or 1.0
        if fmt.zero == "float":
            z = float(cast(low))
            codes = np.clip([[round((v - z) / s) for v in row] for row in group], 0, n)
            y[t : t + gt, c : c + gc] = codes * s + z
        else:
            z = min(max(round(-low / s), 0), n)
            codes = np.clip([[round(v / s) + z for v in row] for row in group], 0, n)
            y[t : t + gt, c : c + gc] = (codes - z) * s
    return y


# One bit without a zero point has one code, and is refused.
WIDTHS = [(b, z) for b in range(1, 9) for z in ("none", "int", "float") if (b, z) != (1, "none")]


@pytest.mark.parametrize(("bits", "zero"), WIDTHS)
@pytest.mark.parametrize("axis", ["token", "channel"])
def test_int_is_its_definition(bits, zero, axis):
    rng = np.random.default_rng(bits)
    x = rng.standard_normal((6, 12)) * 3.0 + rng.standard_normal(12) * 4.0
    x[:, 3] = 2.5
    x[0:3] = 0.0
    for group, params, clip in [(1, "f32", 1.0), (3, "f16", 1.0), (6, "f32", 0.75)]:
        fmt = Int(bits, axis, group, zero, params, clip)
        assert np.array_equal(fmt.roundtrip(x), int_by_loops(fmt, x)), fmt


@pytest.mark.parametrize(("mantissa", "block"), [(4, 1), (4, 4), (8, 4), (8, 12), (3, 6)])
def test_bfp_is_its_definition(mantissa, block):
    x = np.random.default_rng(block).standard_normal((5, 12)) * 10.0 ** np.arange(-6, 6)
    limit = 2 ** (mantissa - 1) - 1
    y = np.zeros_like(x)
    for t, c in itertools.product(range(5), range(0, 12, block)):
        group = x[t, c : c + block]
        step = 2.0 ** (math.floor(math.log2(np.abs(group).max())) - (mantissa - 2))
        y[t, c : c + block] = [step * min(max(round(v / step), -limit), limit) for v in group]
    assert np.array_equal(Bfp(mantissa, block).roundtrip(x), y)


def test_bfp12_of_one_element_has_the_published_values():
    fmt = Bfp(4, 1)
    x = np.array([[1.125, 1.25, 1.375, -1.125, -1.375, 1.99, 0.0]])
    assert fmt.roundtrip(x).tolist() == [[1.0, 1.25, 1.5, -1.0, -1.5, 1.75, 0.0]]
    fields = fmt.encode(np.array([[1.25, -1.25, 0.0]]))
    assert fields["codes"].tolist() == [[8 + 5, 8 - 5, 8]]
    assert fields["exponent"].tolist() == [[127, 127, 0]]


# Pinned errors: methods.md, section 19, column gauss

TABLE = [
    (Int(4, "token", 128), 0.00999),
    (Int(4, "token", 32), 0.00611),
    (Int(3, "token", 128), 0.0459),
    (Int(2, "token", 128), 0.2510),
    (Int(2, "token", 32), 0.154),
    (Int(2, "token", 128, clip=0.8), 0.1625),
    (Int(2, "token", 128, zero="int", clip=0.8), 0.1724),
    (Int(4, "channel", 128), 0.00999),
    (Int(2, "channel", 32), 0.154),
    (Bfp(4, 32), 0.0175),
    (Bfp(4, 64), 0.0203),
    (Bfp(4, 128), 0.0213),
    (Bfp(8, 64), 0.00008),
]


@pytest.mark.parametrize(("fmt", "expected"), TABLE, ids=lambda v: str(v))
def test_error_on_gaussian_vectors_is_the_published_one(fmt, expected):
    x = np.random.default_rng(19).standard_normal((4096, 128))
    assert relative_error(fmt, x) == pytest.approx(expected, rel=0.10)


MEASURED = [
    (Int(8, "token", 128), 3.46e-5),
    (Int(8, "channel", 64, params="bf16"), 2.86e-5),
    (Int(4, "token", 128, zero="none"), 0.01375),
    (Int(3, "token", 32, zero="none", params="f32"), 0.0513),
    (Raw("bf16"), 2.76e-6),
    (Raw("f16"), 4.33e-8),
]


@pytest.mark.parametrize(("fmt", "expected"), MEASURED, ids=lambda v: str(v))
def test_error_of_the_other_formats_is_pinned(fmt, expected):
    x = np.random.default_rng(19).standard_normal((4096, 128))
    assert relative_error(fmt, x) == pytest.approx(expected, rel=0.05)


# Degenerate groups

FORMATS = [
    *(
        Int(b, a, 8, z)
        for b in (2, 3, 4, 8)
        for a in ("token", "channel")
        for z in ("int", "float")
    ),
    *(Int(b, a, 8, "none") for b in (2, 4, 8) for a in ("token", "channel")),
    Int(4, "token", 8, "float", "bf16"),
    Bfp(4, 8),
    Bfp(8, 4),
    Raw("bf16"),
]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_zeros_are_kept_exactly(fmt):
    got = fmt.roundtrip(np.zeros((8, 16)))
    assert np.array_equal(got, np.zeros((8, 16)))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("value", [1.0, -0.75, 3.0])
def test_a_constant_group_is_kept(fmt, value):
    got = fmt.roundtrip(np.full((8, 16), value))
    slack = 0.0 if isinstance(fmt, Raw | Bfp) or fmt.zero == "float" else abs(value) * 2.0**-10
    assert np.abs(got - value).max() <= slack


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_one_hot_keeps_its_zeros(fmt):
    x = np.zeros((8, 16))
    x[3, 5] = 1.0
    got = fmt.roundtrip(x)
    assert np.array_equal(got[x == 0.0], x[x == 0.0])
    assert got[3, 5] == pytest.approx(1.0, rel=2.0**-8)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_subnormal_values_stay_finite_and_near(fmt):
    x = np.random.default_rng(0).standard_normal((8, 16)) * 1e-41
    got = fmt.roundtrip(x)
    assert np.isfinite(got).all()
    assert np.abs(got - x).max() <= np.abs(x).max()


@pytest.mark.parametrize("params", ["bf16", "f32"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_largest_f32_values_are_kept_where_params_reach(params, bits):
    x = np.array([[F32_MAX, -F32_MAX, 0.0, F32_MAX / 2]]) * 0.99
    got = Int(bits, "token", 4, "float", params).roundtrip(x)
    assert np.isfinite(got).all()
    assert np.abs(got / F32_MAX - x / F32_MAX).max() < 1.05 / (2**bits - 1)


def test_the_largest_f32_values_are_kept_by_bfp():
    got = Bfp(8, 4).roundtrip(np.array([[F32_MAX, -F32_MAX, 1.0, 0.0]]))
    assert got.tolist() == [[127 * 2.0**121, -127 * 2.0**121, 0.0, 0.0]]


def test_a_block_below_the_smallest_normal_number_is_stored_as_zeros():
    fields = Bfp(4, 2).encode(np.array([[2.0**-126, 0.0, 2.0**-127, 2.0**-127]]))
    assert fields["exponent"].tolist() == [[1, 0]]
    assert fields["codes"].tolist() == [[12, 8, 8, 8]]


def test_poisoned_codes_of_a_zero_block_read_as_zeros():
    fields = {"codes": np.array([[255, 3]], np.uint8), "exponent": np.array([[0]], np.uint8)}
    assert Bfp(8, 2).decode(fields).tolist() == [[0.0, 0.0]]


# Properties

finite = st.floats(-1e4, 1e4, width=32)


@st.composite
def ints(draw):
    zero = draw(st.sampled_from(["none", "int", "float"]))
    bits = draw(st.integers(2 if zero == "none" else 1, 8))
    axis = draw(st.sampled_from(["token", "channel"]))
    params = draw(st.sampled_from(["f16", "bf16", "f32"]))
    fmt = Int(bits, axis, draw(st.integers(1, 5)), zero, params)
    shape = (2, draw(st.integers(1, 3)) * fmt.group_tokens, 15 if fmt.axis == "channel" else None)
    width = shape[2] or fmt.group * draw(st.integers(1, 3))
    seed = draw(st.integers(0, 2**32 - 1))
    spread = draw(st.sampled_from([1e-3, 1.0, 300.0]))
    x = np.random.default_rng(seed).standard_normal((*shape[:2], width)) * spread
    return fmt, x + draw(st.sampled_from([0.0, 7.0, -900.0]))


@settings(max_examples=200, deadline=None)
@given(ints())
def test_int_error_is_half_a_step_and_what_rounding_the_params_costs(case):
    fmt, x = case
    fields = fmt.encode(x)
    scale = from_stored(fields["scale"], fmt.params)[..., :, None, :, None]
    groups = fmt._grouped(x)
    error = np.abs(fmt._grouped(fmt.decode(fields)) - groups)
    unit = {"f16": 2.0**-11, "bf16": 2.0**-8, "f32": 2.0**-24}[fmt.params]
    largest = np.abs(groups).max(axis=(-3, -1), keepdims=True)
    # Scale and zero point are off by at most one unit; zero = int moves the range by half a step.
    slack = 2.5 * unit * (largest + fmt.steps * scale) + 2.0**-24 * fmt.steps
    half = 1.0 if fmt.zero == "int" else 0.5
    assert (error <= half * scale + slack).all()


@settings(max_examples=100, deadline=None)
@given(ints())
def test_fields_have_the_shapes_and_types_of_the_contract(case):
    fmt, x = case
    fields = fmt.encode(x)
    params = (2, x.shape[1] // fmt.group_tokens, x.shape[2] // fmt.group_channels)
    stored = {"f16": np.float16, "bf16": np.uint16, "f32": np.float32}[fmt.params]
    assert fields["codes"].shape == x.shape
    assert fields["codes"].dtype == np.uint8
    assert fields["codes"].max() <= 2**fmt.bits - 1
    assert set(fields) == {"codes", "scale"} | ({"zero"} if fmt.zero != "none" else set())
    for name in set(fields) - {"codes"}:
        assert (fields[name].shape, fields[name].dtype) == (params, stored)


@settings(max_examples=100, deadline=None)
@given(ints())
def test_each_group_is_encoded_by_itself(case):
    fmt, x = case
    parts = [
        fmt.roundtrip(x[:, t : t + fmt.group_tokens])
        for t in range(0, x.shape[1], fmt.group_tokens)
    ]
    assert np.array_equal(np.concatenate(parts, axis=1), fmt.roundtrip(x))


@settings(max_examples=100, deadline=None)
@given(st.lists(finite, min_size=12, max_size=12), st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_symmetric_formats_are_odd_and_bfp_is_idempotent(values, group):
    x = np.array(values).reshape(1, 12)
    for fmt in (Int(4, "token", group, "none"), Bfp(4, group), Bfp(8, group)):
        assert np.array_equal(fmt.roundtrip(-x), -fmt.roundtrip(x))
    for fmt in (Bfp(4, group), Bfp(8, group)):
        assert np.array_equal(fmt.roundtrip(fmt.roundtrip(x)), fmt.roundtrip(x))


def test_leading_axes_do_not_matter():
    x = np.random.default_rng(2).standard_normal((2, 3, 8, 16))
    for fmt in FORMATS:
        flat = fmt.roundtrip(x.reshape(6, 8, 16)).reshape(x.shape)
        assert np.array_equal(fmt.roundtrip(x), flat), fmt


def test_no_tokens_are_no_codes():
    for fmt in FORMATS:
        assert fmt.roundtrip(np.zeros((2, 0, 16))).shape == (2, 0, 16), fmt


def test_encode_leaves_its_input_alone():
    x = np.random.default_rng(3).standard_normal((8, 16))
    for fmt in FORMATS:
        before = x.copy()
        fmt.encode(x)
        assert np.array_equal(x, before), fmt


# Refusals


def test_a_group_that_does_not_divide_names_those_that_do():
    with pytest.raises(KvantError) as caught:
        Int(4, "token", 48).check(64, "layer 0: k")
    assert str(caught.value) == (
        "groups of 48 do not divide 64 channels\n  where: layer 0: k\n"
        "  fix: use one of: 1, 2, 4, 8, 16, 32, 64  [group-does-not-divide]"
    )


def test_a_bfp_block_that_does_not_divide_is_refused():
    with pytest.raises(KvantError, match="groups of 24 do not divide 64 channels"):
        Bfp(4, 24).check(64, "k")


def test_tokens_that_are_not_whole_groups_are_refused():
    with pytest.raises(KvantError, match="groups of 32 do not divide 33 tokens"):
        Int(4, "channel", 32).encode(np.zeros((33, 4)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Int(0, "token", 4),
        lambda: Int(9, "token", 4),
        lambda: Int(True, "token", 4),
        lambda: Int(4.0, "token", 4),
        lambda: Int(4, "tokens", 4),
        lambda: Int(4, "token", 0),
        lambda: Int(4, "token", 4, "min"),
        lambda: Int(4, "token", 4, "float", "f64"),
        lambda: Int(4, "token", 4, clip=0.0),
        lambda: Int(4, "token", 4, clip=1.5),
        lambda: Int(1, "token", 4, "none"),
        lambda: Bfp(1, 4),
        lambda: Bfp(9, 4),
        lambda: Bfp(4, 0),
        lambda: Raw("f64"),
    ],
)
def test_a_field_out_of_range_is_refused(make):
    with pytest.raises(KvantError) as caught:
        make()
    assert caught.value.code == "bad-encoding"


def test_an_overflowing_scale_is_refused_with_the_way_out():
    x = np.array([[-60000.0, 60000.0]])
    with pytest.raises(KvantError) as caught:
        Int(1, "token", 2, "float", "f16").encode(x)
    assert str(caught.value) == (
        "a scale of 120000 does not fit f16\n  where: int(bits = 1, params = f16)\n"
        "  fix: store it as bf16 or f32, or rotate or scale the channels first  [scale-overflow]"
    )
    assert Int(1, "token", 2, "float", "bf16").roundtrip(x).tolist() == [[-59904.0, 59904.0]]


@pytest.mark.parametrize("fmt", [*FORMATS, Raw("f32"), Raw("f16")], ids=str)
@pytest.mark.parametrize(("bad", "code"), [(np.nan, "not-finite"), (np.inf, "scale-overflow")])
def test_nan_and_inf_are_refused(fmt, bad, code):
    x = np.ones((8, 16))
    x[2, 3] = bad
    with pytest.raises(KvantError) as caught:
        fmt.encode(x)
    assert caught.value.code == code


@pytest.mark.parametrize(("dtype", "value"), [("f16", 65520.0), ("bf16", F32_MAX), ("f32", 1e39)])
def test_raw_refuses_what_it_cannot_hold(dtype, value):
    with pytest.raises(KvantError, match=f"does not fit {dtype}"):
        Raw(dtype).encode(np.array([[value]]))


@pytest.mark.parametrize("params", ["f16", "bf16", "f32"])
@pytest.mark.parametrize(("zero", "scale"), [("none", 2.0**-14), ("int", 1.0), ("float", 1.0)])
def test_a_scale_that_rounds_to_zero_is_stored_as_one_that_reads_as_zeros(params, zero, scale):
    fmt = Int(8, "channel", 4, zero, params)
    fields = fmt.encode(np.zeros((4, 2)))
    assert np.array_equal(from_stored(fields["scale"], params), np.full((1, 2), scale))
    assert not fmt.decode(fields).any()
