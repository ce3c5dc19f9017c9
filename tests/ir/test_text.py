"""The text form: exact print, round trip, errors with line numbers."""

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvant.ir import attrs
from kvant.ir.encodings.affine import Int
from kvant.ir.encodings.bfp import Bfp
from kvant.ir.encodings.lut import LLOYD, NF4, Lut
from kvant.ir.encodings.raw import Raw
from kvant.ir.encodings.slices import Drop, Slice, Slices
from kvant.ir.encodings.sparse import Sparse
from kvant.ir.encodings.tokens import Tokens
from kvant.ir.errors import KvantError
from kvant.ir.graph import Graph, Op, Value
from kvant.ir.maps import Gather, Hadamard, Scale
from kvant.ir.ops import OPS, complete
from kvant.ir.text import parse, print_attr, print_graph
from kvant.ir.types import DTYPES, CacheType, TensorType

TEXT = """kvant 1
graph @attention
  %x : f32[B, 3, T, 64] = input {name = x}
  %w : f32[64] = param {name = k_norm.weight}
  %k : f32[B, 3, T, 64] = rms_norm %x %w {eps = 1e-06, offset = 0.0}  # from: k = norm(k)
  %kh : f32[B, 3, T, 64] = hadamard %k
  %kc : cache[k] = cache_write %kh {basis = (hadamard(64),), role = k, store = tokens(sink 4: bf16,\
 recent 128: bf16, flush = group, rest: int(bits = 4, axis = channel, group = 32, zero = float,\
 params = f16, clip = 1.0))}
  %kr : f32[B, 3, S+T, 64] = cache_read %kc
  %lo : f32[B, 3, S+T, 16], %hi : f32[B, 3, S+T, 48] = split_last %kr {sizes = (16, 48)}
  return %lo %hi
"""


def test_text_is_what_it_says():
    graph = parse(TEXT)
    assert print_graph(graph) == TEXT
    assert graph.name == "attention"
    assert [op.name for op in graph.ops][2:4] == ["rms_norm", "hadamard"]
    assert graph.ops[2].loc == "k = norm(k)"
    assert graph.ops[2].attr("eps") == 1e-6
    assert graph.ops[4].attr("store") == Tokens(
        Int(4, "channel", 32), sink=4, recent=128, raw=Raw("bf16")
    )
    assert [r.name for r in graph.ops[-1].results] == ["lo", "hi"]
    assert graph.ops[-2].result.type == TensorType("f32", ("B", 3, "S+T", 64))


def test_comments_blank_lines_defaults_and_record_order_are_free():
    text = """
# a layer
kvant 1   # version
graph @g  # name

   %x : f32[B,T,8]=input{name="x"}   # the hidden states
%w : f32[8] = param {name = w}
%y : f32[B, T, 8] = rms_norm %x %w {eps = 1}
return %y
"""
    graph = parse(text)
    assert graph.ops[2].attrs == (("eps", 1.0), ("offset", 0.0))
    assert [op.loc for op in graph.ops] == [None, None, None]
    assert parse(print_graph(graph)) == graph


ATTRS = {
    "true": True,
    "none": None,
    "-3": -3,
    "-1e-05": -1e-5,
    "inf": float("inf"),
    "-inf": float("-inf"),
    "0.1": 0.1,
    "q_proj.weight": "q_proj.weight",
    '"true"': "true",
    '"none"': "none",
    '"inf"': "inf",
    '"two words"': "two words",
    '""': "",
    '"a\\n\\"b\\" # c"': 'a\n"b" # c',
    "()": (),
    "(1,)": (1,),
    "(1, (a, 2.0))": (1, ("a", 2.0)),
    "raw(bf16)": Raw("bf16"),
    "bfp(mantissa = 4, block = 32)": Bfp(4, 32),
    "lut(bits = 2, group = 64, table = (-20, -6, 6, 20), sigmas = none, params = f16)": Lut(
        2, 64, (-20, -6, 6, 20)
    ),
    "lut(bits = 2, group = 64, table = (0, 1, 2, 3), sigmas = 2.5, params = bf16)": Lut(
        2, 64, (0, 1, 2, 3), 2.5, "bf16"
    ),
    "gather(kvant.k_order)": Gather("kvant.k_order"),
    "scale(values = kvant.k_smooth, inverse = true)": Scale("kvant.k_smooth", True),
    "int(bits = 2, axis = token, group = 64, zero = none, params = bf16, clip = 0.9)": Int(
        2, "token", 64, "none", "bf16", 0.9
    ),
    "tokens(sink 0: f32, recent 32: f32, flush = block, rest: bfp(mantissa = 8, block = 16))": (
        Tokens(Bfp(8, 16), recent=32, flush="block")
    ),
    "slices((slice(width = 16, format = drop()), slice(width = 16, format = raw(f16))))": Slices(
        (Slice(16, Drop()), Slice(16, Raw("f16")))
    ),
    "sparse(dense = bfp(mantissa = 4, block = 16), count = 2, limit = 1.0, values = f16)": Sparse(
        Bfp(4, 16), 2, 1.0
    ),
    "tokens(sink 0: f16, recent 0: f16, flush = group, rest: bf16)": Tokens(
        Raw("bf16"), raw=Raw("f16")
    ),
}


