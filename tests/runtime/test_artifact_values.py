"""The whole text of every refusal of a plan, a constant or a weight edit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from kvant.runtime import load
from kvant.runtime.strict_json import canonical

from .artifact_maker import ORDER, SINKS, SMOOTH, Made, expect, refusal, reseal

CONSTANTS_FIX = "compile the artifact again; if the constants are your own, correct them"


def edit_json(path: Path, change: Callable[[Any], object]) -> None:
    facts = json.loads(path.read_bytes())
    change(facts)
    path.write_bytes(canonical(facts))


def edit_constant(made: Made, key: str, change: Callable[[np.ndarray], np.ndarray | None]) -> None:
    path = made.folder / "constants.safetensors"
    arrays = load_arrays(path.read_bytes())
    new = change(arrays.pop(key).copy())
    if new is not None:
        arrays[key] = new
    path.write_bytes(save_arrays(arrays, metadata={"format": "kvant"}))
    reseal(made.folder)


def test_constant_not_finite(made: Made) -> None:
    def nan(array: np.ndarray) -> np.ndarray:
        array[0, 0] = np.nan
        return array

    edit_constant(made, f"layers.0.{SMOOTH}", nan)
    what = f"'layers.0.{SMOOTH}' holds NaN or infinity"
    expect(made, "constants-wrong", what, CONSTANTS_FIX, "constants.safetensors")


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        (ORDER, lambda a: a * 0, "is not a permutation of 0..15 in every row"),
        (ORDER, lambda a: a + 1, "is not a permutation of 0..15 in every row"),
        (ORDER, lambda a: a.astype(np.float64), "is not a permutation of 0..15 in every row"),
        (ORDER, lambda a: a[:1], "has shape [1, 16], expected [2, 16]"),
        (ORDER, lambda a: None, "is missing"),
        (SMOOTH, lambda a: a * 0, "holds a scale that is not above zero"),
        (SMOOTH, lambda a: -a, "holds a scale that is not above zero"),
        (SMOOTH, lambda a: a * np.inf, "holds NaN or infinity"),
        (SMOOTH, lambda a: a.astype(np.int64) + 1, "holds a scale that is not above zero"),
        (SMOOTH, lambda a: a.reshape(-1), "has shape [32], expected [2, 16]"),
        (SINKS, lambda a: a[:2], "has shape [2], expected [4]"),
        (SINKS, lambda a: a.astype(np.int64), "holds a sink that is not a float"),
        (SINKS, lambda a: None, "is missing"),
        (
            SMOOTH,
            lambda a: a.astype(np.float16),
            "has dtype float16; known are float32, float64, int64",
        ),
    ],
)
def test_constants_wrong(made: Made, name: str, change: Any, problem: str) -> None:
    edit_constant(made, f"layers.1.{name}", change)
    what = f"'layers.1.{name}' {problem}"
    expect(made, "constants-wrong", what, CONSTANTS_FIX, "constants.safetensors")


def test_constant_of_no_layer(made: Made) -> None:
    path = made.folder / "constants.safetensors"
    arrays = load_arrays(path.read_bytes())
    path.write_bytes(save_arrays(arrays | {"layers.3.x": np.ones(1)}, metadata={"format": "kvant"}))
    reseal(made.folder)
    what = "'layers.3.x' is no constant of one of the 3 layers"
    expect(made, "constants-wrong", what, CONSTANTS_FIX, "constants.safetensors")


def test_constants_unreadable(made: Made) -> None:
    (made.folder / "constants.safetensors").write_bytes(b"garbage")
    reseal(made.folder)
    found = refusal(made)
    assert (found.code, found.fix) == ("constants-unreadable", CONSTANTS_FIX)
    assert found.what.startswith("not a safetensors file: ")


PLAN_FIX = "compile the artifact again with one version of kvant"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda f: f.pop("plans"), "it must hold layers and plans, nothing else"),
        (lambda f: f.update(x=1), "it must hold layers and plans, nothing else"),
        (lambda f: f.update(layers=[]), "it has 0 layers"),
        (lambda f: f["layers"][1].update(index=0), "the entry of layer 1 is not well formed"),
        (lambda f: f["layers"][1].update(plan="p7"), "the entry of layer 1 is not well formed"),
        (lambda f: f["layers"][1].update(x=0), "the entry of layer 1 is not well formed"),
        (lambda f: f["layers"][1].update(graph=-1), "the entry of layer 1 is not well formed"),
        (lambda f: f["layers"][1].update(plan="p0"), "no layer uses p1"),
        (
            lambda f: f["plans"].update({"../p": f["plans"]["p0"]}),
            "'../p' is not a plan key such as p0",
        ),
    ],
)
def test_plan_wrong(made: Made, change: Callable[[Any], object], what: str) -> None:
    edit_json(made.folder / "plan.json", change)
    reseal(made.folder)
    expect(made, "plan-wrong", what, PLAN_FIX, "plan.json")


def test_plan_with_an_unknown_format(made: Made) -> None:
    edit_json(made.folder / "plan.json", lambda f: f["plans"]["p0"]["k"]["tokens"].update(sink=-1))
    reseal(made.folder)
    refusal(made)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda e: e[0].pop("ops"), "an edit has no parameter or no list of ops"),
        (lambda e: e.append(e[0]), "'model.layers.0.self_attn.k_proj.weight' is edited twice"),
        (
            lambda e: e[0]["ops"][0].update(op="exec"),
            "'model.layers.0.self_attn.k_proj.weight' has an unknown operation",
        ),
        (
            lambda e: e[0]["ops"][0].update(constant=None),
            "scale_rows of 'model.layers.0.self_attn.k_proj.weight' names no constant",
        ),
        (
            lambda e: e[1]["ops"][0].update(constant="layers.0.x"),
            "hadamard_rows of 'model.layers.0.self_attn.v_proj.weight' takes no constant",
        ),
        (
            lambda e: e[0]["ops"][0].update(heads=0),
            "scale_rows of 'model.layers.0.self_attn.k_proj.weight' has options that make no sense",
        ),
        (
            lambda e: e[0]["ops"][0].update(repeat="1"),
            "scale_rows of 'model.layers.0.self_attn.k_proj.weight' has options that make no sense",
        ),
        (
            lambda e: e[0]["ops"][0].update(inverse=1),
            "scale_rows of 'model.layers.0.self_attn.k_proj.weight' has options that make no sense",
        ),
        (
            lambda e: e[0]["ops"][0].update(rows=[3, 2]),
            "scale_rows of 'model.layers.0.self_attn.k_proj.weight' has options that make no sense",
        ),
        (
            lambda e: e[0]["ops"][0].update(rows=[0]),
            "scale_rows of 'model.layers.0.self_attn.k_proj.weight' has options that make no sense",
        ),
        (
            lambda e: e[0]["ops"][0].update(rows=[0, True]),
            "scale_rows of 'model.layers.0.self_attn.k_proj.weight' has options that make no sense",
        ),
        (
            lambda e: e[0]["ops"][0].update(colour=1),
            "scale_rows of 'model.layers.0.self_attn.k_proj.weight' has options that make no sense",
        ),
    ],
)
def test_weight_edits_wrong(made: Made, change: Callable[[Any], object], what: str) -> None:
    edit_json(made.folder / "weight_edits.json", change)
    reseal(made.folder)
    expect(made, "weight-edits-wrong", what, CONSTANTS_FIX, "weight_edits.json")


def test_weight_edit_with_a_missing_constant(made: Made) -> None:
    path = made.folder / "weight_edits.json"
    edit_json(path, lambda e: e[0]["ops"][0].update(constant="layers.0.none"))
    reseal(made.folder)
    what = "'layers.0.none' is missing"
    expect(made, "constants-wrong", what, CONSTANTS_FIX, "constants.safetensors")


def edit_shift(made: Made, shift: np.ndarray) -> None:
    """Let the first edit add a constant of its own, as for norms with an offset."""
    path = made.folder / "constants.safetensors"
    arrays = load_arrays(path.read_bytes()) | {"layers.0.kvant.k_norm_shift": shift}
    path.write_bytes(save_arrays(arrays, metadata={"format": "kvant"}))
    add = {"op": "add", "constant": "layers.0.kvant.k_norm_shift"}
    edit_json(made.folder / "weight_edits.json", lambda e: e[0]["ops"].insert(0, add))
    reseal(made.folder)


def test_a_shift_may_have_any_sign(made: Made) -> None:
    edit_shift(made, np.linspace(-1.0, 1.0, 32).reshape(2, 16))
    ops = load(made.folder, "reference").weight_edits[0]["ops"]
    assert [op["op"] for op in ops] == ["add", "scale_rows"]


@pytest.mark.parametrize(
    ("shift", "problem"),
    [
        (np.zeros((2, 16), np.int64), "holds a shift that is not a float"),
        (np.zeros(16), "has shape [16], expected [heads, channels]"),
        (np.full((2, 16), np.nan), "holds NaN or infinity"),
    ],
)
def test_shifts_wrong(made: Made, shift: np.ndarray, problem: str) -> None:
    edit_shift(made, shift)
    what = f"'layers.0.kvant.k_norm_shift' {problem}"
    expect(made, "constants-wrong", what, CONSTANTS_FIX, "constants.safetensors")


def test_several_row_ranges_of_one_parameter(made: Made) -> None:
    """A fused q, k and v weight: one edit, each op on rows of its own."""

    def change(edits: list[dict[str, Any]]) -> None:
        op = edits[1]["ops"][0]
        edits[1]["ops"] = [op | {"rows": [0, 32]}, op | {"rows": [32, 64]}]

    edit_json(made.folder / "weight_edits.json", change)
    reseal(made.folder)
    ops = load(made.folder, "reference").weight_edits[1]["ops"]
    assert [op["rows"] for op in ops] == [[0, 32], [32, 64]]
