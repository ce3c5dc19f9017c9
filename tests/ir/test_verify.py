"""Every message of the verifier, as a whole."""

from dataclasses import replace

import pytest

from kvant.ir.errors import KvantError
from kvant.ir.graph import Graph, Op, Value
from kvant.ir.text import parse
from kvant.ir.types import CacheType, TensorType
from kvant.ir.verify import verify

HEAD = """kvant 1
graph @g
  %x : f32[B, T, 8] = input {name = x}
  %w : f32[8, 8] = param {name = w}
"""
STORE = "store = tokens(sink 0: f32, recent 0: f32, flush = group, rest: f32)"


def refused(graph: Graph | str, after: str | None = None) -> str:
    """Return the lines of what verify says, without the first."""
    with pytest.raises(KvantError) as error:
        verify(parse(graph) if isinstance(graph, str) else graph, after)
    assert error.value.code == "ill-formed-graph"
    first, _, lines = error.value.what.partition("\n")
    assert first == "@g is not well formed" + (f" after pass {after}" if after else "")
    return lines


def test_the_whole_error_names_the_pass_and_all_problems_and_the_source():
    graph = parse(
        HEAD
        + """  %a : f32[B, T, 8] = add %x %x
  %y : f32[B, T, 9] = linear %x %w  # from: y = self.w(x)
  %z : f32[B, T, 8] = linear %y %w {wide = 3}
  return %z
"""
    )
    with pytest.raises(KvantError) as error:
        verify(graph, after="block-float")
    assert str(error.value) == (
        "@g is not well formed after pass block-float\n"
        "    %a : f32[B, T, 8] = add %x %x\n"
        "x   %y : f32[B, T, 9] = linear %x %w\n"
        "    ^ the type is f32[B, T, 9], but linear gives f32[B, T, 8]\n"
        "    from: y = self.w(x)\n"
        "x   %z : f32[B, T, 8] = linear %y %w {wide = 3}\n"
        "    ^ no attribute wide; known: none\n"
        "  where: graph @g\n"
        "  fix: the pass block-float broke the graph: report it  [ill-formed-graph]"
    )


def test_without_a_pass_the_fix_is_to_correct_the_lines():
    graph = parse(HEAD + "  %y : f32[B, T, 9] = linear %x %w\n  return %y\n")
    with pytest.raises(KvantError) as error:
        verify(graph)
    assert error.value.fix == "correct the marked lines"


OP_MESSAGES = {
    "unknown operation": (
        "%y : f32[B, T, 8] = lineer %x %w",
        "no operation lineer; did you mean linear? known: add attend cache_read cache_write center"
        " gather gather_cols gather_rows hadamard hadamard_cols hadamard_rows input linear"
        " merge_heads mul param rms_norm rope scale scale_cols scale_rows slice_rows split_heads"
        " split_last spread transpose_w",
    ),
    "too few operands": (
        "%y : f32[B, T, 8] = linear %x",
        "linear takes 2 or 3 operands, got 1",
    ),
    "too many operands": ("%y : f32[B, T, 8] = add %x %x %x", "add takes 2 operands, got 3"),
    "unknown attribute": (
        "%y : f32[B, T, 8] = rms_norm %x %w {epsilon = 1e-06, eps = 1e-06}",
        "no attribute epsilon; did you mean eps? known: eps offset",
    ),
    "missing attribute": (
        "%y : f32[B, T, 8] = split_heads %x",
        "the attribute heads is missing; it must be: count",
    ),
    "attribute of the wrong kind": (
        "%y : f32[B, T, 8] = split_heads %x {heads = 1.5}",
        "the attribute heads = 1.5 must be: count",
    ),
    "a bool is no count": (
        "%y : f32[B, T, 8] = split_heads %x {heads = true}",
        "the attribute heads = True must be: count",
    ),
    "an infinite number": (
        "%y : f32[B, T, 8] = rms_norm %x %w {eps = inf}",
        "the attribute eps = inf must be: number",
    ),
    "another rope style": (
        "%y : f32[B, T, 8] = rope %x %x %x {style = interleaved}",
        "the attribute style = 'interleaved' must be: rope style (half, adjacent)",
    ),
    "a tensor where a cache is due": (
        "%y : f32[B, T, 8] = cache_read %x",
        "cache_read takes a cache, but %x is f32[B, T, 8]",
    ),
    "type rule": (
        "%y : f32[B, T, 8] = linear %w %x",
        "linear takes * C, O C or * C, O C, O, got f32[8, 8], f32[B, T, 8]:"
        " f32[B, T, 8] is not [O, C]",
    ),
    "sizes that do not fit": (
        "%y : f32[2, T, 8] = add %x %w",
        "f32[B, T, 8] and f32[8, 8] do not fit together",
    ),
    "slice outside": (
        "%y : f32[4, 8] = slice_rows %w {start = 6, stop = 10}",
        "f32[8, 8] has no rows 6 to 10",
    ),
    "split that does not add up": (
        "%y : f32[B, T, 4] = split_last %x {sizes = (3, 4)}",
        "(3, 4) does not add up to the last axis of f32[B, T, 8]",
    ),
    "wrong number of results": (
        "%y : f32[B, T, 4] = split_last %x {sizes = (4, 4)}",
        "1 results are named, but split_last gives 2",
    ),
    "odd head width under rope": (
        "%y : f32[B, 2, T, 3] = rope %odd %turn %turn",
        "rope takes B H T D, B T even, B T even or B H T D, 1 T even, 1 T even, got"
        " f32[B, 2, T, 3], f32[B, T, 3], f32[B, T, 3]: 3 is not even, or more than 3; or B is"
        " not 1",
    ),
    "hadamard of six": (
        "%y : f32[B, T, 3] = hadamard %turn",
        "hadamard takes * pow2, got f32[B, T, 3]: 3 is no power of two",
    ),
    "order that is not integer": (
        "%y : f32[B, 2, T, 3] = gather %odd %bad",
        "gather takes B repeat*H T D, int H D, got f32[B, 2, T, 3], f32[2, 3]:"
        " f32[2, 3] is not integer",
    ),
    "wrong head map": (
        "%y : f32[B, 2, T, 3] = scale %odd %bad {repeat = 2}",
        "scale takes B repeat*H T D, H D, got f32[B, 2, T, 3], f32[2, 3]: repeat*H is 2, not 4",
    ),
    "heads that do not divide": (
        "%y : f32[B, 3, T, 3] = split_heads %x {heads = 3}",
        "split_heads takes B T heads*D, got f32[B, T, 8]: heads*D is 8, not a multiple of 3",
    ),
    "a role is no tensor": (
        "%y : cache[k] = input {name = c}",
        "input gives one tensor",
    ),
    "a parameter with two types": (
        "%y : f32[9, 8] = param {name = w}",
        "the param w is f32[9, 8] here, but f32[8, 8] above",
    ),
    "defined twice": ("%w : f32[B, T, 8] = add %x %x", "%w is defined twice"),
}


