"""Slices: each one is its own format over its own channels, in pages too; refusals."""

import copy
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvant.ir.encodings import Bfp, Drop, Int, Raw, Slice, Slices, Tokens
from kvant.ir.errors import KvantError
from kvant.ir.layouts import Field, PageLayout, page_tokens
from kvant.ir.plan import AttentionPlan, StreamPlan


def slices(*parts):
    return Slices(tuple(Slice(width, fmt) for width, fmt in parts))


MIXED = slices(
    (16, Drop()),
    (48, Int(2, "channel", 32)),
    (32, Int(8, "token", 16, "none")),
    (16, Bfp(4, 8)),
    (16, Raw("bf16")),
)
WIDTHS = [16, 48, 32, 16, 16]


def cut(x):
    ends = list(itertools.accumulate(WIDTHS))
    return [x[..., end - width : end] for width, end in zip(WIDTHS, ends, strict=True)]


def test_each_slice_is_stored_in_its_own_format():
    x = np.random.default_rng(0).standard_normal((2, 3, 64, 128))
    fields, got = MIXED.encode(x), cut(MIXED.roundtrip(x))
    for i, (part, own) in enumerate(zip(MIXED.slices, cut(x), strict=True)):
        if isinstance(part.format, Drop):
            assert not got[i].any()
            continue
        assert np.array_equal(got[i], part.format.roundtrip(own)), part
        for name, array in part.format.encode(own).items():
            assert np.array_equal(fields.pop(f"{i}.{name}"), array)
    assert fields == {}


def test_a_group_of_tokens_is_whole_groups_of_every_slice():
    fmt = slices((16, Int(4, "channel", 48)), (16, Int(4, "channel", 32)), (16, Raw("f32")))
    assert fmt.group_tokens == 96
    assert page_tokens(fmt) == 192
    assert MIXED.group_tokens == 32


def test_one_slice_is_the_format_itself():
    x = np.random.default_rng(1).standard_normal((5, 32))
    for fmt in (Int(3, "token", 16), Bfp(8, 32), Raw("f16")):
        assert np.array_equal(slices((32, fmt)).roundtrip(x), fmt.roundtrip(x))


def test_all_zeros_stay_zeros_and_no_tokens_no_codes():
    assert np.array_equal(MIXED.roundtrip(np.zeros((32, 128))), np.zeros((32, 128)))
    assert MIXED.roundtrip(np.zeros((2, 0, 128))).shape == (2, 0, 128)


@pytest.mark.parametrize(
    ("fmt", "expected"),
    [
        # A quarter of the energy is lost with the quarter that is dropped.
        (slices((32, Drop()), (96, Raw("f32"))), 0.25),
        (slices((96, Int(2, "channel", 32)), (32, Int(8, "token", 32))), 0.75 * 0.154),
        (slices((64, Int(2, "token", 32)), (64, Bfp(4, 32))), 0.5 * 0.154 + 0.5 * 0.0175),
    ],
    ids=["drop", "2 and 8 bits", "2 bits and bfp"],
)
def test_error_on_gaussian_vectors_is_the_mean_of_the_slices(fmt, expected):
    x = np.random.default_rng(19).standard_normal((4096, 128))
    error = ((fmt.roundtrip(x) - x) ** 2).sum() / (x**2).sum()
    assert error == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("bad", "code"), [(np.nan, "not-finite"), (np.inf, "scale-overflow")])
@pytest.mark.parametrize("channel", [3, 20, 127])
def test_nan_and_inf_are_refused_in_every_slice(bad, code, channel):
    x = np.ones((32, 128))
    x[7, channel] = bad
    with pytest.raises(KvantError) as caught:
        MIXED.encode(x)
    assert caught.value.code == code


# Pages


def test_the_fields_of_a_page_of_slices():
    layout = PageLayout(64, 2, 64, slices((48, Int(2, "channel", 32)), (16, Int(8, "token", 16))))
    assert [(f.name, f.dtype, f.shape, f.offset) for f in layout.fields] == [
        ("0.codes", "uint8", (64, 12), 0),
        ("0.scale", "float16", (2, 48), 768),
        ("0.zero", "float16", (2, 48), 960),
        ("1.codes", "uint8", (64, 16), 1152),
        ("1.scale", "float16", (64, 1), 2176),
        ("1.zero", "float16", (64, 1), 2304),
    ]
    assert (layout.head_bytes, layout.page_bytes) == (2432, 4864)


