"""Dense plus sparse: which channels become entries, what they give back, pages, refusals."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvant.ir.encodings import Bfp, Int, Raw, Slice, Slices, Sparse, Tokens
from kvant.ir.errors import KvantError
from kvant.ir.layouts import PageLayout, page_tokens
from kvant.ir.plan import AttentionPlan, StreamPlan

TOKEN = Int(4, "token", 16)
CHANNEL = Int(2, "channel", 16, "int")
TERMS = [
    Sparse(TOKEN, 2),
    Sparse(TOKEN, 1, limit=1.5),
    Sparse(CHANNEL, 3, limit=1.0, values="f32"),
    Sparse(Int(3, "token", 32, "none"), 5, values="bf16"),
    Sparse(Bfp(4, 8), 2),
]


def entries_of(x, term):
    """One token's entries and m, found by sorting pairs: the meaning in other words."""
    ranked = sorted(range(len(x)), key=lambda c: (-abs(x[c]), c))
    m = max(np.float32(term.limit), abs(x[ranked[term.count]]))
    return [c for c in ranked[: term.count] if abs(x[c]) > m], m


@pytest.mark.parametrize("term", TERMS, ids=str)
def test_entries_are_the_outliers_and_the_dense_part_never_sees_them(term):
    x = np.random.default_rng(0).standard_t(3, size=(2, 48, 32)).astype(np.float32)
    x[0, 5] = 0.0
    x[1, 7] = np.where(np.arange(32) % 3, 1.25, -2.5)  # equal ones go by channel
    fields = term.encode(x)
    clipped = np.empty_like(x)
    for place in np.ndindex(2, 48):
        entries, m = entries_of(x[place], term)
        index, value = fields["index"][place], fields["value"][place]
        assert index.tolist() == entries + [0] * (term.count - len(entries))
        assert not np.asarray(value[len(entries) :]).any()
        clipped[place] = np.clip(x[place], -m, m)
    dense = term.dense.encode(clipped)
    for name, array in dense.items():
        assert np.array_equal(fields[name], array), name
    assert fields.keys() == {*dense, "index", "value"}


@pytest.mark.parametrize("term", TERMS, ids=str)
def test_outliers_come_back_but_for_the_rounding_of_their_values(term):
    x = np.random.default_rng(1).standard_t(2, size=(48, 32)).astype(np.float32)
    got, dense = term.roundtrip(x), term.dense.decode(term.encode(x))
    unit = {"f16": 2.0**-11, "bf16": 2.0**-8, "f32": 2.0**-24}[term.values]
    seen = 0
    for t in range(48):
        entries, _ = entries_of(x[t], term)
        rest = np.setdiff1d(np.arange(32), entries)
        assert np.array_equal(got[t, rest], dense[t, rest])
        allowed = unit * np.abs(x[t] - dense[t])[entries] + 2.0**-25
        assert (np.abs(got[t] - x[t])[entries] <= allowed).all()
        seen += len(entries)
    assert seen > 24


def test_nothing_above_a_static_threshold_is_the_dense_format():
    x = np.random.default_rng(2).uniform(-1.0, 1.0, (32, 64))
    for dense in (TOKEN, CHANNEL, Bfp(4, 16)):
        assert np.array_equal(Sparse(dense, 2, limit=1.0).roundtrip(x), dense.roundtrip(x))
        assert not np.array_equal(Sparse(dense, 2).roundtrip(x), dense.roundtrip(x))


