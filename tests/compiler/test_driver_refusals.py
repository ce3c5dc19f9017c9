"""What `compile` refuses: the whole text, and nothing is left behind."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kvant
from kvant.compiler import extras
from kvant.compiler.shape import Shape
from kvant.passes import PASSES, PassDef

from .driver_cases import INT4, SHAPE, mine, refusal

REFUSALS: list[tuple[str, Any, Any, tuple[str, ...], str]] = [
    (
        "an unknown recipe",
        SHAPE,
        "kivi-9bit",
        ("reference",),
        "there is no recipe 'kivi-9bit'\n"
        "  where: the recipe argument\n"
        "  fix: did you mean: kivi-4bit, kivi-2bit, split-2bit? `kvant show recipes` lists all; "
        "a path must end in .toml  [unknown-recipe]",
    ),
    (
        "a rule that matches no layer",
        SHAPE,
        mine(rule=[{"layers": "5-7", "k": {"format": "bf16"}}]),
        ("reference",),
        "layers '5-7' match none of the model's 3 layers\n"
        "  where: recipe mine: rule 1\n"
        "  fix: name layers from 0 to 2, or remove the rule  [rule-matches-nothing]",
    ),
    (
        "a group that does not divide",
        Shape(8, 2, 80),
        "kivi-4bit",
        ("reference",),
        "groups of 32 do not divide 80 channels\n"
        "  where: recipe kivi-4bit: v\n"
        "  fix: use one of: 1, 2, 4, 5, 8, 10, 16, 20, 40, 80  [group-does-not-divide]",
    ),
    (
        "an encoding that a record refuses",
        SHAPE,
        mine(k=INT4 | {"group": 0}),
        ("reference",),
        "group is 0\n"
        "  where: recipe mine: k: int\n"
        "  fix: use an integer of at least 1  [bad-encoding]",
    ),
    (
        "encodings that keep everything",
        SHAPE,
        mine(k={"format": "f32"}, v={"format": "f32"}),
        ("reference",),
        "every layer keeps its keys and values as they are\n"
        "  where: recipe mine\n"
        "  fix: give k or v a format with fewer bits  [quantizes-nothing]",
    ),
    (
        "a model of nothing but sliding windows",
        Shape(8, 2, 64, window=16),
        "int4-token",
        ("reference",),
        "every layer keeps its keys and values as they are: all of them have a sliding window\n"
        "  where: recipe int4-token\n"
        '  fix: add `window = "quantize"` to the recipe  [quantizes-nothing]',
    ),
    (
        "a raw window as long as what attention sees",
        Shape(8, 2, 64, window=16),
        mine(window="quantize", k=INT4 | {"recent": 64}),
        ("reference",),
        "attention sees 16 tokens, and sink + recent = 64 of them stay raw\n"
        "  where: recipe mine: pass store: stream k\n"
        "  fix: use sink + recent below 16, or keep this layer as it is  [quantizes-nothing]",
    ),
    (
        "integer products without integers",
        SHAPE,
        mine(compute="int", k={"format": "bf16"}, v={"format": "f16"}),
        ("reference",),
        "compute = int with keys stored as Raw(dtype='bf16') and values as Raw(dtype='f16')\n"
        "  where: recipe mine: attention plan\n"
        "  fix: store keys or values as int, bfp or lut, or use compute = float"
        "  [integer-compute]",
    ),
    (
        "an unknown target",
        SHAPE,
        "int4-token",
        ("cpuu",),
        "there is no target 'cpuu'\n"
        "  where: the targets argument\n"
        "  fix: did you mean: cpu? `kvant show targets` lists all  [unknown-target]",
    ),
    (
        "no target",
        SHAPE,
        "int4-token",
        (),
        "no target is named\n"
        "  where: the targets argument\n"
        "  fix: name at least one, such as cpu; `kvant show targets` lists all  [no-target]",
    ),
    (
        "a head without a Hadamard matrix",
        Shape(8, 2, 80),
        "quarot-kv4",
        ("reference",),
        "a head of 80 channels has no Walsh-Hadamard matrix here\n"
        "  where: recipe quarot-kv4: pass hadamard-v: graph @attention\n"
        "  fix: leave the rotation out; legal head sizes are the powers of two"
        "  [unsupported-head-size]",
    ),
    (
        "a pass that must see weights",
        SHAPE,
        "qserve-kv4",
        ("reference",),
        "pass smooth-k computes constants from weights, and a shape has none\n"
        "  where: the model argument\n"
        "  fix: compile a model, or choose a recipe without that pass  [needs-a-model]",
    ),
    (
        "a model that is not there",
        "no/such/model",
        "int4-token",
        ("reference",),
        "there is no file or folder 'no/such/model'\n"
        "  where: the model argument\n"
        "  fix: give a path that exists; kvant downloads nothing (for a model of the hub: "
        "hf download NAME --local-dir FOLDER)  [model-missing]",
    ),
    (
        "what is no model",
        7,
        "int4-token",
        ("reference",),
        "int is not a model\n"
        "  where: the model argument\n"
        "  fix: give a Hugging Face folder, a .gguf file or a transformers model"
        "  [unsupported-model]",
    ),
]


@pytest.mark.parametrize(
    ("model", "recipe", "targets", "text"), [r[1:] for r in REFUSALS], ids=[r[0] for r in REFUSALS]
)
def test_refusals(empty: Path, model: Any, recipe: Any, targets: Any, text: str) -> None:
    assert refusal(lambda: kvant.compile(model, recipe, targets, out=empty / "a")) == text
    assert list(empty.iterdir()) == []


def test_without_a_c_compiler(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert refusal(lambda: kvant.compile(SHAPE, "int4-token", ["cpu"], out=empty / "a")) == (
        "no C compiler `cc` was found\n"
        "  where: target cpu\n"
        "  fix: install gcc or clang  [target-not-available]"
    )
    assert list(empty.iterdir()) == []


def test_an_output_that_exists_is_refused_before_any_work(empty: Path) -> None:
    (empty / "a").mkdir()
    stages: list[str] = []
    text = refusal(
        lambda: kvant.compile(
            SHAPE, "int4-token", ["reference"], out=empty / "a", progress=stages.append
        )
    )
    assert text == (
        "a exists already, and kvant never writes over anything\n"
        f"  where: {empty / 'a'}\n"
        "  fix: give another output path, or remove it first  [output-exists]"
    )
    assert stages == []


def test_a_pass_that_changes_nothing(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PASSES, "hadamard-qk", PassDef(lambda graph: graph, exact=True))
    run = lambda: kvant.compile(SHAPE, "quarot-kv4", ["reference"], out=empty / "a")  # noqa: E731
    assert refusal(run) == (
        "pass hadamard-qk changed none of the model's layers\n"
        "  where: recipe quarot-kv4\n"
        "  fix: remove it from the recipe, or choose a recipe for this kind of model"
        "  [pass-changes-nothing]"
    )


def test_a_missing_extra(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = extras.find_spec
    monkeypatch.setattr(
        extras, "find_spec", lambda name: None if name == "transformers" else real(name)
    )
    (empty / "model").mkdir()
    (empty / "model" / "config.json").write_text("{}")
    run = lambda: kvant.compile(empty / "model", "int4-token", ["reference"])  # noqa: E731
    assert refusal(run) == (
        "compiling a model needs transformers, not installed here\n"
        "  where: this Python environment\n"
        "  fix: pip install 'kvant[compile]'  [missing-extra]"
    )


def test_without_pydantic_the_compiler_says_so() -> None:
    code = "import sys; sys.modules['pydantic'] = None\nimport kvant\nkvant.compile"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "KvantError: compiling a model needs pydantic, not installed here" in done.stderr
