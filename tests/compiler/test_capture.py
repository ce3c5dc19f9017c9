"""Capture against stock transformers in numbers, and what it says of a model."""

import inspect
import linecache
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvant.compiler.bind import ModelSource, open_model
from kvant.compiler.capture import Model, capture, without_locations
from kvant.compiler.self_check import check_capture, self_check
from kvant.ir.errors import KvantError
from kvant.ir.graph import Graph, Op
from kvant.ir.ops import OPS
from kvant.ir.text import parse, print_graph

from .. import models_page
from ..families import FAMILIES, REFUSED
from .conftest import Captured, MakeModel

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

PLAIN = "linear split_heads rope linear split_heads rope cache_write cache_read"
VALUE = "linear split_heads cache_write cache_read attend merge_heads linear"
NORMED = PLAIN.replace("split_heads rope", "split_heads rms_norm rope")
FUSED = "slice_rows linear split_heads"
OPS_OF = {  # of the first layer; a family that is not named here is as Llama
    "qwen3": f"{NORMED} {VALUE}",
    "qwen3-moe": f"{NORMED} {VALUE}",
    "gemma3": f"{NORMED} {VALUE}",
    "olmo2": f"{PLAIN} {VALUE}".replace("split_heads rope", "rms_norm split_heads rope"),
    "cohere": f"{NORMED.replace('rms_norm', 'center rms_norm')} {VALUE}",
    "glm4": f"spread spread {PLAIN} {VALUE}",
    "gpt-oss": f"spread spread {PLAIN} {VALUE}",
    "phi3": f"{FUSED} rope {FUSED} rope cache_write cache_read slice_rows {VALUE}",
    "phi4-mini": f"{FUSED} rope {FUSED} rope cache_write cache_read slice_rows {VALUE}",
    "gpt2": f"transpose_w slice_rows {FUSED} {('slice_rows ' + FUSED)} cache_write cache_read "
    "slice_rows slice_rows linear split_heads cache_write cache_read attend merge_heads "
    "transpose_w linear",
}


STALE = "docs/models.md is stale: see CONTRIBUTING.md, Add a model family"
SHORT = [name for name, family in FAMILIES.items() if not family.is_long]
LONG = [name for name, family in FAMILIES.items() if family.is_long]


def computing(graph: Graph) -> list[Op]:
    """Return the ops that are not declarations."""
    return [op for op in graph.ops if op.name not in ("input", "param")]


def attribute(model: Model, name: str) -> list[Any]:
    """Return an attribute of `attend`, for each structure."""
    return [graph.find("attend")[0].attr(name) for graph in model.graphs]


@pytest.mark.parametrize("family", SHORT)
def test_matches_torch(family: str, captured: Captured) -> None:
    module, model = captured(family)
    assert check_capture(module, model) <= 2e-6
    ops = " ".join(op.name for op in computing(model.graphs[0]))
    assert ops == OPS_OF.get(family, f"{PLAIN} {VALUE}")
    for graph in model.graphs:
        assert parse(print_graph(graph)) == graph


@pytest.mark.long
@pytest.mark.parametrize("family", LONG)
def test_more_families_match_torch(family: str, captured: Captured) -> None:
    module, model = captured(family)
    assert check_capture(module, model) <= 2e-6
    assert self_check(open_model(module), model) <= 2e-6