@pytest.mark.parametrize(
    "dense",
    [Int(4, "token", 128), Int(4, "channel", 32), Bfp(4, 128)],
    ids=["token", "channel", "bfp"],
)
def test_with_entries_outliers_cost_the_others_nothing(dense):
    """Two channels of each Gaussian vector times 40: the error is that of Gaussian vectors."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((256, 128))
    plain = ((dense.roundtrip(x) - x) ** 2).mean()
    chosen = rng.permuted(np.tile(np.arange(128), (256, 1)), axis=1)[:, :2]
    x[np.arange(256)[:, None], chosen] *= 40
    assert ((Sparse(dense, 2).roundtrip(x) - x) ** 2).mean() < 1.25 * plain
    assert ((dense.roundtrip(x) - x) ** 2).mean() > 10 * plain


def test_bytes_of_a_page_and_bits_of_a_plan():
    term = Sparse(Int(4, "token", 64), 2)
    layout = PageLayout(64, 1, 64, term)
    tail = [(f.name, f.dtype, f.shape, f.offset) for f in layout.fields[-2:]]
    assert tail == [("index", "uint8", (64, 2), 2304), ("value", "float16", (64, 2), 2432)]
    # Each entry of 64 channels costs 8 + 16 bits: 4 + 32 / 64 + 2 * 24 / 64 bits a number.
    assert layout.page_bytes * 8 / 64 / 64 == 4 + 0.5 + 0.75
    plan = StreamPlan("k", 1, 64, (), Tokens(term), 64)
    assert plan.bytes(640) == 10 * (layout.page_bytes + 8)


@st.composite
def terms(draw):
    """Any sparse term of 16 or 32 channels."""
    width = 16 * draw(st.integers(1, 2))
    if draw(st.booleans()):
        axis = draw(st.sampled_from(["token", "channel"]))
        zero = draw(st.sampled_from(["none", "int", "float"]))
        dense = Int(draw(st.sampled_from([2, 3, 4, 8])), axis, draw(st.sampled_from([1, 4])), zero)
    else:
        dense = Bfp(draw(st.sampled_from([2, 4, 8])), draw(st.sampled_from([1, 8])))
    limit = draw(st.sampled_from([0.0, 0.1, 1.0]))
    values = draw(st.sampled_from(["f16", "bf16", "f32"]))
    return width, Sparse(dense, draw(st.integers(1, 15)), limit, values)


@settings(max_examples=150, deadline=None)
@given(terms(), st.booleans(), st.integers(0, 99))
def test_entries_survive_the_page_alone_and_in_slices(drawn, sliced, seed):
    width, term = drawn
    fmt = Slices((Slice(16, Raw("bf16")), Slice(width, term))) if sliced else term
    channels = width + 16 * sliced
    layout = PageLayout(page_tokens(fmt), 2, channels, fmt)
    x = np.random.default_rng(seed).standard_t(3, size=(2, layout.tokens, channels))
    page = layout.pack(fmt.encode(x))
    assert np.array_equal(fmt.decode(layout.unpack(page)), fmt.roundtrip(x))
    part = layout.parts[-1]
    assert (part.format, part.sparse) == (term.dense, term)
    assert part.field("index").shape == (layout.tokens, term.count)


def plan_of(fmt):
    k, v = (StreamPlan(role, 2, 32, (), Tokens(fmt), 64) for role in ("k", "v"))
    return AttentionPlan(4, 0.125, None, None, (), k, v, ())


def test_json_gives_back_a_plan_and_refuses_a_spoiled_one():
    plan = plan_of(TERMS[2])
    assert AttentionPlan.from_json(json.dumps(plan.to_json())) == plan
    for key, value in {"count": 32, "limit": -1.0, "values": "f8", "dense": None}.items():
        spoiled = plan.to_json()
        spoiled["k"]["tokens"]["rest"][key] = value
        with pytest.raises(KvantError):
            AttentionPlan.from_json(spoiled)


REFUSED = {
    "dense": (
        lambda: Sparse(Raw("f16"), 1),
        "dense is Raw(dtype='f16')\n  where: sparse\n  fix: use int, bfp or lut; the other "
        "formats have no outliers to spare  [bad-encoding]",
    ),
    "count": (
        lambda: Sparse(TOKEN, 0),
        "count is 0\n  where: sparse\n  fix: use an integer of at least 1  [bad-encoding]",
    ),
    "limit": (
        lambda: Sparse(TOKEN, 1, float("inf")),
        "limit is inf\n  where: sparse\n  fix: use a number from 0.0 to 3.4e38; 0.0 takes the "
        "largest of every token  [bad-encoding]",
    ),
    "limit beyond float32": (
        lambda: Sparse(TOKEN, 1, 1e39),
        "limit is 1e+39\n  where: sparse\n  fix: use a number from 0.0 to 3.4e38; 0.0 takes the "
        "largest of every token  [bad-encoding]",
    ),
    "values": (
        lambda: Sparse(TOKEN, 1, values="f8"),
        "values is 'f8'\n  where: sparse\n  fix: use one of: bf16, f16, f32  [bad-encoding]",
    ),
    "entries": (
        lambda: Sparse(TOKEN, 16).check(16, "k"),
        "16 entries of 16 channels\n  where: k\n  fix: use fewer entries than channels, and at "
        "most 256 channels  [entries-do-not-fit]",
    ),
    "channels": (
        lambda: Sparse(TOKEN, 1).check(272, "k"),
        "1 entries of 272 channels\n  where: k\n  fix: use fewer entries than channels, and at "
        "most 256 channels  [entries-do-not-fit]",
    ),
    "value": (
        lambda: Sparse(TOKEN, 1).encode(np.where(np.arange(16) == 3, 1e6, 0.5)[None]),
        "a value of 1e+06 does not fit f16\n  where: sparse(values = f16)\n  fix: store it as bf16 "
        "or f32, or rotate or scale the channels first  [scale-overflow]",
    ),
}


@pytest.mark.parametrize(("make", "text"), REFUSED.values(), ids=REFUSED)
def test_refusals(make, text):
    with pytest.raises(KvantError) as caught:
        make()
    assert str(caught.value) == text


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("term", TERMS, ids=str)
def test_nan_and_inf_are_refused(term, bad):
    x = np.ones((48, 32))
    x[7, 3] = bad
    with pytest.raises(KvantError) as caught:
        term.encode(x)
    assert caught.value.code in ("not-finite", "scale-overflow")
