"""Plans: read off a graph, byte accounting by hand, JSON round trip, refusals."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvant.ir.encodings import Bfp, Int, Raw, Sparse, Tokens
from kvant.ir.errors import KvantError
from kvant.ir.maps import Gather, Hadamard, Scale
from kvant.ir.plan import AttentionPlan, StreamPlan
from kvant.ir.plan_from_graph import plan_from_graph
from kvant.ir.rewrite import Builder
from kvant.ir.types import TensorType

F32 = Tokens(Raw("f32"))
KIVI_K = Tokens(Int(2, "channel", 32), recent=128, flush="block")


def graph_of(
    *,
    k_maps=(),
    q_maps=(),
    out_maps=(),
    basis=None,
    k_store=KIVI_K,
    read_map=False,
    causal=True,
    repeat=3,
    sinks=None,
):
    """One site with q, k, v as inputs: 6 query heads, 2 KV heads, 16 and 8 channels."""
    b = Builder("site")

    def heads(name, count, width):
        return b.input(name, TensorType("f32", ("B", count, "T", width)))

    def mapped(x, maps, repeat, width):
        for m in maps:
            if isinstance(m, Hadamard):
                x = b.emit("hadamard", x)
            elif isinstance(m, Gather):
                c = b.param(m.order, TensorType("i64", (2, width)))
                x = b.emit("gather", x, c, repeat=repeat)
            else:
                c = b.param(m.values, TensorType("f32", (2, width)))
                x = b.emit("scale", x, c, repeat=repeat, inverse=m.inverse)
        return x

    q = mapped(heads("q", 6, 16), q_maps, repeat, 16)
    k = mapped(heads("k", 2, 16), k_maps, 1, 16)
    basis = tuple(k_maps) if basis is None else basis
    k = b.emit("cache_read", b.emit("cache_write", k, basis=basis, role="k", store=k_store))
    k = b.emit("hadamard", k) if read_map else k
    v = b.emit("cache_write", heads("v", 2, 8), role="v", store=F32)
    v = b.emit("cache_read", v)
    made = {None: (), "input": (b.input,), "param": (b.param,)}[sinks]
    s = [make("sinks", TensorType("f32", (6,))) for make in made]
    y = b.emit("attend", q, k, v, *s, scale=0.25, causal=causal, softcap=30.0, window=99)
    y = mapped(y, out_maps, 3, 8)
    return b.finish([b.emit("merge_heads", y)])


# From a graph


def test_the_plan_of_a_graph_without_maps():
    assert plan_from_graph(graph_of()) == AttentionPlan(
        q_heads=6,
        scale=0.25,
        softcap=30.0,
        window=99,
        q_maps=(),
        k=StreamPlan("k", 2, 16, (), KIVI_K, 64),
        v=StreamPlan("v", 2, 8, (), F32, 64),
        out_maps=(),
    )


def test_sinks_are_the_parameter_that_attend_reads():
    assert plan_from_graph(graph_of(sinks="param")).sinks == "sinks"
    assert plan_from_graph(graph_of()).sinks is None


def test_maps_are_read_in_the_order_in_which_they_are_applied():
    k_maps = (Hadamard(16), Gather("kvant.k_order"), Scale("kvant.k_scale"))
    q_maps = (Hadamard(16), Gather("kvant.k_order"), Scale("kvant.k_scale", inverse=True))
    out_maps = (Scale("kvant.v_scale"), Hadamard(8))
    plan = plan_from_graph(graph_of(k_maps=k_maps, q_maps=q_maps, out_maps=out_maps))
    assert (plan.k.maps, plan.q_maps, plan.out_maps) == (k_maps, q_maps, out_maps)
    assert plan.group == 3


def test_folded_maps_stand_in_the_basis_before_the_online_ones():
    basis = (Scale("kvant.k_smooth"), Hadamard(16))
    plan = plan_from_graph(graph_of(k_maps=(Hadamard(16),), basis=basis))
    assert plan.k.maps == (Hadamard(16),)


@pytest.mark.parametrize("basis", [(), (Hadamard(16), Gather("o")), (Gather("o"),)])
def test_a_basis_without_the_online_maps_is_refused(basis):
    with pytest.raises(KvantError) as caught:
        plan_from_graph(graph_of(k_maps=(Hadamard(16),), basis=basis))
    assert caught.value.code == "basis-disagrees"


def test_pages_hold_whole_groups():
    graph = graph_of(k_store=Tokens(Int(4, "channel", 128)))
    assert plan_from_graph(graph).k.page_tokens == 128


@pytest.mark.parametrize(
    ("graph", "what"),
    [
        (graph_of(read_map=True), "hadamard between cache_read and attend, on k"),
        (graph_of(causal=False), "attention that is not causal"),
        (graph_of(sinks="input"), "sinks made by input"),
    ],
)
def test_a_graph_that_the_runtime_cannot_serve_is_refused(graph, what):
    with pytest.raises(KvantError) as caught:
        plan_from_graph(graph)
    assert caught.value.code == "unsupported-attention"
    assert caught.value.what == what


def test_a_graph_without_attention_is_refused():
    b = Builder("empty")
    x = b.input("x", TensorType("f32", ("B", 2, "T", 8)))
    with pytest.raises(KvantError) as caught:
        plan_from_graph(b.finish([b.emit("merge_heads", x)]))
    assert str(caught.value) == (
        "0 attend operations\n  where: graph @empty\n"
        "  fix: pass a graph with exactly one  [no-attention-site]"
    )


# Byte accounting


def stream(tokens, heads=1, channels=128, page=None):
    return StreamPlan("k", heads, channels, (), tokens, page or 64)


@pytest.mark.parametrize(
    ("fmt", "bits"),
    [
        (Int(4, "token", 128), 4.25),
        (Int(4, "token", 32), 5.0),
        (Int(3, "token", 128), 3.25),
        (Int(2, "token", 128), 2.25),
        (Int(2, "token", 32), 3.0),
        (Int(2, "channel", 32), 3.0),
        (Int(4, "channel", 64), 4.5),
        (Int(8, "token", 128, "none"), 8.125),
        (Bfp(4, 128), 4.0625),
        (Sparse(Int(4, "token", 128), 2), 4.625),
        (Bfp(4, 64), 4.125),
        (Bfp(4, 32), 4.25),
        (Bfp(8, 64), 8.125),
        (Raw("bf16"), 16.0),
    ],
    ids=str,
)
def test_full_pages_cost_the_published_bits_and_their_table(fmt, bits):
    plan = stream(Tokens(fmt), heads=3)
    table = 8 * 8 / (64 * 3 * 128)
    assert plan.bits_per_element(64 * 5) == pytest.approx(bits + table, abs=1e-12)


def test_bytes_by_hand():
    tokens = Tokens(Int(4, "token", 16), sink=4, recent=8, raw=Raw("bf16"))
    plan = stream(tokens, heads=2, channels=32)
    page = 2 * (64 * 16 + 64 * 2 * 2 + 64 * 2 * 2) + 8
    token = 2 * 32 * 2
    cases = {0: 0, 3: 3 * token, 12: 12 * token, 13: 12 * token + page, 76: 12 * token + page}
    cases |= {77: 12 * token + 2 * page}
    assert {n: plan.bytes(n) for n in cases} == cases


def test_a_block_window_counts_what_is_left_of_it():
    plan = stream(KIVI_K)
    page = plan.page_layout().page_bytes + 8
    cases = {127: 127 * 512, 128: 2 * page, 129: 2 * page + 512, 256: 4 * page}
    assert {n: plan.bytes(n) for n in cases} == cases


@pytest.mark.parametrize(
    ("tokens", "window", "held"),
    [
        (F32, None, {0: 0, 10**6: 0}),
        # A page goes when it is wholly older than the window of the next token by one page more.
        (F32, 1, {127: 0, 128: 64, 191: 64, 192: 128}),
        (F32, 65, {191: 0, 192: 64, 10**6: 10**6 - 128}),
        (Tokens(Int(4, "token", 16), sink=5), 10, {5 + 136: 5, 5 + 137: 69}),
        # What is not encoded yet is in no page.
        (Tokens(Int(4, "token", 16), recent=300), 10, {300: 0, 363: 0, 364: 64}),
    ],
)
def test_pages_are_held_from(tokens, window, held):
    plan = stream(tokens)
    assert {n: plan.held_from(n, window) for n in held} == held


def test_a_ring_is_counted_as_long_as_it_is():
    plan = stream(Tokens(Raw("bf16"), raw=Raw("bf16")))
    page = 64 * 128 * 2 + 8
    cases = {64: 1, 191: 3, 192: 2, 256: 2, 257: 3, 10**6: 2}
    assert {n: plan.bytes(n, 65) // page for n in cases} == cases
    whole = AttentionPlan(3, 0.1, None, 65, (), plan, StreamPlan("v", 1, 64, (), F32, 64), ())
    assert whole.bytes(192) == plan.bytes(192, 65) + 2 * (64 * 64 * 4 + 8)
    assert plan.bits_per_element(10**6, 65) == 8 * 2 * page / (10**6 * 128)


def test_an_empty_cache_has_no_bits():
    assert stream(KIVI_K).bits_per_element(0) == 0.0


def test_the_allocated_page_is_what_is_counted():
    plan = stream(Tokens(Int(3, "channel", 32)), heads=2, channels=64)
    layout = plan.page_layout()
    x = np.random.default_rng(0).standard_normal((2, 64, 64))
    assert layout.pack(plan.tokens.rest.encode(x)).nbytes + 8 == plan.bytes(64)


# JSON

formats = st.one_of(
    st.builds(Raw, st.sampled_from(["bf16", "f16", "f32"])),
    st.builds(
        Int,
        st.integers(2, 8),
        st.sampled_from(["token", "channel"]),
        st.sampled_from([1, 2, 4, 8]),
        st.sampled_from(["none", "int", "float"]),
        st.sampled_from(["f16", "bf16", "f32"]),
        st.floats(0.25, 1.0),
    ),
    st.builds(Bfp, st.integers(2, 8), st.sampled_from([1, 2, 4, 8])),
    st.builds(
        Sparse,
        st.builds(Bfp, st.integers(2, 8), st.sampled_from([1, 2, 4, 8])),
        st.integers(1, 7),
        st.floats(0.0, 9.0),
        st.sampled_from(["f16", "bf16", "f32"]),
    ),
)
maps = st.lists(
    st.sampled_from([Hadamard(8), Gather("kvant.o"), Scale("kvant.s"), Scale("kvant.s", True)]),
    max_size=3,
).map(tuple)
streams = st.builds(
    lambda fmt, sink, recent, m: (m, Tokens(fmt, sink, recent)),
    formats,
    st.integers(0, 9),
    st.integers(0, 300),
    maps,
)


@settings(max_examples=100, deadline=None)
@given(streams, streams, maps, maps, st.floats(1e-3, 9.0), st.none() | st.floats(1.0, 50.0))
def test_json_gives_back_the_plan(k, v, q_maps, out_maps, scale, softcap):
    plan = AttentionPlan(
        q_heads=6,
        scale=scale,
        softcap=softcap,
        window=None if softcap else 128,
        q_maps=q_maps,
        k=StreamPlan("k", 2, 8, *k, 64),
        v=StreamPlan("v", 2, 8, *v, 64),
        out_maps=out_maps,
        sinks="sinks" if softcap else None,
    )
    text = json.dumps(plan.to_json())
    assert AttentionPlan.from_json(text) == plan
    assert AttentionPlan.from_json(json.loads(text)) == plan


def plain():
    return plan_from_graph(graph_of(k_maps=(Hadamard(16),))).to_json()


def test_the_json_of_a_stream():
    assert plain()["k"] == {
        "kind": "stream",
        "role": "k",
        "heads": 2,
        "channels": 16,
        "maps": [{"kind": "hadamard", "size": 16}],
        "tokens": {
            "kind": "tokens",
            "rest": {
                "kind": "int",
                "bits": 2,
                "axis": "channel",
                "group": 32,
                "zero": "float",
                "params": "f16",
                "clip": 1.0,
            },
            "sink": 0,
            "recent": 128,
            "flush": "block",
            "raw": {"kind": "raw", "dtype": "f32"},
        },
        "page_tokens": 64,
    }


SPOILS = {
    "unknown key": lambda p: p.update(threads=2),
    "unknown nested key": lambda p: p["k"]["tokens"]["rest"].update(bias=1),
    "missing key": lambda p: p.pop("window"),
    "unknown kind": lambda p: p["k"]["maps"].append({"kind": "shift"}),
    "no kind": lambda p: p["k"].pop("kind"),
    "kind is a list": lambda p: p["k"].update(kind=["stream"]),
    "a stream is a format": lambda p: p.update(k={"kind": "raw", "dtype": "f32"}),
    "a map is a format": lambda p: p.update(q_maps=[{"kind": "raw", "dtype": "f32"}]),
    "maps are a string": lambda p: p.update(q_maps="hadamard"),
    "scale is text": lambda p: p.update(scale="0.25"),
    "scale is not finite": lambda p: p.update(scale=float("inf")),
    "bits are text": lambda p: p["k"]["tokens"]["rest"].update(bits="4"),
    "bits are true": lambda p: p["k"]["tokens"]["rest"].update(bits=True),
    "heads do not divide": lambda p: p.update(q_heads=7),
    "roles are swapped": lambda p: p.update(k=p["v"], v=p["k"]),
    "a window of nothing": lambda p: p.update(window=0),
    "sinks without a name": lambda p: p.update(sinks=""),
    "sinks are a number": lambda p: p.update(sinks=1.0),
    "another compute": lambda p: p.update(compute="int8"),
    "a map of another width": lambda p: p["k"]["maps"][0].update(size=8),
    "a page inside a group": lambda p: p["k"].update(page_tokens=48),
}


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
def test_a_spoiled_plan_is_refused(spoil):
    plan = copy.deepcopy(plain())
    AttentionPlan.from_json(plan)
    spoil(plan)
    with pytest.raises(KvantError):
        AttentionPlan.from_json(plan)


def test_an_unknown_key_is_named_with_its_place():
    plan = plain()
    plan["k"]["tokens"]["recnt"] = plan["k"]["tokens"].pop("recent")
    with pytest.raises(KvantError) as caught:
        AttentionPlan.from_json(plan)
    assert str(caught.value) == (
        "tokens: unknown keys ['recnt'], missing keys ['recent']\n  where: plan.json.k.tokens\n"
        "  fix: compile the artifact again; this file is written by kvant alone  [bad-plan]"
    )


@pytest.mark.parametrize(
    "value", ["{", "[]", "3", "null", b"\xff", {"kind": "raw", "dtype": "f32"}]
)
def test_what_is_no_plan_is_refused(value):
    with pytest.raises(KvantError) as caught:
        AttentionPlan.from_json(value)
    assert caught.value.code == "bad-plan"


# Integer arithmetic


@pytest.mark.parametrize(
    ("fmt", "query_bits"),
    [
        (Int(2, "token", 8), 8),
        (Int(3, "token", 8), 8),
        (Int(4, "token", 8), 8),
        (Int(8, "token", 8), 16),
        (Bfp(4, 8), 8),
        (Bfp(8, 8), 16),
        (Int(4, "channel", 32), None),
    ],
)
def test_integer_compute_rounds_queries_over_scales_of_tokens(fmt, query_bits):
    store = Tokens(fmt)
    plan = plan_from_graph(graph_of(k_store=store), "int")
    assert plan.query_bits == query_bits
    assert plan_from_graph(graph_of(k_store=store)).query_bits is None


def test_integer_compute_without_codes_is_refused():
    plan = plan_from_graph(graph_of())
    k, v = (replace(stream, tokens=Tokens(Raw("f32"))) for stream in (plan.k, plan.v))
    coded = replace(plan.v, tokens=Tokens(Int(4, "token", 8)))
    assert replace(plan, k=k, v=coded, compute="int").query_bits is None
    with pytest.raises(KvantError, match="store keys or values as int, bfp or lut") as caught:
        replace(plan, k=k, v=v, compute="int")
    assert caught.value.code == "integer-compute"
