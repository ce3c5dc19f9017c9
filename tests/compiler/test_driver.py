"""compile(): every refusal of the front, word for word; and nothing is left behind."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvant
from kvant.compiler import driver
from kvant.compiler.facts import smaller_from
from kvant.compiler.shape import Shape, shape_model
from kvant.compiler.variants import rewrite
from kvant.ir.errors import KvantError
from kvant.runtime.verify import verify
from kvant.targets.cpu import this_cpu

from .driver_cases import SHAPE, mine, refusal


@pytest.mark.parametrize("stage", ["capture", "rewrite", "constants", "kernels", "write"])
def test_ctrl_c_leaves_nothing_behind(
    empty: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    def interrupt(name: str) -> None:
        if name == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kvant.compile(SHAPE, "int4-token", ["reference"], out=empty / "a", progress=interrupt)
    assert list(empty.iterdir()) == []


def test_ctrl_c_while_kernels_are_linked(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(command: list[str], cwd: Path, **options: Any) -> Any:
        assert sorted(p.name for p in Path(cwd).iterdir()) == ["exports", "kernels.o", "pool.c"]
        raise KeyboardInterrupt

    monkeypatch.setattr("kvant.targets.cpu_link.subprocess.run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kvant.compile(Shape(2, 1, 16), "int4-token", ["cpu"], out=empty / "a")
    assert list(empty.iterdir()) == []


def test_the_same_inputs_give_the_same_id(empty: Path, make_model: Any) -> None:
    ids = []
    for name in ("a", "b"):
        model = make_model("llama", seed=3, head_dim=16, num_attention_heads=4)
        art = kvant.compile(model, "quarot-kv4", ["reference", "cpu"], out=empty / name)
        ids.append(art.id)
        assert sorted(art.manifest["targets"]) == [f"cpu-{this_cpu().name}", "reference"]
    assert ids[0] == ids[1]
    files = [sorted(p.relative_to(empty / n) for p in (empty / n).rglob("*")) for n in "ab"]
    assert files[0] == files[1]
    # torch.export makes an empty folder for torch's own cache; it is not ours to remove.
    left = {p.name for p in empty.iterdir() if not p.name.startswith("torchinductor_")}
    assert left == {"a", "b"}


@pytest.mark.parametrize(
    ("recipe", "text"),
    [("qserve-kv4", "text the model wrote itself, 1,024 tokens"), ("quarot-kv4", None)],
)
def test_the_artifact_names_the_text_of_its_calibration(
    empty: Path, make_model: Any, recipe: str, text: str | None
) -> None:
    model = make_model("llama", seed=3, head_dim=16, num_attention_heads=4)
    art = kvant.compile(model, recipe, "reference", out=empty / "a")
    assert art.calibration == art.show()["calibration"] == text


def test_other_inputs_give_another_id(empty: Path) -> None:
    ids = {
        kvant.compile(shape, recipe, "reference", out=empty / str(i)).id
        for i, (shape, recipe) in enumerate(
            [(SHAPE, "int4-token"), (SHAPE, "int8-token"), (Shape(4, 2, 64), "int4-token")]
        )
    }
    assert len(ids) == 3


def test_a_target_named_twice_is_built_once() -> None:
    here = f"cpu:{this_cpu().name}"
    assert list(driver.resolve_targets(["cpu", here, "reference"])) == [here, "reference"]


def test_an_artifact_for_another_machine_is_loaded_for_the_reference(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvant.runtime import artifact

    real, asked = artifact.load, []

    def load(path: Path, target: str, id: str) -> Any:
        asked.append(target)
        if target != "reference":
            raise KvantError("no-usable-target", "elsewhere", where="here", fix="none")
        return real(path, target=target, id=id)

    kvant.compile(SHAPE, "int4-token", ["reference"], out=empty / "a")
    monkeypatch.setattr(artifact, "load", load)
    identity = (empty / "a" / "ID").read_text().strip()
    art = driver._load(empty / "a", "cpu:x86-64-v3", identity)
    assert (asked, art.target) == (["cpu:x86-64-v3", "reference"], "reference")


def test_dump_of_the_ir(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvant.ir.text import parse

    monkeypatch.setenv("KVANT_DUMP_IR", str(empty / "ir"))
    kvant.compile(SHAPE, "quarot-kv4", ["reference"], out=empty / "a")
    names = sorted(p.name for p in (empty / "ir").iterdir())
    assert names == [
        "00-input.kir",
        "01-hadamard-v.kir",
        "02-hadamard-qk.kir",
        "03-store.kir",
        "04-dead-code.kir",
    ]
    graphs = [parse((empty / "ir" / name).read_text()) for name in names]
    assert [len(list(g.find("hadamard"))) for g in graphs] == [0, 2, 4, 4, 4]
    assert parse((empty / "a" / "graph.kir").read_text()) == graphs[-1]


def test_dump_of_several_graphs(empty: Path) -> None:
    rule = [{"layers": "1", "k": {"format": "bf16"}}]
    kvant.compile(SHAPE, mine(rule=rule), "reference", out=empty / "a", dump_ir=empty / "ir")
    found = sorted(str(p.relative_to(empty / "ir")) for p in (empty / "ir").rglob("*.kir"))
    steps = ["00-input.kir", "01-store.kir", "02-dead-code.kir"]
    assert found == [f"graph{i}/{step}" for i in (0, 1) for step in steps]


def test_dump_of_kernels(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVANT_DUMP_KERNELS", str(empty / "k"))
    art = kvant.compile(Shape(2, 1, 16), "int4-token", ["cpu", "reference"], out=empty / "a")
    found = sorted(str(p.relative_to(empty / "k")) for p in (empty / "k").rglob("*") if p.is_file())
    cpu = f"cpu-{this_cpu().name}/p0"
    assert found == [
        f"{cpu}/binary/kernels.py",
        f"{cpu}/binary/kernels.so",
        f"{cpu}/binary/launch.json",
        f"{cpu}/plan.json",
        f"{cpu}/source.py",
        "reference/p0/plan.json",
    ]
    stored = empty / "a" / "targets" / cpu
    for name in ("kernels.py", "kernels.so"):
        assert (empty / "k" / cpu / "binary" / name).read_bytes() == (stored / name).read_bytes()
    plan = json.loads((empty / "k" / cpu / "plan.json").read_text())
    assert plan == art.plan_of(0).to_json()


def test_dumps_and_traces_change_nothing(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = kvant.compile(SHAPE, "quarot-kv4", "reference", out=empty / "a").id
    for name, value in (("DUMP_IR", "x"), ("DUMP_KERNELS", "y"), ("TRACE", "1")):
        monkeypatch.setenv(f"KVANT_{name}", value if value == "1" else str(empty / value))
    assert kvant.compile(SHAPE, "quarot-kv4", "reference", out=empty / "b").id == plain


def test_a_dump_that_cannot_be_written(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (empty / "file").write_text("")
    run = lambda: kvant.compile(  # noqa: E731
        SHAPE, "int4-token", "reference", out=empty / "a", dump_ir=empty / "file"
    )
    assert refusal(run) == (
        "the system refused to write a dump: File exists\n"
        f"  where: recipe int4-token: {empty / 'file' / '00-input.kir'}\n"
        "  fix: give a folder that can be written, or unset the variable  [dump-not-written]"
    )


def test_trace(
    empty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KVANT_TRACE", "1")
    kvant.compile(SHAPE, "quarot-kv4", "reference", out=empty / "a")
    captured = capsys.readouterr()
    words = [line.split(": ")[1] for line in captured.err.splitlines()]
    assert words == [
        "stage capture",
        "pass hadamard-v",
        "pass hadamard-qk",
        "pass store",
        "pass dead-code",
        "stage rewrite",
        "stage constants",
        "stage kernels",
        "stage write",
    ]
    assert captured.out == ""


def test_no_trace_unless_asked(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kvant.compile(SHAPE, "quarot-kv4", "reference", out=empty / "a")
    assert capsys.readouterr() == ("", "")


def test_layers_of_a_rule_share_a_graph_and_the_others_another() -> None:
    raw = {"format": "bf16"}
    rule = [{"layers": "0, -1", "k": raw, "v": raw}]
    variants = rewrite(shape_model(SHAPE), mine(compute="int", rule=rule))
    assert [[layer.index for layer in v.layers] for v in variants] == [[0, 2], [1]]
    # Raw keys and values have no integer products: those layers compute in float.
    assert [v.plan.compute for v in variants] == ["float", "int"]


def test_layers_with_a_window_are_kept_unless_asked_for(captured: Any) -> None:
    _, model = captured("gemma2")
    kept = rewrite(model, mine(compute="int"))
    assert {v.plan.window: v.plan.k.tokens.quantizes for v in kept} == {6: False, None: True}
    assert {v.plan.window: v.plan.compute for v in kept} == {6: "float", None: "int"}
    asked = rewrite(model, mine(window="quantize"))
    assert all(v.plan.k.tokens.quantizes for v in asked)


@pytest.mark.parametrize(
    "change",
    [
        {"heads": 7},
        {"head_dim": 64.0},
        {"kv_heads": 0},
        {"window": 0},
        {"softcap": -1.0},
        {"scale": float("nan")},
        {"dtype": "int8"},
        {"sinks": [[0.0] * 2]},
        {"sinks": [[0.0] * 8] * 2},
        {"sinks": [[float("inf")] * 8]},
    ],
)
def test_shapes_that_are_none(change: dict[str, Any]) -> None:
    with pytest.raises(KvantError) as caught:
        Shape(**{"heads": 8, "kv_heads": 2, "head_dim": 64} | change)
    assert caught.value.code == "shape"


def test_a_shape_with_sinks_has_one_more_in_each_sum(empty: Path) -> None:
    """A sink of zero is exp(0) = 1 in the softmax's denominator."""
    rng = np.random.default_rng(0)
    k, v = (rng.normal(size=(2, 2, 70, 16)).astype(np.float32) for _ in range(2))
    q = rng.normal(size=(2, 4, 3, 16)).astype(np.float32)
    outs = {}
    for sinks in (False, True):
        shape, target = Shape(4, 2, 16, sinks=sinks), "cpu" if sinks else "reference"
        art = kvant.compile(shape, "int8-token", target, out=empty / str(sinks))
        assert verify(empty / str(sinks))["computed_share"] <= 1.0
        cache = art.new_cache(batch=2, start=[0, 9])
        cache.append(0, k, v)
        outs[sinks] = cache.attend(0, q, return_lse=True)
    (plain, lse), (out, with_sink) = outs[False], outs[True]
    share = 1 / (1 + np.exp(-lse))
    assert np.abs(with_sink - np.logaddexp(lse, 0)).max() < 1e-5
    assert np.abs(out - plain * share[..., None]).max() < 1e-5
    assert np.abs(out - plain).max() > 1e-3


