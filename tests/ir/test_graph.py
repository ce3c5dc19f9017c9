"""Types, values, graphs, and the ways to build and rebuild them."""

from dataclasses import replace

import numpy as np
import pytest

from kvant.ir.errors import KvantError, nearest
from kvant.ir.evaluate import evaluate
from kvant.ir.graph import Value
from kvant.ir.rewrite import Builder, dead_code, rewrite
from kvant.ir.text import parse, print_graph
from kvant.ir.types import CacheType, TensorType, add_sizes
from kvant.ir.verify import verify

X = TensorType("f32", ("B", "T", 8))
W = TensorType("f32", (8, 8))


def two_linears():
    b = Builder("g")
    x, w = b.input("x", X), b.param("q_proj.weight", W)
    y = b.emit("linear", x, w, loc="y = self.q_proj(x)", hint="y")
    return b.finish((b.emit("linear", y, w),))


def test_types_print_and_refuse():
    assert str(TensorType("f32", ("B", 3, "S+T", 64))) == "f32[B, 3, S+T, 64]"
    assert str(TensorType("i64", ())) == "i64[]"
    assert str(CacheType("k")) == "cache[k]"
    assert [add_sizes(*pair) for pair in ((1, 2), ("S", "T"), ("S", 0), (0, "T"), ("S", 4))] == [
        3,
        "S+T",
        "S",
        "T",
        "S+4",
    ]
    for dim in (-1, "S-T", "", "S+", True, 1.5, None):
        with pytest.raises(KvantError) as error:
            TensorType("f32", (dim,))
        assert error.value.code == "bad-type"
        assert error.value.what == f"{dim!r} is no size"
    with pytest.raises(KvantError) as error:
        TensorType("float", ())
    assert str(error.value) == (
        "no dtype 'float'\n  where: float[]\n"
        "  fix: use one of: f64 f32 f16 bf16 i64 i32 i8 u8 bool  [bad-type]"
    )


def test_a_graph_answers_who_gives_and_who_takes():
    graph = two_linears()
    _, w, y, z = graph.ops
    assert [op.result.name for op in graph.ops] == ["x", "q_proj_weight", "y", "linear"]
    assert graph.producer(y.result) is y
    assert graph.users(w.result) == (y, z)
    assert graph.find("linear") == (y, z)
    assert graph.inputs() == {"x": X}
    assert graph.params() == {"q_proj.weight": W}
    with pytest.raises(KeyError, match="nobody"):
        graph.producer(Value("nobody", X))
    with pytest.raises(KvantError) as error:
        Value("c", CacheType("k")).tensor  # noqa: B018
    assert error.value.code == "not-a-tensor"


def test_attributes_are_read_by_kind():
    op = parse("kvant 1\ngraph @g\n%x : f32[8] = input {name = x}\nreturn %x").ops[0]
    assert op.attr("name") == "x"
    assert op.attr_as("name", str) == "x"
    with pytest.raises(TypeError, match="name = 'x' is not a int"):
        op.attr_as("name", int)
    with pytest.raises(KeyError):
        op.attr("size")


def test_everything_is_frozen_and_hashable():
    graph = two_linears()
    assert hash(graph) == hash(two_linears())
    assert graph == two_linears()
    with pytest.raises(AttributeError):
        graph.ops[0].name = "param"  # type: ignore[misc]
    assert graph.ops[2] == replace(graph.ops[2], loc=None)


def test_builder_names_are_fresh_and_declarations_are_shared():
    b = Builder("g", taken=("add",))
    x = b.input("x", X)
    assert b.input("x", X) is x
    assert b.param("a.weight", W) is b.param("a.weight", W)
    names = [b.emit("add", x, x).name, b.emit("add", x, x).name, b.emit("add", x, x, hint="x").name]
    assert names == ["add_1", "add_2", "x_1"]
    with pytest.raises(KvantError) as error:
        b.param("a.weight", X)
    assert error.value.what == "a.weight is f32[8, 8], not f32[B, T, 8]"


