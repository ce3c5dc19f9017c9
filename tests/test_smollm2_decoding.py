"""Every way to decode with the packed cache, on the real SmolLM2 and compiled CPU kernels.

A float rounding that differs between a batch and a row flips a code here and there, and one code
avalanches through 30 layers. So rows are compared in two steps: with the same k, v and q a row of
a batch is the row alone bit for bit; and whole logits differ less than the recipe itself costs.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kvant
from kvant.compiler import recipe as recipes
from kvant.compiler.bind import ModelSource, open_model
from kvant.compiler.extras import find_packaged_smollm2
from kvant.compiler.texts import demo_text
from kvant.runtime.cache import Cache

pytestmark = [pytest.mark.model, pytest.mark.long]

# Mean KL between a row of a batch and the row alone; the recipes themselves cost 0.003 to 0.02.
RECIPES = {"kivi-4bit": 1e-4, "int4-token": 0.01, "quarot-kv4": 0.01, "qserve-kv4": 0.02}
LENGTHS = (330, 17, 200, 1)


@pytest.fixture(scope="module")
def source() -> ModelSource:
    return open_model(find_packaged_smollm2())


@pytest.fixture(scope="module")
def ids(source: ModelSource) -> Any:
    import torch

    return torch.tensor([source.tokenizer()(demo_text()[:8000])["input_ids"]])


@pytest.fixture(scope="module", params=RECIPES)
def attached(request: Any, source: ModelSource, tmp_path_factory: Any) -> Any:
    """Give the recipe, the attached model and its cache; afterwards the weights are as before."""
    import torch

    from kvant.runtime.huggingface import attach, detach

    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("decoding") / "smollm2.kvant"
    artifact = kvant.compile(source, request.param, ["cpu"], out=out)
    model = source.load("float32")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model, cache = attach(model, artifact)
    yield request.param, model, cache
    detach(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def text(model: Any, ids: Any, cache: Any, tokens: int = 24, **options: Any) -> Any:
    import torch

    cache.reset()
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None} | options
    options.setdefault("attention_mask", torch.ones_like(ids))
    torch.manual_seed(3)
    return model.generate(ids, past_key_values=cache, max_new_tokens=tokens, **options)


def logits(model: Any, ids: Any, cache: Any, **options: Any) -> Any:
    import torch

    with torch.inference_mode():
        return model(ids, past_key_values=cache, **options).logits


def divergence(p: Any, q: Any) -> float:
    """Return the mean KL(p || q) of logits."""
    log_p, log_q = (x.double().log_softmax(-1) for x in (p, q))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 3}], ids=str)
def test_the_same_text_every_time(attached: Any, ids: Any, options: dict[str, Any]) -> None:
    _, model, cache = attached
    first = text(model, ids[:, :200], cache, **options)
    assert (first == text(model, ids[:, :200], cache, **options)).all()
    assert cache.get_seq_length() == 223


def test_prompt_lookup(attached: Any, ids: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens of a draft read each other as given; without a raw window that is not greedy's.

    With one, what differs is what integers round of one query, and not of several: see the next.
    """
    recipe, model, cache = attached
    crops, crop = [], cache.crop
    monkeypatch.setattr(cache, "crop", lambda count: (crops.append(count), crop(count)))
    for prompt in prompts(ids):
        size = prompt.shape[1]
        greedy = text(model, prompt, cache, 60)
        found = text(model, prompt, cache, 60, prompt_lookup_num_tokens=5)
        same = (greedy == found)[0].tolist()
        if not all(same):
            at = same.index(False)
            cache.reset()
            logits(model, greedy[:, :size], cache)
            last = [logits(model, greedy[:, i : i + 1], cache) for i in range(size, at)]
            scores = last[-1][0, -1] if last else logits(model, greedy[:, :size], cache)[0, -1]
            most = 0.1 if recipe == "kivi-4bit" else 2.0
            assert scores[greedy[0, at]] - scores[found[0, at]] < most, "not a near tie"
    assert min(crops) < 0, "no draft was rejected"


def test_prompt_lookup_in_floats_is_greedys(source: ModelSource, ids: Any, tmp_path: Path) -> None:
    """With a raw window, and nothing rounded but what is stored, a draft's tokens are greedy's."""
    from kvant.runtime.huggingface import attach

    recipe, _ = recipes.load("kivi-4bit")
    floats = recipe.model_copy(update={"compute": "float"})
    artifact = kvant.compile(source, floats, ["cpu"], out=tmp_path / "floats.kvant")
    model, cache = attach(source.load("float32"), artifact)
    for prompt in prompts(ids):
        greedy = text(model, prompt, cache, 60)
        assert (greedy == text(model, prompt, cache, 60, prompt_lookup_num_tokens=5)).all()


