"""Other models than Llama, compiled and attached: right, or refused; never silently wrong.

What is stored here loses nothing: groups of one channel, whose minimum is the value itself. So the
logits of an attached model are those of the plain one, and every rewrite is seen by itself.
"""

import functools
import json
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import kvant
from kvant.ir.encodings import Sparse
from kvant.ir.errors import KvantError
from kvant.runtime.huggingface import attach, detach

from ..families import FAMILIES, make_model

SHORT = [name for name, family in FAMILIES.items() if not family.is_long]
LONG = [name for name, family in FAMILIES.items() if family.is_long]
STREAM = 'format = "int"\nbits = 8\naxis = "token"\ngroup = 1\nparams = "f32"\n'
ENTRIES = 'sparse = { count = 3, limit = 1.0, values = "f32" }\n'
RECIPE = (
    'name = "lossless"\nwindow = "quantize"\n'
    '[[rewrite]]\npass = "smooth-k"\n[[rewrite]]\npass = "hadamard-v"\n'
    f"[k]\n{STREAM}[v]\n{STREAM}"
)
THRESHOLDS = (
    'name = "thresholds"\nwindow = "quantize"\n'
    '[[rewrite]]\npass = "threshold-k"\n[[rewrite]]\npass = "threshold-v"\nshare = 0.05\n'
    f"[k]\n{STREAM}{ENTRIES}[v]\n{STREAM}{ENTRIES}"
)
INT8 = RECIPE.replace("lossless", "int8").replace("group = 1\n", 'group = "head"\n')
PROMPT, NEW, PADDING = 9, 16, 3


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return compiled(family, recipe="lossless", target="reference") -> its artifact, made once."""
    folder, before = tmp_path_factory.mktemp("families"), torch.get_num_threads()
    for name, text in (("lossless", RECIPE), ("thresholds", THRESHOLDS), ("int8", INT8)):
        (folder / f"{name}.toml").write_text(text)
    torch.set_num_threads(1)

    @functools.cache
    def made(family: str, recipe: str, target: str) -> Any:
        out = folder / f"{family}-{recipe}-{target}.kvant"
        return kvant.compile(make_model(family), folder / f"{recipe}.toml", [target], out=out)

    def get(family: str, recipe: str = "lossless", target: str = "reference") -> Any:
        return made(family, recipe, target)

    yield get
    torch.set_num_threads(before)


def logits(model: PreTrainedModel, ids: torch.Tensor, cache: Any = None) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(ids, past_key_values=cache).logits
    return out


def tokens(rows: int = 2, columns: int = 40) -> torch.Tensor:
    return torch.randint(2, 60, (rows, columns), generator=torch.manual_seed(0))


def generated(
    model: PreTrainedModel, ids: torch.Tensor, padding: int = 0, cache: Any = None
) -> torch.Tensor:
    """Generate greedily from two rows, the first with `padding` columns before its first token."""
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    given = {} if cache is None else {"past_key_values": cache}
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    out: torch.Tensor = model.generate(ids, attention_mask=mask, **options, **given)
    assert out.shape[1] == ids.shape[1] + NEW
    return out


def check_family(family: str, compiled: Any, recipe: str = "lossless") -> None:
    model, ids = make_model(family), tokens()
    prompt = ids[:, :PROMPT]
    expected, rows = logits(model, ids), [generated(model, prompt, n) for n in (0, PADDING)]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model, cache = attach(model, compiled(family, recipe))
    assert not all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    # 6 and 2 tokens are as many as there are heads: a norm weight on the wrong axis would fit.
    steps = ((0, 19), (19, 25), (25, 27), (27, 28), (28, 40))
    found = torch.cat([logits(model, ids[:, a:b], cache) for a, b in steps], 1)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    for padding, row in zip((0, PADDING), rows, strict=True):
        cache.reset()
        assert torch.equal(generated(model, prompt, padding, cache), row), padding
    alone = logits(model, ids)  # without a cache, but through our attention function
    assert (alone - expected).abs().max() < 1e-5 * expected.abs().max()
    detach(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.shape == before[name].shape


@pytest.mark.parametrize("family", SHORT)
def test_smoothed_and_rotated_is_the_plain_model(family: str, compiled: Any) -> None:
    check_family(family, compiled)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_outliers_by_thresholds_are_the_plain_model(family: str, compiled: Any) -> None:
    """Thresholds of k online, those of v in weights; what is above them comes back as entries."""
    check_family(family, compiled, "thresholds")
    (plan, *_) = compiled(family, "thresholds").plans
    assert isinstance(plan.k.tokens.rest, Sparse)


@pytest.mark.long
@pytest.mark.parametrize("family", LONG)
def test_more_families_are_the_plain_model(family: str, compiled: Any) -> None:
    check_family(family, compiled)


def int8_error(family: str, target: str, compiled: Any) -> float:
    """Return the root mean square error of logits that read 8-bit history, relative."""
    model, ids = make_model(family), tokens()
    expected = logits(model, ids)[:, 20:]
    model, cache = attach(model, compiled(family, "int8", target))
    logits(model, ids[:, :20], cache)
    found = torch.cat([logits(model, ids[:, i : i + 1], cache) for i in range(20, 40)], 1)
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", ["gpt-oss"])
def test_eight_bits_stay_close_on_compiled_kernels(family: str, compiled: Any) -> None:
    assert 1e-5 < int8_error(family, "cpu", compiled) < 0.02


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_eight_bits_stay_close(family: str, compiled: Any) -> None:
    target = "reference" if FAMILIES[family].is_long else "cpu"
    assert 1e-5 < int8_error(family, target, compiled) < 0.02


def test_a_fused_weight_is_edited_by_rows(compiled: Any) -> None:
    artifact = compiled("phi3")
    edits = {edit["parameter"]: edit["ops"] for edit in artifact.weight_edits}
    rows = [tuple(op["rows"]) for op in edits["model.layers.0.self_attn.qkv_proj.weight"]]
    assert sorted(rows) == [(0, 48), (48, 64), (64, 80)]


def test_a_norm_with_an_offset_is_shifted_by_any_sign(compiled: Any) -> None:
    artifact = compiled("gemma3")
    shift = artifact.constants[0]["kvant.k_norm_shift"]
    assert shift.shape == (2, 16)
    assert (shift < 0).any() or (shift > 0).any()
    names = {op["op"] for edit in artifact.weight_edits for op in edit["ops"]}
    assert "add" in names
    json.dumps(artifact.weight_edits)
    assert np.isfinite(shift).all()


def test_sinks_are_compared_with_the_models_own(compiled: Any) -> None:
    """Kernels read them from the artifact: a model that has others would be wrong silently."""
    model, artifact = make_model("gpt-oss"), compiled("gpt-oss")
    name = "model.layers.1.self_attn.sinks"
    sinks = model.get_parameter(name)
    was = float(sinks.detach()[0])
    with torch.no_grad():
        sinks[0] += 1.0
    with pytest.raises(KvantError) as caught:
        attach(model, artifact)
    assert str(caught.value) == (
        f"{name} begins a sample with {was + 1:.6g}, the compiled model's with {was:.6g}\n"
        "  where: attach(model, artifact)\n"
        "  fix: attach the weights that were compiled, or compile these  [wrong-weights]"
    )


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-oss"])
def test_a_prompt_is_packed_at_once(family: str, compiled: Any) -> None:
    """Whether SDPA or the cache attends it: no layer is left raw until the next token."""
    model, cache = attach(make_model(family), compiled(family))
    logits(model, tokens(), cache)
    held = cache.bytes()
    cache.flush()
    assert cache.bytes() == held
    streams = [s for layer in cache.packed.layers for s in layer.streams]
    assert all((s.encoded == s.length).all() for s in streams)


def test_a_model_that_passes_no_sinks_is_refused(compiled: Any) -> None:
    model, cache = attach(make_model("gpt-oss"), compiled("gpt-oss"))
    for layer in model.model.layers:
        layer.self_attn.sinks = None
    with pytest.raises(KvantError) as caught:
        logits(model, tokens(), cache)
    assert str(caught.value) == (
        "the model attends without learned sinks, the artifact with them\n"
        "  where: attention of layer 0\n"
        "  fix: compile this model  [wrong-structure]"
    )


def test_refuses_a_norm_that_cannot_hold_a_row_for_each_head(compiled: Any) -> None:
    model = make_model("qwen3")
    artifact = compiled("qwen3")
    for layer in model.model.layers:  # same numbers, but a norm that insists on its shape
        old = layer.self_attn.q_norm
        layer.self_attn.q_norm = torch.nn.RMSNorm(16, eps=old.variance_epsilon)
        layer.self_attn.q_norm.weight = old.weight
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(KvantError) as caught:
        attach(model, artifact)
    error = caught.value
    assert error.code == "unsupported-norm"
    name = "model.layers.0.self_attn.q_norm.weight"
    assert error.what.startswith(f"{name} cannot hold a row for each head: ")
    assert error.where == "attach(model, artifact)"
    assert error.fix == (
        "compile with a recipe that does not fold scales into norms (without smooth-k)"
    )
    assert model.config._attn_implementation != "kvant"
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
