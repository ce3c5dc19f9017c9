"""Weight edits: listed from the graph, written as JSON, applied to arrays."""

import json

import numpy as np
import pytest

from kvant.ir.errors import KvantError
from kvant.ir.rewrite import Builder
from kvant.ir.types import TensorType
from kvant.ir.weight_edits import WeightOp, apply_weight_edits, weight_edits
from kvant.passes import PASSES


def _records(graph):
    return {
        record["parameter"]: record["ops"]
        for record in (edit.to_json("layer.", 3) for edit in weight_edits(graph))
    }


def test_edits_of_a_recipe(kit):
    graph, _ = kit.apply_passes(
        kit.draw(kit.Config(group=3), 0), ["smooth-k", "sort-k", "hadamard-v"]
    )
    records = json.loads(json.dumps(_records(graph)))
    smooth = {"op": "scale_rows", "constant": "layers.3.kvant.k_smooth"}
    of_q = smooth | {"heads": 6, "repeat": 3, "inverse": False}
    of_k = smooth | {"heads": 2, "repeat": 1, "inverse": True}
    plain = {"constant": None, "repeat": 1, "inverse": False}
    rows, cols = ({"op": f"hadamard_{side}"} | plain for side in ("rows", "cols"))
    assert records == {
        "layer.q_proj.weight": [of_q],
        "layer.q_proj.bias": [of_q],
        "layer.k_proj.weight": [of_k],
        "layer.k_proj.bias": [of_k],
        "layer.v_proj.weight": [rows | {"heads": 2}],
        "layer.v_proj.bias": [rows | {"heads": 2}],
        "layer.o_proj.weight": [cols | {"heads": 6}],
    }


def test_edits_are_in_order_of_application(kit):
    graph, params = kit.apply_passes(kit.draw(kit.Config(), 0), ["sort-v", "hadamard-v"])
    (edit,) = [e for e in weight_edits(graph) if e.parameter == "v_proj.weight"]
    assert [op.op for op in edit.ops] == ["gather_rows", "hadamard_rows"]
    weight = params["v_proj.weight"]
    right = apply_weight_edits(edit.ops, weight, params)
    assert not np.allclose(right, apply_weight_edits(edit.ops[::-1], weight, params))


def test_an_untouched_graph_has_no_edits(kit):
    assert weight_edits(kit.build(kit.Config())) == []
    assert weight_edits(PASSES["sort-k"].run(kit.build(kit.Config()))) == []


def test_slices_of_a_fused_weight_are_edited_in_place(kit):
    case = kit.draw(kit.Config(fused=True, bias=False, value_width=16), 0)
    graph, params = kit.apply_passes(case, ["hadamard-v"])
    (edit,) = [e for e in weight_edits(graph) if e.parameter == "qkv_proj.weight"]
    (record,) = edit.to_json()["ops"]
    plain = {"constant": None, "repeat": 1, "inverse": False}
    assert record == plain | {"op": "hadamard_rows", "heads": 2, "rows": [96, 128]}
    before = params["qkv_proj.weight"]
    after = apply_weight_edits([record], before, {})
    assert np.array_equal(after[:96], before[:96])
    assert not np.allclose(after[96:], before[96:])
    whole = {key: value for key, value in record.items() if key != "rows"}
    assert after[96:] == pytest.approx(apply_weight_edits([whole], before[96:], {}))


def test_a_fused_weight_has_one_edit_with_its_slices(kit):
    case = kit.draw(kit.Config(fused=True, bias=False), 0)
    graph, _ = kit.apply_passes(case, ["smooth-k", "hadamard-v"])
    (ops,) = [e.ops for e in weight_edits(graph) if e.parameter == "qkv_proj.weight"]
    assert [(op.op, op.rows) for op in ops] == [
        ("scale_rows", (0, 64)),
        ("scale_rows", (64, 96)),
        ("hadamard_rows", (96, 112)),
    ]


def test_a_slice_of_a_slice_and_of_a_transpose():
    b = Builder("attention")
    x = b.input("x", TensorType("f32", ("B", "T", 8)))
    fused = b.param("c_attn.weight", TensorType("f32", (8, 24)))
    part = b.emit("slice_rows", b.emit("transpose_w", fused), start=8, stop=24)
    last = b.emit("slice_rows", part, start=8, stop=16)
    y = b.emit("linear", x, b.emit("hadamard_rows", last, heads=2))
    other = b.emit("linear", x, b.emit("slice_rows", part, start=0, stop=8))
    (edit,) = weight_edits(b.finish((y, other)))
    assert edit.ops == (WeightOp("hadamard_rows", heads=2, transposed=True, rows=(16, 24)),)
    weight = np.random.default_rng(0).normal(size=(8, 24))
    after = apply_weight_edits([edit.ops[0].to_json()], weight, {})
    assert np.array_equal(after[:, :16], weight[:, :16])
    want = apply_weight_edits([WeightOp("hadamard_rows", heads=2)], weight[:, 16:].T, {}).T
    assert after[:, 16:] == pytest.approx(want)
    overlapping = b.emit("linear", x, b.emit("slice_rows", part, start=4, stop=12))
    with pytest.raises(KvantError) as refusal:
        weight_edits(b.finish((y, overlapping)))
    assert refusal.value.code == "shared-weight"