def test_several_results():
    b = Builder("g")
    x = b.input("x", X)
    low, high = b.emit_all("split_last", x, sizes=(2, 6), hint="part")
    assert (str(low.type), str(high.type)) == ("f32[B, T, 2]", "f32[B, T, 6]")
    assert (low.name, high.name) == ("part", "part_1")
    graph = b.finish((high, low))
    verify(graph)
    assert parse(print_graph(graph)) == graph
    given = np.arange(16.0).reshape(1, 2, 8)
    (a, c), _ = evaluate(graph, {"x": given}, {})
    np.testing.assert_array_equal(np.concatenate((c, a), -1), given)
    with pytest.raises(ValueError, match="too many values"):
        graph.ops[1].result  # noqa: B018
    with pytest.raises(KvantError) as error:
        b.emit("split_last", x, sizes=(2, 6))
    assert error.value.what == "split_last gives 2 values, not one; use emit_all"

    def swap(b, op, args):
        return b.emit_all("split_last", *args, sizes=(6, 2))[::-1] if op.name[:2] == "sp" else None

    swapped = rewrite(graph, swap)
    assert [o.tensor.shape[-1] for o in swapped.outputs] == [6, 2]


def test_builder_refuses_an_op_that_does_not_fit():
    b = Builder("g")
    x = b.input("x", X)
    with pytest.raises(KvantError) as error:
        b.emit("linear", x, x, x, wide=1)
    assert str(error.value) == (
        "no attribute wide; known: none\n  where: graph @g: linear %x %x %x\n"
        "  fix: the table is kvant.ir.ops.OPS  [ill-typed-op]"
    )
    with pytest.raises(KvantError, match="declared, not inferred"):
        b.emit("param", name="w")


def test_a_rewrite_that_changes_nothing_returns_the_graph():
    graph = two_linears()
    assert rewrite(graph, lambda b, op, args: None) is graph
    assert dead_code(graph) is graph


def test_a_rewrite_replaces_keeps_names_and_locations_and_infers_types_again():
    graph = two_linears()

    def wider(b, op, args):
        return b.param("wide", TensorType("f32", (16, 8))) if op.name == "param" else None

    with pytest.raises(KvantError, match="C is 16 and 8"):
        rewrite(graph, wider)  # the second linear no longer fits

    def first(b, op, args):
        if op.result.name != "y":
            return None
        w = b.param("kvant.wide", W)
        return b.emit("add", b.emit("linear", args[0], w, loc=op.loc), args[0], hint="y")

    after = rewrite(graph, first)
    verify(after)
    assert print_graph(dead_code(after)) == (
        "kvant 1\n"
        "graph @g\n"
        "  %x : f32[B, T, 8] = input {name = x}\n"
        "  %q_proj_weight : f32[8, 8] = param {name = q_proj.weight}\n"
        "  %kvant_wide : f32[8, 8] = param {name = kvant.wide}\n"
        "  %linear_1 : f32[B, T, 8] = linear %x %kvant_wide  # from: y = self.q_proj(x)\n"
        "  %y_1 : f32[B, T, 8] = add %linear_1 %x\n"
        "  %linear : f32[B, T, 8] = linear %y_1 %q_proj_weight\n"
        "  return %linear\n"
    )
    assert graph == two_linears()


def test_a_rule_must_stand_for_every_result():
    graph = parse(
        "kvant 1\ngraph @g\n%x : f32[8] = input {name = x}\n"
        "%a : f32[2], %b : f32[6] = split_last %x {sizes = (2, 6)}\nreturn %a\n"
    )
    with pytest.raises(ValueError, match="zip"):
        rewrite(graph, lambda b, op, args: args[0] if op.name == "split_last" else None)


def test_an_op_is_dropped_by_returning_its_operand():
    graph = two_linears()
    after = rewrite(graph, lambda b, op, args: args[0] if op.name == "linear" else None)
    assert after.outputs == (graph.ops[0].result,)
    assert [op.name for op in dead_code(after).ops] == ["input"]


def test_dead_code_keeps_inputs_and_what_an_output_needs():
    b = Builder("g")
    x, unused = b.input("x", X), b.input("mask", X)
    b.emit("linear", unused, b.param("dead.weight", W))
    b.emit_all("split_last", x, sizes=(2, 6))
    low, _ = b.emit_all("split_last", x, sizes=(2, 6))
    after = dead_code(b.finish((low,)))
    assert [op.name for op in after.ops] == ["input", "input", "split_last"]
    assert dead_code(after) is after


def test_nearest_names():
    assert nearest("liner", ["linear", "add"]) == "did you mean linear? known: add linear"
    assert nearest("zzz", []) == "known: none"