def parse_attr(text: str) -> object:
    return (
        parse(f"kvant 1\ngraph @g\n%x : f32[] = input {{name = {text}}}\nreturn %x\n")
        .ops[0]
        .attr("name")
    )


def test_every_record_has_a_tag():
    assert sorted(map(str, attrs.ATTRS.values())) == sorted(map(str, get_args(attrs.Record)))


@pytest.mark.parametrize("text", ATTRS)
def test_attribute_text(text):
    assert print_attr(ATTRS[text]) == text
    assert parse_attr(text) == ATTRS[text]
    assert type(parse_attr(text)) is type(ATTRS[text])


def test_defaults_of_records_may_be_left_out():
    assert parse_attr("tokens(rest: int(bits = 4, axis = token, group = 8))") == Tokens(
        Int(4, "token", 8)
    )


ERRORS = {
    "kvant 2\ngraph @g\nreturn": (1, "expected kvant 1"),
    "": (1, "expected kvant 1"),
    "kvant 1\ngraph g\nreturn": (2, "expected graph @name"),
    "kvant 1\n": (2, "expected graph @name"),
    "kvant 1\ngraph @g\n": (3, "the text ends without return"),
    "kvant 1\ngraph @g\nreturn\n\nreturn": (5, "something follows return"),
    "kvant 1\ngraph @g\nreturn %y": (3, "%y is not defined before this line"),
    "kvant 1\ngraph @g\nreturn x": (3, "expected end, found x"),
}
LINE_ERRORS = {
    "%y : f32[B, T] = add %x %z": "%z is not defined before this line",
    "%y : f31[B, T] = add %x %x": "no dtype 'f31'",
    "%y : f32[B-1, T] = add %x %x": "'B-1' is no size",
    "%y : f32[B T] = add %x %x": "expected ,, found T",
    "%y : f32 = add %x %x": "expected [, found =",
    "y : f32[B] = add %x %x": "expected value, found y",
    "%y : f32[B, T] = add %x %x {": "expected word, found the end of the line",
    "%y : f32[B, T] = add %x %x {a = 1": "expected ,, found the end of the line",
    "%y : f32[B, T] = add %x %x {a = 1 b = 2}": "expected ,, found b",
    "%y : f32[B, T] = add %x %x {a = 1, a = 2}": "an attribute is given twice",
    "%y : f32[B, T] = add %x %x {a = }": "expected number or string or word or (, found }",
    "%y : f32[B, T] = add %x %x {a = ?}": "cannot read '?}'",
    "%y : f32[B, T] = add %x %x {a = 'q'}": "cannot read \"'q'}\"",
    '%y : f32[B, T] = add %x %x {a = "\\q"}': 'cannot read "\\q"',
    "%y : f32[B, T] = add %x %x {} more": "expected end, found more",
    "%y : f32[B, T] = add %x end": "expected end, found end",
    "%y : f32[B, T] = add %x %x {a = hadamrd(64)}": (
        "no attribute hadamrd(...); did you mean hadamard? known: bfp drop gather hadamard int lut"
        " raw scale slice slices sparse tokens"
    ),
    "%y : f32[B, T] = add %x %x {a = hadamard(63)}": (
        "a Hadamard transform of size 63 does not exist here"
    ),
    "%y : f32[B, T] = add %x %x {a = bfp(mantissa = 4)}": "bfp lacks block",
    "%y : f32[B, T] = add %x %x {a = bfp(mantisa = 4)}": (
        "no field mantisa here; did you mean mantissa? known: block mantissa"
    ),
    "%y : f32[B, T] = add %x %x {a = bfp(block = 4, block = 4)}": (
        "no field block here; did you mean block? known: block mantissa"
    ),
    "%y : f32[B, T] = add %x %x {a = tokens(sink 4: f32)}": "tokens lacks rest",
    "%y : f32[B, T] = add %x %x {a = tokens(sink 4: f32, recent 4: f16, rest: f32)}": (
        "sink and recent have two formats"
    ),
    "%y : f32[B, T] = add %x %x {a = tokens(sink 1.5: f32, rest: f32)}": "sink is 1.5",
}


@pytest.mark.parametrize("text", ERRORS)
def test_errors_of_the_frame(text):
    number, what = ERRORS[text]
    with pytest.raises(KvantError) as error:
        parse(text)
    assert error.value.code == "ir-syntax"
    assert error.value.what == what
    assert error.value.where.startswith(f"line {number}: ")


@pytest.mark.parametrize("line", LINE_ERRORS)
def test_errors_of_a_line(line):
    with pytest.raises(KvantError) as error:
        parse(f"kvant 1\n\ngraph @g\n  %x : f32[B, T] = input {{name = x}}\n  {line}\nreturn %x")
    assert error.value.code == "ir-syntax"
    assert error.value.what.startswith(LINE_ERRORS[line])
    assert error.value.where == f"line 5: {line}"