def test_what_differs_between_families_is_in_the_graph(captured: Captured) -> None:
    models = {name: captured(name)[1] for name in SHORT}
    biased = {name: "q_proj.bias" in m.graphs[0].params() for name, m in models.items()}
    assert [name for name, has in biased.items() if has] == ["qwen2", "glm4", "gpt-oss"]
    offsets = {
        name: {op.attr("offset") for op in m.graphs[0].find("rms_norm")}
        for name, m in models.items()
    }
    assert offsets["gemma3"] == {1.0}
    assert offsets["qwen3"] == offsets["olmo2"] == {0.0}
    assert attribute(models["mistral"], "window") == [6]
    assert attribute(models["gemma2"], "window") == [6, None]
    assert attribute(models["gemma3"], "window") == [6, None]
    assert attribute(models["llama"], "window") == [None]
    assert attribute(models["gemma2"], "softcap") == [50.0, 50.0]
    assert attribute(models["gemma2"], "scale") == [256**-0.5] * 2
    assert attribute(models["llama"], "scale") == [8**-0.5]
    norm = models["qwen3"].graphs[0].params()["k_norm.weight"]
    assert str(norm) == "f32[16]"
    assert str(models["cohere"].graphs[0].params()["k_norm.weight"]) == "f32[2, 8]"
    ropes = {name: {shape_of_rope(g) for g in m.graphs} for name, m in models.items()}
    assert ropes["llama"] == {("half", 8, 8)}
    assert ropes["cohere"] == {("adjacent", 8, 8)}
    assert ropes["glm4"] == {("adjacent", 8, 16)}
    assert ropes["phi4-mini"] == {("half", 12, 16)}
    assert ropes["gpt-oss"] == {("half", 16, 16)}
    assert ropes["smollm3"] == {("half", 8, 8), None}
    assert ropes["cohere2"] == {("adjacent", 8, 8), None}
    assert ropes["gpt2"] == {None}
    sinks = {name for name, m in models.items() if "sinks" in m.graphs[0].params()}
    assert sinks == {"gpt-oss"}


def test_the_page_of_models_says_what_was_captured(captured: Captured) -> None:
    taken, refused = models_page.tables()
    assert len(taken) == len(FAMILIES)
    assert len(refused) == len(REFUSED)
    for name in SHORT:
        assert models_page.taken_row(name, captured(name)[1]) in taken, STALE


@pytest.mark.long
def test_the_models_page_is_not_stale(make_model: MakeModel) -> None:
    taken, refused = models_page.all_rows(capture, make_model, open_model)
    if os.environ.get("KVANT_UPDATE_GOLDEN"):
        models_page.renew(taken, refused)
    assert models_page.tables() == (list(taken.values()), list(refused.values())), STALE


def shape_of_rope(graph: Graph) -> tuple[Any, ...] | None:
    """Return style, rotated channels and channels of a head; none without RoPE."""
    found = {
        (op.attr("style"), op.args[1].tensor.shape[-1], op.args[0].tensor.shape[-1])
        for op in graph.find("rope")
    }
    assert len(found) < 2
    return found.pop() if found else None


def test_facts_and_types(captured: Captured) -> None:
    _, model = captured("qwen3")
    assert model.architecture == "Qwen3ForCausalLM"
    assert model.facts == {
        "heads": 6,
        "kv_heads": 2,
        "head_dim": 16,
        "v_head_dim": 16,
        "hidden": 48,
        "layers": 2,
        "rope": {"rope_theta": 10000.0, "rope_type": "default"},
        "max_tokens": 64,
        "model_type": "qwen3",
        "dtype": "f32",
    }
    (graph,) = model.graphs
    assert {name: str(type) for name, type in graph.inputs().items()} == {
        "x": "f32[B, T, 48]",
        "cos": "f32[B, T, 16]",
        "sin": "f32[B, T, 16]",
    }
    shown = {str(op.result): str(op.result.type) for op in computing(graph)}
    assert shown["%k_cache"] == "cache[k]"
    assert shown["%k"] == "f32[B, 2, S+T, 16]"
    assert shown["%attend"] == "f32[B, 6, T, 16]"
    assert str(graph.outputs[0].type) == "f32[B, T, 48]"
    assert [op.attr("basis") for op in graph.find("cache_write")] == [(), ()]


def test_layers_of_one_structure_share_a_graph(captured: Captured) -> None:
    _, model = captured("gemma3")
    assert [layer.structure for layer in model.layers] == [0, 0, 0, 0, 0, 1]
    assert [layer.index for layer in model.layers] == [0, 1, 2, 3, 4, 5]
    assert model.layers[4].prefix == "model.layers.4.self_attn."
    assert [graph.name for graph in model.graphs] == ["attention_0", "attention_1"]
    assert [graph.name for graph in captured("llama")[1].graphs] == ["attention"]