def test_the_parts_of_a_page():
    layout = PageLayout(64, 1, 64, slices((32, Drop()), (32, Raw("f16"))))
    values = Field("values", "float16", (64, 32), 0)
    assert [(p.prefix, p.first, p.width, p.format, p.fields) for p in layout.parts] == [
        ("0.", 0, 32, Drop(), ()),
        ("1.", 32, 32, Raw("f16"), (values,)),
    ]
    (only,) = PageLayout(64, 1, 32, Raw("f16")).parts
    assert (only.prefix, only.first, only.width, only.fields) == ("", 0, 32, (values,))


def test_the_planes_of_a_slice_are_those_of_its_own_width():
    fmt = slices((16, Int(8, "token", 16)), (16, Int(4, "token", 16)))
    layout = PageLayout(64, 1, 32, fmt)
    x = np.random.default_rng(2).standard_normal((1, 64, 32))
    page = layout.pack(fmt.encode(x))
    for part in layout.parts:
        alone = PageLayout(64, 1, 16, part.format)
        own = alone.pack(part.format.encode(x[..., part.first : part.first + 16]))
        for here, there in zip(part.fields, alone.fields, strict=True):
            bytes_here = page[here.offset : here.offset + here.nbytes]
            assert np.array_equal(bytes_here, own[there.offset : there.offset + there.nbytes])


@st.composite
def mixed(draw):
    """Any slices: every width of code, both axes, raw and dropped ones, up to 5 slices."""
    parts = []
    for _ in range(draw(st.integers(1, 5))):
        width = 16 * draw(st.integers(1, 3))
        kind = draw(st.sampled_from(["int", "int", "bfp", "raw", "drop"]))
        if kind == "int":
            axis = draw(st.sampled_from(["token", "channel"]))
            group = draw(st.sampled_from([1, 4, 16] if axis == "token" else [1, 3, 16]))
            zero = draw(st.sampled_from(["none", "int", "float"]))
            parts.append((width, Int(draw(st.sampled_from([2, 3, 4, 8])), axis, group, zero)))
        elif kind == "bfp":
            parts.append((width, Bfp(draw(st.sampled_from([4, 8])), draw(st.sampled_from([1, 8])))))
        else:
            parts.append((width, Raw("bf16") if kind == "raw" else Drop()))
    if all(isinstance(fmt, Drop) for _, fmt in parts):
        parts.append((16, Raw("f32")))
    return slices(*parts)


@settings(max_examples=150, deadline=None)
@given(mixed(), st.integers(0, 99), st.integers(1, 3), st.integers(1, 3))
def test_encoded_slices_survive_the_page_and_cost_what_the_plan_says(fmt, seed, heads, groups):
    channels = sum(part.width for part in fmt.slices)
    tokens = groups * fmt.group_tokens
    layout = PageLayout(tokens, heads, channels, fmt)
    x = np.random.default_rng(seed).standard_normal((heads, tokens, channels))
    page = layout.pack(fmt.encode(x))
    assert np.array_equal(fmt.decode(layout.unpack(page)), fmt.roundtrip(x))
    end = 0
    for field in layout.fields:
        assert field.offset % 64 == 0
        assert end <= field.offset < end + 64
        end = field.offset + field.nbytes
    plan = StreamPlan("k", heads, channels, (), Tokens(fmt), tokens)
    assert plan.bytes(3 * tokens) == 3 * (page.nbytes + 8)


@settings(max_examples=50, deadline=None)
@given(mixed(), st.data())
def test_a_partial_write_changes_its_tokens_alone(fmt, data):
    group, channels = fmt.group_tokens, sum(part.width for part in fmt.slices)
    layout = PageLayout(4 * group, 1, channels, fmt)
    first, count = data.draw(st.sampled_from([(0, 1), (1, 2), (3, 1), (0, 4), (2, 0)]))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    x = rng.standard_normal((1, 4 * group, channels))
    page = layout.pack(fmt.encode(x))
    inside = slice(first * group, (first + count) * group)
    x[:, inside] = rng.standard_normal((1, count * group, channels))
    layout.write(page, first * group, fmt.encode(x[:, inside]))
    assert np.array_equal(fmt.decode(layout.unpack(page)), fmt.roundtrip(x))


# Plans


def plan_of(fmt):
    k, v = (StreamPlan(role, 2, 128, (), Tokens(fmt), 64) for role in ("k", "v"))
    return AttentionPlan(4, 0.125, None, None, (), k, v, ())