def test_a_whole_error():
    with pytest.raises(KvantError) as error:
        parse("kvant 1\ngraph @g\n  %q : f32[B] = input {name = q}\n  return %k  # done\n")
    assert str(error.value) == (
        "%k is not defined before this line\n"
        "  where: line 4: return %k\n"
        "  fix: define it on an earlier line; known: q  [ir-syntax]"
    )


NAMES = st.text("abAB_9", min_size=1, max_size=6).filter(lambda name: not name[0].isdigit())
SIZES = st.one_of(st.integers(0, 10**6), st.sampled_from(["B", "T", "S", "S+T", "S+T+4"]))
TYPES = st.one_of(
    st.builds(TensorType, st.sampled_from(DTYPES), st.lists(SIZES, max_size=4).map(tuple)),
    st.builds(CacheType, st.sampled_from(["k", "v", "latent"])),
)
RAWS = st.builds(Raw, st.sampled_from(["bf16", "f16", "f32"]))
INTS = st.builds(
    Int,
    st.integers(1, 8),
    st.sampled_from(["token", "channel"]),
    st.integers(1, 128),
    st.sampled_from(["int", "float"]),
    st.sampled_from(["f16", "bf16", "f32"]),
    st.floats(0.5, 1.0),
)
LUTS = st.sampled_from([Lut(4, 16, NF4, params="bf16"), Lut(3, 8, *LLOYD[3])])
PLAIN = st.one_of(RAWS, INTS, LUTS, st.just(Int(4, "token", 8, "none")), st.just(Bfp(4, 16)))
SLICES = st.lists(st.builds(Slice, st.integers(1, 64), PLAIN | st.just(Drop())), max_size=3).map(
    lambda some: Slices((*some, Slice(16, Raw("f32"))))
)
FORMATS = st.one_of(PLAIN, SLICES)
RECORDS = st.one_of(
    FORMATS,
    st.builds(Tokens, FORMATS, st.integers(0, 9), st.integers(0, 99), raw=RAWS),
    st.builds(Hadamard, st.sampled_from([1, 2, 64])),
    st.builds(Gather, st.text(min_size=1)),
    st.builds(Scale, st.text(min_size=1), st.booleans()),
)
SCALARS = st.one_of(
    st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.none(), NAMES, RECORDS
)
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=3).map(tuple), max_leaves=6)


@st.composite
def graphs(draw):
    """Return any graph that can be written: known and unknown ops, well formed or not."""
    values: list[Value] = []
    ops = []
    for place in range(draw(st.integers(0, 6))):
        args = tuple(
            draw(st.sampled_from(values)) for _ in range(draw(st.integers(0, 3))) if values
        )
        results = tuple(Value(f"v{place}_{i}", draw(TYPES)) for i in range(draw(st.integers(1, 3))))
        name = draw(st.one_of(st.sampled_from(sorted(OPS)), NAMES))
        attrs = complete(name, draw(st.dictionaries(NAMES, VALUES, max_size=3)))
        ops.append(Op(name, args, attrs, results, draw(st.none() | st.text())))
        values += results
    outputs = draw(st.lists(st.sampled_from(values), max_size=3)) if values else []
    return Graph(draw(NAMES), tuple(ops), tuple(outputs))


@settings(max_examples=150, deadline=None)
@given(graphs())
def test_parse_undoes_print(graph):
    text = print_graph(graph)
    assert parse(text) == graph
    assert print_graph(parse(text)) == text


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_text_is_refused_or_read_but_never_breaks(data):
    at = data.draw(st.integers(0, len(TEXT)))
    end = data.draw(st.integers(at, min(len(TEXT), at + 6)))
    text = TEXT[:at] + data.draw(st.text('%{}()[],=:+-.#"\n 01eaf32kint', max_size=4)) + TEXT[end:]
    code = "ir-syntax"
    try:
        parse(text)
    except KvantError as error:
        code = error.code
    assert code == "ir-syntax"


@pytest.mark.parametrize("seed", range(20))
def test_random_layers_round_trip_with_their_locations(random_attention_graph, seed):
    graph, *_ = random_attention_graph(np.random.default_rng(seed))
    again = parse(print_graph(graph))
    assert again == graph
    assert [op.loc for op in again.ops] == [op.loc for op in graph.ops]
    assert any(op.loc for op in graph.ops)


def test_the_comparison_sees_a_difference():
    graph = parse(TEXT)
    norm = graph.ops[2]
    other = replace(norm, attrs=(("eps", 1e-5), ("offset", 0.0)))
    assert replace(graph, ops=(*graph.ops[:2], other, *graph.ops[3:])) != graph
    assert replace(graph, ops=(*graph.ops[:2], replace(norm, loc="x"), *graph.ops[3:])) == graph