def test_a_scalar_of_one_layer_makes_a_structure_of_its_own(make_model: MakeModel) -> None:
    module = make_model("llama")
    module.model.layers[1].self_attn.scaling = 0.5
    model = capture(open_model(module))
    assert [layer.structure for layer in model.layers] == [0, 1]
    assert attribute(model, "scale") == [8**-0.5, 0.5]


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "gpt2", "gpt-oss"])
def test_meta_and_real_import_give_the_same(
    family: str, make_model: MakeModel, tmp_path: Path
) -> None:
    module = make_model(family)
    module.save_pretrained(tmp_path)
    real, meta = capture(open_model(module)), capture(open_model(tmp_path))
    half = capture(open_model(make_model(family).bfloat16()))
    for other in (meta, half):
        assert list(map(print_graph, other.graphs)) == list(map(print_graph, real.graphs))
        assert other.layers == real.layers
        assert other.fingerprint == real.fingerprint


def test_the_fingerprint_is_of_the_structure_alone(make_model: MakeModel) -> None:
    def fingerprint(**changes: Any) -> str:
        return capture(open_model(make_model("llama", **changes))).fingerprint

    theta = {"rope_theta": 5e5, "rope_type": "default"}
    first = fingerprint()
    assert len(first) == 64
    assert fingerprint(seed=7) == first
    assert fingerprint(vocab_size=32) == first
    others = [
        fingerprint(rope_parameters=theta),
        fingerprint(num_hidden_layers=3),
        fingerprint(attention_bias=True),
        fingerprint(num_key_value_heads=3),
    ]
    assert len({first, *others}) == 5


def test_every_op_knows_its_source_line(captured: Captured) -> None:
    module, model = captured("qwen3")
    file = inspect.getsourcefile(type(module))
    assert file is not None
    (graph,) = model.graphs
    for op in computing(graph):
        assert op.loc is not None
        path, line, text = op.loc.split(":", 2)
        assert path == "transformers/models/qwen3/modeling_qwen3.py"
        assert linecache.getline(file, int(line)).strip() == text.strip() != ""
    norms = [op.loc for op in graph.find("rms_norm")]
    assert "self.q_norm(" in str(norms[0])
    assert "self.k_norm(" in str(norms[1])
    assert without_locations(graph) == graph
    assert all(op.loc is None for op in without_locations(graph).ops)


def test_capture_leaves_the_model_as_it_was(make_model: MakeModel) -> None:
    module = make_model("llama").train()
    module.model.layers[0].mlp.eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    capture(open_model(module))
    assert module.config._attn_implementation == "sdpa"
    assert module.model.layers[0].self_attn.q_proj.training
    assert not module.model.layers[0].mlp.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


# Negative controls: what check_capture is for.
def wrong_heads(run: Any, arrays: tuple[Any, ...], attrs: Any) -> Any:
    """attend as if query head h read KV head h % H instead of h // G."""
    q, k, v = arrays
    heads = k.shape[1]
    group = q.shape[1] // heads
    order = np.arange(q.shape[1]).reshape(group, heads).T.reshape(-1)
    out = OPS["attend"].evaluate(run, (q[:, order], k, v), attrs)
    return np.asarray(out)[:, np.argsort(order)]


def wrong_pairs(run: Any, arrays: tuple[Any, ...], attrs: Any) -> Any:
    """rope as if channels 2i and 2i+1 were a pair instead of i and i + D/2."""
    x, cos, sin = arrays
    half = x.shape[-1] // 2
    angles = np.repeat(cos[..., :half], 2, -1)[:, None], np.repeat(sin[..., :half], 2, -1)[:, None]
    turned = np.stack((-x[..., 1::2], x[..., ::2]), -1).reshape(x.shape)
    return x * angles[0] + turned * angles[1]