@pytest.mark.parametrize("case", OP_MESSAGES)
def test_message_of_one_bad_op(case):
    line, message = OP_MESSAGES[case]
    before = "%bad : f32[2, 3] = param {name = bad}"
    more = f"""  %odd : f32[B, 2, T, 3] = input {{name = odd}}
  %turn : f32[B, T, 3] = input {{name = turn}}
  {before}
"""
    result = line.split()[0]
    found = refused(f"{HEAD}{more}  {line}\n  return {result}\n")
    shown = line.replace("eps = 1e-06}", "eps = 1e-06, offset = 0.0}")
    assert found.splitlines()[0] == f"    {before}"
    assert found.splitlines()[1].startswith("x   " + shown.split(" = ")[0] + " = ")
    assert found.splitlines()[2:] == [f"    ^ {message}"]


def test_all_problems_of_one_op_are_listed():
    found = refused(HEAD + "  %y : f32[B, T, 8] = split_heads %x %w {wide = 1}\n  return %y\n")
    assert found.splitlines()[1:] == [
        "x   %y : f32[B, T, 8] = split_heads %x %w {wide = 1}",
        "    ^ split_heads takes 1 operands, got 2",
        "    ^ no attribute wide; known: heads",
        "    ^ the attribute heads is missing; it must be: count",
    ]


def test_order_of_definition():
    graph = parse(HEAD + "  %y : f32[B, T, 8] = linear %x %w\n  return %y\n")
    x, w, y = graph.ops
    assert refused(replace(graph, ops=(x, y, w))) == (
        "    %x : f32[B, T, 8] = input {name = x}\n"
        "x   %y : f32[B, T, 8] = linear %x %w\n"
        "    ^ %w is defined later in the graph"
    )
    assert refused(replace(graph, ops=(x, y))) == (
        "    %x : f32[B, T, 8] = input {name = x}\n"
        "x   %y : f32[B, T, 8] = linear %x %w\n"
        "    ^ %w is defined nowhere"
    )
    assert refused(replace(graph, ops=(x, w))) == (
        "    %w : f32[8, 8] = param {name = w}\nx   return %y\n    ^ %y is defined nowhere"
    )
    assert refused(replace(graph, outputs=())) == (
        "    %y : f32[B, T, 8] = linear %x %w\nx   return\n    ^ nothing is returned"
    )


def test_a_use_with_another_type_and_unsorted_attributes():
    graph = parse(HEAD + "  %y : f32[B, T, 8] = rms_norm %x %x {eps = 1.0}\n  return %y\n")
    x, w, y = graph.ops
    wide = Value("x", TensorType("f32", ("B", "T", 9)))
    bad = replace(y, args=(wide, wide), attrs=y.attrs[::-1])
    assert refused(replace(graph, ops=(x, w, bad))).splitlines()[2:] == [
        "    ^ %x is used as f32[B, T, 9], but defined as f32[B, T, 8]",
        "    ^ %x is used as f32[B, T, 9], but defined as f32[B, T, 8]",
        "    ^ the attributes are not sorted",
    ]


def test_a_role_is_written_once_and_read_where_it_was_written():
    text = f"""kvant 1
graph @g
  %x : f32[B, 2, T, 4] = input {{name = x}}
  %c : cache[k] = cache_write %x {{role = k, {STORE}}}
  %d : cache[k] = cache_write %x {{role = k, {STORE}}}
  %y : f32[B, 2, S+T, 4] = cache_read %c
  return %y
"""
    found = refused(text)
    assert found.splitlines()[-1] == "    ^ cache[k] is written twice"
    graph = parse(text)
    x, c, _, y = graph.ops
    wrong = Op("mul", (x.result, x.result), (), (Value("c", CacheType("k")),))
    found = refused(replace(graph, ops=(x, wrong, y)))
    assert "^ the type is cache[k], but mul gives f32[B, 2, T, 4]" in found
    assert "^ %c was not written" in found
    verify(replace(graph, ops=(x, c, y)))


def test_a_well_formed_graph_passes():
    verify(parse(HEAD + "  %y : f32[B, T, 8] = linear %x %w\n  return %y\n"))
