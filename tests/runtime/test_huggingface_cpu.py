"""The adapter with compiled CPU kernels: every way to decode, on a tiny random Llama.

What is stored loses nothing (groups of one channel, whose minimum is the value itself), so every
text must be that of the plain model, whatever is packed, cropped, copied or padded on the way.
"""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import kvant
from kvant.ir.errors import KvantError
from kvant.runtime.artifact import Artifact
from kvant.runtime.huggingface import attach, detach

STREAM = 'format = "int"\nbits = 8\naxis = "token"\ngroup = 1\nparams = "f32"\n'
RECIPE = f'name = "lossless"\n[k]\n{STREAM}recent = 5\n[v]\n{STREAM}sink = 2\n'
PAGE = 64


def make() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    made: PreTrainedModel = LlamaForCausalLM(config).eval()
    return made


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make()


@pytest.fixture(scope="module")
def artifact(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("cpu")
    (folder / "lossless.toml").write_text(RECIPE)
    made = kvant.compile(model, folder / "lossless.toml", ["cpu"], out=folder / "tiny.kvant")
    assert made.target.startswith("cpu")
    return made


@pytest.fixture
def plain() -> PreTrainedModel:
    """The same model, never attached."""
    return make()


@pytest.fixture
def cache(model: PreTrainedModel, artifact: Artifact) -> Any:
    _, cache = attach(model, artifact)
    yield cache
    detach(model)


def prompt(rows: int = 1, tokens: int = 70, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, 97, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def generate(model: PreTrainedModel, ids: torch.Tensor, cache: Any = None, **options: Any) -> Any:
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0} | options
    options.setdefault("attention_mask", torch.ones_like(ids))
    torch.manual_seed(7)
    return model.generate(ids, past_key_values=cache, **options)


def logits(model: PreTrainedModel, ids: torch.Tensor, cache: Any = None, **options: Any) -> Any:
    with torch.no_grad():
        return model(ids, past_key_values=cache, **options).logits


def left_padded(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids, width = prompt(len(lengths), max(lengths)), max(lengths)
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True},
        {"num_beams": 3, "num_return_sequences": 2},
        {"prefill_chunk_size": 32},
    ],
    ids=["greedy", "sampled", "beams", "chunks"],
)
def test_text_is_that_of_the_plain_model(
    model: PreTrainedModel, plain: PreTrainedModel, cache: Any, options: dict[str, Any]
) -> None:
    ids = prompt(2)
    expected = generate(plain, ids, **options)
    assert torch.equal(generate(model, ids, cache, **options), expected)
    assert len(expected[0, 70:].unique()) > 5, "the text is too dull to prove anything"


def test_prompt_lookup_is_greedy_text(
    model: PreTrainedModel, plain: PreTrainedModel, cache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = prompt(tokens=12).repeat(1, 6)
    expected = generate(plain, ids, max_new_tokens=40)
    crops, crop = [], cache.crop
    monkeypatch.setattr(cache, "crop", lambda count: (crops.append(count), crop(count)))
    found = generate(model, ids, cache, max_new_tokens=40, prompt_lookup_num_tokens=5)
    assert torch.equal(found, expected)
    assert min(crops) < 0, "no draft was rejected"


def test_left_padded_rows_are_each_row_alone(
    model: PreTrainedModel, plain: PreTrainedModel, cache: Any
) -> None:
    ids, mask = left_padded(130, 17, 64, 1)
    new = prompt(4, 70, seed=5)

    def run(ids: torch.Tensor, mask: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        cache.reset()
        parts = []
        for part in (ids, *new.split([1, 60, 1, 1, 7], 1)):
            if part is not ids:
                mask = torch.cat([mask, mask.new_ones(part.shape)], 1)
            at = (mask.cumsum(1) - 1).clamp(min=0)[:, -part.shape[1] :]
            parts.append(logits(model, part, cache, attention_mask=mask, position_ids=at))
        return torch.cat([parts[0][:, -1:], *parts[1:]], 1)

    together = run(ids, mask, new)
    for row, length in enumerate(mask.sum(1).tolist()):
        own = slice(row, row + 1), slice(130 - length, None)
        alone = run(ids[own], mask[own], new[own[0]])
        error = float((together[row] - alone[0]).abs().max() / alone.abs().max())
        assert error < 1e-5, f"row {row}: {error}"
        whole = logits(plain, torch.cat([ids[own], new[own[0]]], 1))[:, length - 1 :]
        error = float((alone - whole).abs().max() / whole.abs().max())
        assert error < 1e-5, f"row {row} against the plain model: {error}"


def test_pages_and_their_boundaries(
    model: PreTrainedModel, plain: PreTrainedModel, cache: Any
) -> None:
    ids = prompt(tokens=5 * PAGE + 3)
    expected = logits(plain, ids)
    for first in (1, PAGE - 1, PAGE, PAGE + 2, 3 * PAGE + 1):
        cache.reset()
        parts = [logits(model, ids[:, :first], cache)]
        for at in range(first, ids.shape[1], PAGE):
            parts.append(logits(model, ids[:, at : min(at + PAGE, ids.shape[1])], cache))
        error = (torch.cat(parts, 1) - expected).abs().max() / expected.abs().max()
        assert error < 1e-5, f"prompt of {first}: {error}"
    assert cache.get_seq_length() == ids.shape[1]


def test_several_prompts_then_crop_and_reset(
    model: PreTrainedModel, plain: PreTrainedModel, cache: Any
) -> None:
    for rows, tokens in ((1, 90), (3, 20), (2, 65)):
        ids = prompt(rows, tokens)
        assert torch.equal(generate(model, ids, cache), generate(plain, ids)), (rows, tokens)
        cache.reset()
        assert (cache.bytes(), cache.get_seq_length()) == (0, 0)
    ids, other = prompt(tokens=80), prompt(tokens=9, seed=3)
    logits(model, ids, cache)
    first = logits(model, other, cache)
    cache.crop(-9)
    assert cache.get_seq_length() == 80
    # The second pass finds all 80 packed; so does the first: nothing is lost by packing.
    assert (logits(model, other, cache) - first).abs().max() < 1e-5 * first.abs().max()


def test_detach_is_bit_for_bit(artifact: Artifact) -> None:
    fresh, ids = make(), prompt()
    before = {name: p.detach().clone() for name, p in fresh.named_parameters()}
    expected, implementation = logits(fresh, ids), fresh.config._attn_implementation
    _, cache = attach(fresh, artifact)
    generate(fresh, ids, cache)
    detach(fresh)
    assert fresh.config._attn_implementation == implementation
    assert all(torch.equal(p, before[name]) for name, p in fresh.named_parameters())
    assert torch.equal(logits(fresh, ids), expected)
    with pytest.raises(KvantError) as caught:
        logits(fresh, ids, cache)
    assert str(caught.value) == (
        "the cache was passed to a model that is not attached to its artifact\n"
        "  where: layer 0\n"
        "  fix: pass the cache to the model that attach returned, and do not detach it before"
        "  [not-attached]"
    )