def prompts(ids: Any) -> Any:
    """Return a prompt that repeats itself, so that drafts are found, and one that does not."""
    return ids[:, :60].repeat(1, 4), ids[:, 300:500]


def padded(ids: Any) -> tuple[Any, Any, Any]:
    """Return left-padded prompts, their mask, and 40 more tokens of each row."""
    import torch

    width = max(LENGTHS)
    mask = (torch.arange(width) >= width - torch.tensor(LENGTHS)[:, None]).long()
    rows = [ids[0, 37 * i : 37 * i + width] for i in range(len(LENGTHS))]
    return torch.stack(rows) * mask, mask, ids[:, 1000:1040].repeat(len(LENGTHS), 1)


def run(model: Any, cache: Any, prompt: Any, mask: Any, more: Any) -> Any:
    """Return the logits after a prompt and of the tokens that follow, in pieces."""
    import torch

    cache.reset()
    parts = []
    for piece in (prompt, *more.split([1, 17, 1, 21], 1)):
        if piece is not prompt:
            mask = torch.cat([mask, mask.new_ones(piece.shape)], 1)
        at = (mask.cumsum(1) - 1).clamp(min=0)[:, -piece.shape[1] :]
        parts.append(logits(model, piece, cache, attention_mask=mask, position_ids=at))
    return torch.cat([parts[0][:, -1:], *parts[1:]], 1)


def test_rows_of_a_padded_batch_are_each_row_alone(attached: Any, ids: Any) -> None:
    recipe, model, cache = attached
    prompt, mask, more = padded(ids)
    together = run(model, cache, prompt, mask, more)
    for row, length in enumerate(LENGTHS):
        own = slice(row, row + 1), slice(max(LENGTHS) - length, None)
        alone = run(model, cache, prompt[own], mask[own], more[own[0]])
        assert divergence(alone, together[own[0]]) < RECIPES[recipe], f"row {row}"


def test_rows_with_the_same_tensors_are_bit_for_bit(
    attached: Any, ids: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model, cache = attached
    calls: list[tuple[str, int, tuple[Any, ...], Any]] = []

    def recorded(name: str) -> Callable[..., Any]:
        method = getattr(Cache, name)

        def call(self: Cache, layer: int, *tensors: Any) -> Any:
            result = method(self, layer, *tensors)
            if layer in (0, 29):
                calls.append((name, layer, tuple(t.clone() for t in tensors), result))
            return result

        return call

    with monkeypatch.context() as patch:
        for name in ("append", "attend", "flush_layer"):
            patch.setattr(Cache, name, recorded(name))
        run(model, cache, *padded(ids))
    for row, length in enumerate(LENGTHS):
        skip = max(LENGTHS) - length
        alone = cache.artifact.new_cache(batch=1, max_tokens=1024)
        for name, layer, tensors, result in calls:
            own = [t[row : row + 1] for t in tensors]
            if name == "append" and alone.layers[layer].columns.length == 0:
                own = [t[:, :, skip:] for t in own]
            found = getattr(alone, name)(layer, *own)
            if name == "attend":
                assert (found == result[row : row + 1]).all(), f"row {row}, layer {layer}"
    assert {name for name, *_ in calls} == {"append", "attend", "flush_layer"}


def test_crop_forgets_what_it_removes(attached: Any, ids: Any) -> None:
    _, model, cache = attached
    cache.reset()
    logits(model, ids[:, :200], cache)
    expected = logits(model, ids[:, 200:207], cache)
    cache.crop(-7)
    assert cache.get_seq_length() == 200
    assert (logits(model, ids[:, 200:207], cache) == expected).all()


def test_a_long_prompt_in_blocks_stays_close(attached: Any, ids: Any, source: ModelSource) -> None:
    import torch

    _, model, cache = attached
    plain = source.load("float32")
    expected = logits(plain, ids[:, :1100], None)[:, 1000:]
    cache.reset()
    logits(model, ids[:, :1000], cache)
    found = torch.cat(
        [logits(model, ids[:, at : at + 50], cache) for at in range(1000, 1100, 50)], 1
    )
    assert 0 < divergence(expected, found) < 0.05