def test_a_transposed_weight_is_edited_in_place():
    weight, scale = np.arange(24.0).reshape(6, 4), np.array([[2.0, 3.0], [5.0, 7.0]])
    op = WeightOp("scale_rows", "s", heads=2, transposed=True)
    after = apply_weight_edits([op], weight, {"s": scale})
    assert after == pytest.approx(weight * scale.reshape(-1))


def test_json_round_trip():
    op = WeightOp("scale_rows", "kvant.k_smooth", heads=4, repeat=2, inverse=True)
    assert WeightOp.from_json(op.to_json()) == op
    assert set(op.to_json()) == {"op", "heads", "constant", "repeat", "inverse"}
    view = WeightOp("hadamard_rows", heads=2, transposed=True, rows=(2, 6))
    assert WeightOp.from_json(view.to_json()) == view


def test_a_norm_weight_becomes_one_row_per_head():
    op = WeightOp("scale_rows", "s", heads=4, repeat=2)
    scale = np.array([[2.0, 3.0], [5.0, 7.0]])
    after = apply_weight_edits([op], np.array([1.0, 10.0]), {"s": scale})
    assert after.tolist() == [[2.0, 30.0], [2.0, 30.0], [5.0, 70.0], [5.0, 70.0]]


def test_edits_compute_in_float64():
    op = WeightOp("hadamard_rows", heads=1)
    weight = np.array([1.0, 2.0**-20], dtype=np.float32)
    after = apply_weight_edits([op], weight, {})
    assert after.dtype == np.float64
    assert after[0] - after[1] == pytest.approx(2.0**-20 * np.sqrt(2.0), rel=1e-6)
    assert weight.tolist() == [1.0, 2.0**-20]


@pytest.mark.parametrize(
    ("record", "what"),
    [
        ({"op": "exec"}, "is no weight op"),
        ({"op": "linear"}, "is no weight op"),
        ({"op": "hadamard_rows", "heads": 2, "rows": [4, 12]}, "no rows 4 to 12"),
        ({"op": "hadamard_rows", "heads": 2, "path": "x"}, "is no weight op"),
        ({"op": "scale_rows", "heads": 2, "constant": "missing"}, "there is no constant missing"),
        ({"op": "scale_rows", "heads": 2, "constant": "s"}, "scale_rows"),
        ({"op": "hadamard_rows", "heads": 5}, "hadamard_rows"),
        ({"op": "scale_rows", "heads": 2}, "scale_rows takes"),
    ],
)
def test_edits_that_do_not_fit_are_refused(record, what):
    with pytest.raises(KvantError) as refusal:
        apply_weight_edits([record], np.ones((8, 3)), {"s": np.ones((2, 3))})
    assert refusal.value.code == "bad-weight-edit"
    assert what in refusal.value.what


def test_a_weight_with_two_meanings_is_refused():
    """k and v from the same weight: rotating v would rotate k as well."""
    b = Builder("attention")
    x = b.input("x", TensorType("f32", ("B", "T", 8)))
    shared = b.param("kv.weight", TensorType("f32", (8, 8)))
    one = b.emit("linear", x, b.emit("hadamard_rows", shared, heads=2))
    graph = b.finish((one, b.emit("linear", x, shared)))
    with pytest.raises(KvantError) as refusal:
        weight_edits(graph)
    assert refusal.value.code == "shared-weight"


def test_a_weight_used_twice_in_the_same_way_is_edited_once():
    b = Builder("attention")
    x = b.input("x", TensorType("f32", ("B", "T", 8)))
    shared = b.param("kv.weight", TensorType("f32", (8, 8)))
    edited = b.emit("hadamard_rows", shared, heads=2)
    graph = b.finish((b.emit("linear", x, edited), b.emit("linear", x, edited)))
    assert [edit.parameter for edit in weight_edits(graph)] == ["kv.weight"]


def test_a_weight_that_no_pass_edits_may_be_shared():
    b = Builder("attention")
    x = b.input("x", TensorType("f32", ("B", "T", 8)))
    shared = b.param("kv.weight", TensorType("f32", (8, 8)))
    part = b.emit("linear", x, b.emit("slice_rows", shared, start=0, stop=4))
    assert weight_edits(b.finish((b.emit("linear", x, shared), part))) == []