@pytest.mark.parametrize(("op", "wrong"), [("attend", wrong_heads), ("rope", wrong_pairs)])
def test_a_wrong_meaning_is_caught(
    op: str, wrong: Any, captured: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, model = captured("llama")
    right = OPS[op]
    monkeypatch.setitem(
        OPS,
        op,
        replace(right, evaluate=lambda *a: with_row(monkeypatch, op, right, wrong, a)),
    )
    with pytest.raises(KvantError) as caught:
        check_capture(module, model)
    assert caught.value.code == "capture-mismatch"
    error = float(caught.value.what.split("by ")[1].split()[0])
    assert error > 1e-2


def with_row(monkeypatch: pytest.MonkeyPatch, op: str, right: Any, wrong: Any, args: Any) -> Any:
    """Call `wrong` while the row of OPS is the right one."""
    with monkeypatch.context() as inner:
        inner.setitem(OPS, op, right)
        return wrong(*args)


def with_attr(model: Model, op: str, key: str, value: Any) -> Model:
    """Return the model with one attribute of its ops `op` changed."""
    graphs = []
    for graph in model.graphs:
        ops = tuple(
            replace(o, attrs=tuple((k, value if k == key else v) for k, v in o.attrs))
            if o.name == op
            else o
            for o in graph.ops
        )
        graphs.append(replace(graph, ops=ops))
    return replace(model, graphs=tuple(graphs))


@pytest.mark.parametrize(
    ("family", "op", "key", "value"),
    [
        ("llama", "attend", "scale", 0.36),
        ("mistral", "attend", "window", 7),
        ("mistral", "attend", "window", None),
        ("gemma2", "attend", "softcap", None),
        ("gemma3", "rms_norm", "offset", 0.0),
        ("qwen3", "rms_norm", "eps", 1e-3),
        ("cohere", "rope", "style", "half"),
        ("phi4-mini", "rope", "style", "adjacent"),
        ("glm4", "spread", "style", "half"),
        ("gpt-oss", "spread", "style", "adjacent"),
    ],
)
def test_a_wrong_attribute_is_caught(
    family: str, op: str, key: str, value: Any, captured: Captured
) -> None:
    module, model = captured(family)
    wrong = with_attr(model, op, key, value)
    with pytest.raises(KvantError, match=r"\[capture-mismatch\]"):
        check_capture(module, wrong)


def test_a_mismatch_says_where(captured: Captured) -> None:
    module, model = captured("llama")
    wrong = with_attr(model, "attend", "scale", 0.36)
    with pytest.raises(KvantError) as caught:
        check_capture(module, wrong, layers=[1])
    what, where, fix = str(caught.value).split("\n")
    assert what.startswith("layer 1, step 0: the graph differs from torch by ")
    assert what.endswith(" relative, more than 2e-06")
    assert where == "  where: LlamaForCausalLM in kvant/compiler/raise_fx.py"
    assert fix == (
        "  fix: this is a mistake in kvant: please report it with the model's config.json"
        "  [capture-mismatch]"
    )


def test_importing_capture_imports_no_torch() -> None:
    code = (
        "import sys, kvant.compiler.capture, kvant.compiler.bind, kvant.compiler.self_check; "
        "print(sorted({'torch', 'transformers', 'gguf'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr.strip()) == ("[]", "")


@pytest.mark.model
def test_smollm2_matches_torch(smollm2: ModelSource, smollm2_module: Any) -> None:
    model = capture(smollm2)
    assert [layer.structure for layer in model.layers] == [0] * 30
    assert (model.facts["heads"], model.facts["kv_heads"], model.facts["head_dim"]) == (9, 3, 64)
    assert " ".join(op.name for op in computing(model.graphs[0])) == f"{PLAIN} {VALUE}"
    assert check_capture(smollm2_module, model, layers=[0, 29]) <= 2e-6
    assert self_check(smollm2, model) <= 2e-6


@pytest.mark.long
@pytest.mark.model
def test_every_layer_of_smollm2_matches_torch_in_float64(smollm2: ModelSource) -> None:
    """In fp32 torch's own rounding goes past 2e-6 in a middle layer; float64 leaves only ours."""
    module = smollm2.load("float32").double()
    assert check_capture(module, capture(smollm2)) <= 2e-6
