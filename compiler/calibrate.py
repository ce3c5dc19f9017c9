"""Calibration: run the model once and record what its attention sees after RoPE.

For each layer, head and channel, over all tokens but the first few of each sequence:

    absmax = max_t |x[t]|          second moment = mean_t x[t]^2          x one of q, k, v

and of k and v the largest |x[t]|, from which a threshold is taken that few values are beyond.

The first tokens of a sequence are left out: their keys are far from all others in most models
("attention sinks"), and a range fitted to them fits nothing else. Everything runs in one thread and
in a fixed order, so that the same machine gives the same bits.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..ir.errors import KvantError
from ..ir.stats import LayerStats
from ..runtime.model_call import Call, torch_attention
from .bind import ModelSource
from .extras import need
from .texts import name_of

IMPLEMENTATION = "kvant-record"
TOKENS = 1024
"""Tokens that calibration reads if not told otherwise."""

_ROWS = 8  # sequences that the model generates side by side
_WINDOW = 256  # tokens of a sequence cut from a text
_SKIPPED = 4  # first tokens of each sequence that are not recorded
_LEAST_TOKENS = 64
_LARGEST = 64  # values of a channel of k and v that are kept

Tensor: TypeAlias = Any
Float64 = NDArray[np.float64]


@dataclass(slots=True)
class Moments:
    """What was seen of one of q, k, v in one layer.

    Attributes:
        absmax: f64[H, D].
        squares: f64[H, D], sum of squares.
        keep: how many of the largest values of each channel are kept; for queries none.
        largest: f64[at most keep, H, D], |x|, descending.
    """

    absmax: Float64 | float = 0.0
    squares: Float64 | float = 0.0
    keep: int = 0
    largest: Float64 | None = None

    def add(self, x: Tensor) -> None:
        """Take in x [B, H, T, D]."""
        values = x.double()
        sizes = values.abs()
        self.absmax = np.maximum(self.absmax, sizes.amax((0, 2)).numpy())
        self.squares = self.squares + values.square().sum((0, 2)).numpy()
        if self.keep:
            self.largest = _largest(self.largest, sizes, self.keep)


@dataclass(slots=True)
class Recorder:
    """An attention function that computes with the model's own SDPA and keeps statistics.

    Attributes:
        layers: q, k and v by layer index.
        tokens: tokens recorded so far, by layer index.
    """

    layers: dict[int, tuple[Moments, Moments, Moments]] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **keywords: Any
    ) -> Any:
        """Record q, k and v, [B, H, T, D], and attend."""
        layer = int(module.layer_idx)
        kept = (Moments(), Moments(keep=_LARGEST), Moments(keep=_LARGEST))
        moments = self.layers.setdefault(layer, kept)
        seen = query.shape[0] * max(0, query.shape[2] - _SKIPPED)
        for moment, x in zip(moments, (query, key, value), strict=True):
            if seen:  # the last window of a text may be no longer than what is left out
                moment.add(x[:, :, _SKIPPED:])
        self.tokens[layer] = self.tokens.get(layer, 0) + seen
        call = Call(module, keywords.get("scaling"), keywords)
        return torch_attention(query, key, value, mask, call), None

    def stats(self) -> dict[int, LayerStats]:
        """Return the statistics by layer index."""
        made = {}
        for layer, (q, k, v) in sorted(self.layers.items()):
            count = self.tokens[layer]
            means = [np.asarray(m.squares) / count for m in (k, q, v)]
            peaks = [np.asarray(m.absmax) for m in (k, q, v)]
            made[layer] = LayerStats(
                k_absmax=peaks[0],
                k_second_moment=means[0],
                q_absmax=peaks[1],
                q_second_moment=means[1],
                v_absmax=peaks[2],
                v_second_moment=means[2],
                tokens=count,
                k_largest=k.largest,
                v_largest=v.largest,
            )
        return made


def _largest(before: Float64 | None, sizes: Tensor, keep: int) -> Float64:
    """Return the largest of what was kept [R, H, D] and of sizes [B, H, T, D], descending."""
    import torch

    rows = sizes.permute(0, 2, 1, 3).flatten(0, 1)
    if before is not None:
        rows = torch.cat([torch.from_numpy(before), rows])
    return np.asarray(rows.topk(min(keep, len(rows)), 0).values.numpy())


def calibrate(
    source: ModelSource,
    text: str | Sequence[int] | None = None,
    tokens: int = TOKENS,
    seed: int = 0,
) -> dict[int, LayerStats]:
    """Return the statistics of every layer of a model.

    Args:
        source: the model; it is loaded in f32 and not changed.
        text: calibration text or token ids; if none, the model writes its own from its first token.
        tokens: tokens to read, at most; a shorter text is read whole.
        seed: of the text that the model writes.

    Raises: KvantError "too-little-text", or "no-tokenizer" for a text without a tokenizer.
    """
    torch = need("torch", "transformers")
    ids = None if text is None else token_ids(source, text, _LEAST_TOKENS, "calibration")[:tokens]
    model = source.load("float32")
    with _one_thread(), torch.inference_mode():
        if ids is None:
            batches = [own_text(model, tokens, seed)]
        else:
            window = min(_WINDOW, _most_positions(model))
            batches = [torch.tensor([ids[i : i + window]]) for i in range(0, len(ids), window)]
        with recording(model) as recorder:
            for batch in batches:
                # The head is not needed: statistics come from the layers alone.
                model.base_model(batch, use_cache=False)
    return recorder.stats()


def named(text: str | Sequence[int] | None) -> str:
    """Return what an artifact says of the text that it was calibrated on."""
    return f"text the model wrote itself, {TOKENS:,} tokens" if text is None else name_of(text)


def token_ids(source: ModelSource, text: str | Sequence[int], least: int, what: str) -> list[int]:
    """Return a text as token ids, without any special token; ids are passed through.

    Args:
        source: the model, for its tokenizer.
        text: text or ids.
        least: tokens that are needed.
        what: what they are needed for.

    Raises: KvantError "too-little-text" or "no-tokenizer".
    """
    if isinstance(text, str):
        tokenizer = source.tokenizer()
        # One long text on purpose: windows are cut from it, so its length is no concern.
        encoded = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    else:
        encoded = text
    ids = [int(i) for i in encoded]
    if len(ids) < least:
        raise KvantError(
            "too-little-text",
            f"the text has {len(ids)} tokens; {what} needs {least}",
            where=f"the {what.removeprefix('the ')} text",
            fix=f"give a text of about {least * 6} characters of prose or more",
        )
    return ids


def own_text(model: Any, tokens: int, seed: int) -> Tensor:
    """Let a model write sequences from its first token, sampled at temperature 1.

    Returns: int64[8, ceil(tokens / 8)], shorter where the model takes no more positions; the same
        for the same model, seed and machine.
    """
    import torch
    from transformers import DynamicCache

    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((_ROWS, 1), _first_token(model))
    cache = DynamicCache(config=model.config)
    for _ in range(min(-(-tokens // _ROWS), _most_positions(model)) - 1):
        scores = model(ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
        chosen = torch.multinomial(scores.float().softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, chosen], 1)
    return ids


def _most_positions(model: Any) -> int:
    """Return the most tokens that a model takes: learned positions end there."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30)


def _first_token(model: Any) -> int:
    """Return the token that begins a text: BOS, or for a model without one EOS, or token 0."""
    text = model.config.get_text_config()
    for owner in (model.generation_config, text):
        for name in ("bos_token_id", "eos_token_id"):
            token = getattr(owner, name, None)
            token = token[0] if isinstance(token, list | tuple) and token else token
            if isinstance(token, int) and token < text.vocab_size:
                return token
    return 0


@contextmanager
def recording(model: Any) -> Iterator[Recorder]:
    """Let a model attend through a recorder."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    recorder, before = Recorder(), model.config._attn_implementation
    AttentionInterface.register(IMPLEMENTATION, recorder)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    model.set_attn_implementation(IMPLEMENTATION)
    try:
        yield recorder
    finally:
        model.set_attn_implementation(before)
        AttentionInterface._global_mapping.pop(IMPLEMENTATION, None)
        AttentionMaskInterface._global_mapping.pop(IMPLEMENTATION, None)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute in one thread, so that sums are made in one order."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