def test_json_gives_back_a_plan_of_slices():
    plan = plan_of(MIXED)
    text = json.dumps(plan.to_json())
    assert AttentionPlan.from_json(text) == plan
    rest = plan.to_json()["k"]["tokens"]["rest"]
    assert rest["kind"] == "slices"
    assert rest["slices"][0] == {"kind": "slice", "width": 16, "format": {"kind": "drop"}}


SPOILS = {
    "no slices": lambda r: r.update(slices=[]),
    "slices are one": lambda r: r.update(slices=r["slices"][1]),
    "a slice is a format": lambda r: r["slices"].append({"kind": "raw", "dtype": "f32"}),
    "slices in slices": lambda r: r["slices"][0].update(format=copy.deepcopy(r)),
    "tokens in a slice": lambda r: r["slices"][0].update(format={"kind": "tokens"}),
    "a dropped slice has bits": lambda r: r["slices"][0]["format"].update(bits=0),
    "a width is missing": lambda r: r["slices"][0].pop("width"),
    "a width is text": lambda r: r["slices"][0].update(width="16"),
    "a width is odd": lambda r: (r["slices"][0].update(width=8), r["slices"][1].update(width=56)),
    "widths fall short": lambda r: r["slices"].pop(),
    "an unknown key": lambda r: r["slices"][0].update(first=0),
}


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
def test_spoiled_slices_are_refused(spoil):
    plan = plan_of(MIXED).to_json()
    AttentionPlan.from_json(plan)
    spoil(plan["k"]["tokens"]["rest"])
    with pytest.raises(KvantError):
        AttentionPlan.from_json(plan)


def test_slices_have_integer_products_unless_all_are_raw():
    def plan(*parts):
        k, v = (StreamPlan(role, 2, 128, (), Tokens(slices(*parts)), 64) for role in ("k", "v"))
        return AttentionPlan(4, 0.125, None, None, (), k, v, (), "int")

    assert plan((64, Int(4, "token", 64)), (64, Raw("bf16"))).query_bits is None
    with pytest.raises(KvantError) as caught:
        plan((64, Raw("f16")), (64, Raw("bf16")))
    assert caught.value.code == "integer-compute"


# Refusals


@pytest.mark.parametrize("widths", [(24, 40), (16, 16), (32, 48), (8, 56)])
def test_slices_that_do_not_make_up_the_head_are_refused(widths):
    fmt = slices(*((width, Raw("bf16")) for width in widths))
    with pytest.raises(KvantError) as caught:
        fmt.check(64, "layer 0: k")
    assert str(caught.value) == (
        f"slices of {widths[0]} + {widths[1]} channels do not make up a head of 64\n"
        "  where: layer 0: k\n"
        "  fix: use multiples of 16 channels that sum to 64  [slices-do-not-fit]"
    )
    with pytest.raises(KvantError, match="do not make up a head of 63"):
        fmt.encode(np.zeros((1, 63)))


def test_a_group_that_does_not_divide_its_slice_names_the_slice():
    fmt = slices((32, Raw("bf16")), (32, Int(4, "token", 48)))
    with pytest.raises(KvantError) as caught:
        fmt.check(64, "k")
    assert str(caught.value) == (
        "groups of 48 do not divide 32 channels\n  where: k: slice 1\n"
        "  fix: use one of: 1, 2, 4, 8, 16, 32  [group-does-not-divide]"
    )


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: slices((16, Drop()), (48, Drop())), "every slice is dropped"),
        (lambda: Slices(()), "every slice is dropped"),
        (lambda: Slices((Raw("f32"),)), r"slices are \(Raw"),
        (lambda: Slice(0, Raw("f32")), "width is 0"),
        (lambda: Slice(True, Raw("f32")), "width is True"),
        (lambda: Slice(16, MIXED), "format is Slices"),
        (lambda: Slice(16, None), "format is None"),
        (lambda: Tokens(Drop()), r"rest is Drop\(\)"),
        (lambda: Tokens(Slice(16, Raw("f32"))), "rest is Slice"),
    ],
)
def test_what_is_no_slices_is_refused(make, what):
    with pytest.raises(KvantError, match=what) as caught:
        make()
    assert caught.value.code == "bad-encoding"


def test_bits_without_a_layout_are_refused_in_a_slice_too():
    with pytest.raises(KvantError, match="no page layout holds codes of 5 bits"):
        PageLayout(64, 1, 32, slices((16, Int(5, "token", 16)), (16, Raw("f32"))))