def test_the_sinks_of_a_shape_are_constants_of_its_layers(empty: Path) -> None:
    rows = ((0.5, -1.0), (2.0, 3.0))
    shape = Shape(2, 1, 16, layers=2, sinks=[list(row) for row in rows])
    assert shape == Shape(2, 1, 16, layers=2, sinks=rows)
    assert hash(shape) == hash(Shape(2, 1, 16, layers=2, sinks=rows))
    art = kvant.compile(shape, "int8-token", "reference", out=empty / "a")
    for own, row in zip(art.constants, rows, strict=True):
        assert own["kvant.sinks"].tolist() == list(row)
    x = np.ones((1, 1, 3, 16), np.float32)
    found = []
    for layer in (0, 1):
        cache = art.new_cache()
        for each in (0, 1):
            cache.append(each, x, x)
        found.append(cache.attend(layer, np.ones((1, 2, 1, 16), np.float32), True)[1][0, :, 0])
    scores = np.full(3, 16**0.5)
    for lse, row in zip(found, rows, strict=True):
        want = [np.log(np.exp([*scores, sink]).sum()) for sink in row]
        np.testing.assert_allclose(lse, want, rtol=1e-6)
    with pytest.raises(KvantError) as caught:
        Shape(8, 2, 64, sinks=[[1.0]])
    assert str(caught.value) == (
        "sinks is ((1.0,),)\n  where: Shape(sinks=...)\n"
        "  fix: use 8 finite numbers for each of 1 layers, True or False  [shape]"
    )


def test_from_which_context_the_cache_is_smaller(empty: Path) -> None:
    art = kvant.compile(SHAPE, "kivi-4bit", "reference", out=empty / "a")
    found = smaller_from(art.plans)
    assert found is not None

    def packed(length: int) -> int:
        return sum(p.k.bytes(length) + p.v.bytes(length) for p in art.plans)

    full = art.full_bytes_per_token()
    assert all(packed(n) < n * full for n in range(found, 1000))
    assert any(packed(n) >= n * full for n in range(found - 16, found))
    raw = kvant.compile(
        SHAPE, mine(k={"format": "bf16"}, v={"format": "bf16"}), "reference", out=empty / "b"
    )
    assert smaller_from(raw.plans) is None
