"""Quality: the quantized model against the unquantized one, on the same tokens, in the same run.

Teacher-forced in blocks through the real packed cache, never one pass with fake quantization:

    prompt      1,024 tokens, attended exactly by both models, then stored
    blocks      64 tokens each; their queries read the history as stored, and each other as given

Both models see the same tokens in the same blocks. What is compared are the distributions of the
next token at every position after the prompt:

    KL(full || quantized) = sum_w p(w) (log p(w) - log q(w))

A flipped code avalanches through the layers, so even two exact kernels differ. `kl_noise_floor` is
that difference: the KL between this target and the reference kernels, at the same recipe.
"""

import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..ir.errors import KvantError
from ..ir.plan import AttentionPlan, StreamPlan
from .bind import ModelSource
from .calibrate import token_ids
from .extras import need
from .statistics import Floats, kl, log_softmax, mean, p99, perplexity, with_interval
from .texts import name_of

if TYPE_CHECKING:
    from ..runtime.artifact import Artifact

CONTEXT = 2048
"""Tokens of a window at most, prompt included; longer evaluations use several windows."""

_NOISE_TOKENS = 128  # the reference is slow: the noise floor is measured on the first of them

Model: TypeAlias = Any


@dataclass(frozen=True, slots=True, eq=False)
class Quality:
    """What an evaluation found. Arrays have one value for each scored token, in order.

    Attributes:
        summary: the stable keys of `kvant eval`.
        kl: KL(full || quantized), nats.
        nll_full: -log p of the true next token, unquantized, nats.
        nll_kvant: the same, quantized.
        agrees: whether both models prefer the same token.
        prompt: tokens before the first scored one.
        noise_tokens: tokens on which the noise floor was measured.
    """

    summary: dict[str, float | int | str]
    kl: Floats
    nll_full: Floats
    nll_kvant: Floats
    agrees: NDArray[np.bool_]
    prompt: int
    noise_tokens: int

    def to_json(self) -> dict[str, float | int | str]:
        """Return the stable keys, without the arrays."""
        return dict(self.summary)


@dataclass(frozen=True, slots=True)
class Protocol:
    """How a text is fed.

    Attributes:
        prompt: tokens before the first scored one, in each window.
        block: tokens of a forward pass after the prompt.
        window: scored tokens of a window, at most.
        tokens: scored tokens in all.
    """

    prompt: int
    block: int
    window: int
    tokens: int

    @property
    def needed(self) -> int:
        """Tokens of text: each window is a new one, and its last token is only predicted."""
        return math.ceil(self.tokens / self.window) * (self.prompt + 1) + self.tokens

    def windows(self, ids: Sequence[int]) -> Iterator[list[int]]:
        """Yield the tokens of each window: its prompt, its scored tokens and one more."""
        at, left = 0, self.tokens
        while left:
            scored = min(self.window, left)
            end = at + self.prompt + scored + 1
            yield list(ids[at:end])
            at, left = end, left - scored


def evaluate(
    artifact: "Artifact",
    source: ModelSource,
    text: str | Sequence[int],
    tokens: int = 512,
    prompt: int = 1024,
    block: int = 64,
    context: int = CONTEXT,
) -> Quality:
    """Compare a model through the packed cache of an artifact with the model as it is.

    Args:
        artifact: with the target to measure.
        source: the model that was compiled.
        text: prose that was not used for calibration, or token ids.
        tokens: scored tokens, after the prompt.
        prompt: tokens of each window before the first scored one.
        block: tokens of a forward pass after the prompt.
        context: tokens of a window at most, prompt included.

    Raises: KvantError "too-little-text", "text-not-held-out", "bad-protocol", or what `attach`
        refuses.
    """
    torch = need("torch", "transformers")
    from transformers import DynamicCache

    from ..runtime.huggingface import attach, detach

    protocol = _protocol(source, tokens, prompt, block, context)
    name = _held_out(artifact, text)
    ids = token_ids(source, text, protocol.needed, "the evaluation")
    model = source.load("float32")
    vocabulary = int(model.config.get_text_config().vocab_size)
    with torch.inference_mode(), tempfile.TemporaryFile() as one, tempfile.TemporaryFile() as two:
        full = _on_disk(one, tokens, vocabulary)
        for at, logits in forward(model, partial(DynamicCache, config=model.config), protocol, ids):
            full[at : at + len(logits)] = logits
        packed = _on_disk(two, min(tokens, _NOISE_TOKENS), vocabulary)
        _, cache = attach(model, artifact)
        try:
            scores = _score(model, cache, protocol, ids, full, packed)
            noise = _noise_floor(model, artifact, protocol, ids, packed)
        finally:
            detach(model)
    return Quality(
        summary=_summary(scores, artifact, protocol) | {"kl_noise_floor": noise, "text": name},
        kl=scores.kl,
        nll_full=scores.nll_full,
        nll_kvant=scores.nll,
        agrees=scores.agrees,
        prompt=prompt,
        noise_tokens=len(packed),
    )


def _protocol(source: ModelSource, tokens: int, prompt: int, block: int, context: int) -> Protocol:
    limit = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    room = min(context, limit or context) - prompt
    if min(tokens, prompt, block) < 1 or room < 1:
        raise KvantError(
            "bad-protocol",
            f"{tokens} tokens in blocks of {block} after a prompt of {prompt} do not fit a context "
            f"of {room + prompt}",
            where="evaluate",
            fix="give positive numbers, and a prompt shorter than the context",
        )
    return Protocol(prompt, block, min(room, tokens), tokens)


def _held_out(artifact: "Artifact", text: str | Sequence[int]) -> str:
    """Return what to call the text, unless the artifact was calibrated on it."""
    name = name_of(text)
    if name == artifact.calibration:
        raise KvantError(
            "text-not-held-out",
            f"the artifact was calibrated on this very text ({name})",
            where="the evaluation text",
            fix="evaluate on another text, or compile with another one",
        )
    return name


def _on_disk(file: Any, tokens: int, vocabulary: int) -> NDArray[np.float32]:
    """Return an array [tokens, vocabulary] that is kept in a file: 200 KB a token adds up."""
    return np.memmap(file, np.float32, mode="w+", shape=(tokens, vocabulary))


def forward(
    model: Model, new_cache: Callable[[], Any], protocol: Protocol, ids: Sequence[int]
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Feed a text by a protocol.

    Args:
        model: a causal language model.
        new_cache: gives an empty cache for each window.
        protocol: how.
        ids: the text.

    Yields: for each block the index of its first scored token, and logits f32[n, V].
    """
    import torch

    done = 0
    for window in protocol.windows(ids):
        cache, tokens = new_cache(), torch.tensor([window])
        model(tokens[:, : protocol.prompt], past_key_values=cache, logits_to_keep=1)
        for at in range(protocol.prompt, len(window) - 1, protocol.block):
            block = tokens[:, at : min(at + protocol.block, len(window) - 1)]
            logits = model(block, past_key_values=cache).logits[0].float().numpy()
            yield done, logits
            done += len(logits)


@dataclass(frozen=True, slots=True, eq=False)
class _Scores:
    """Arrays by scored token, and the bytes of the cache after the first window."""

    kl: Floats
    nll_full: Floats
    nll: Floats
    agrees: NDArray[np.bool_]
    bytes: int
    length: int


def _score(
    model: Model,
    cache: Any,
    protocol: Protocol,
    ids: Sequence[int],
    full: NDArray[np.float32],
    packed: NDArray[np.float32],
) -> _Scores:
    """Run the quantized model and compare it block by block; keep its first logits in `packed`."""
    truth = [t for window in protocol.windows(ids) for t in window[protocol.prompt + 1 :]]
    columns: list[tuple[Floats, ...]] = []
    size = length = 0
    for at, logits in forward(model, partial(_emptied, cache), protocol, ids):
        end = at + len(logits)
        packed[at:end] = logits[: max(0, len(packed) - at)]
        columns.append(_compare(full[at:end], logits, np.asarray(truth[at:end])))
        if end == protocol.window:  # the first window is whole
            cache.flush()
            size, length = cache.bytes(), cache.get_seq_length()
    kl, nll_full, nll, agrees = (np.concatenate(column) for column in zip(*columns, strict=True))
    return _Scores(kl, nll_full, nll, agrees.astype(bool), size, length)


def _emptied(cache: Any) -> Any:
    cache.reset()
    return cache


def _compare(full: Any, quantized: Any, truth: Any) -> tuple[Floats, ...]:
    """Return KL, both losses and agreement of logits [n, V], in float64."""
    log_p, log_q = log_softmax(full), log_softmax(quantized)
    rows = np.arange(len(truth))
    agrees = full.argmax(-1) == quantized.argmax(-1)
    return kl(log_p, log_q), -log_p[rows, truth], -log_q[rows, truth], agrees


def _noise_floor(
    model: Model,
    artifact: "Artifact",
    protocol: Protocol,
    ids: Sequence[int],
    packed: NDArray[np.float32],
) -> float:
    """Return the mean KL(this target || reference kernels) over the first tokens."""
    from ..runtime.artifact import load
    from ..runtime.huggingface import attach

    if artifact.target == "reference":
        return 0.0
    _, cache = attach(model, load(artifact.path, target="reference", id=artifact.id))
    short = replace(protocol, tokens=len(packed))
    parts = [
        kl(log_softmax(packed[at : at + len(logits)]), log_softmax(logits))
        for at, logits in forward(model, partial(_emptied, cache), short, ids)
    ]
    return max(0.0, float(np.concatenate(parts).mean()))


def _summary(
    scores: _Scores, artifact: "Artifact", protocol: Protocol
) -> dict[str, float | int | str]:
    elements = sum(plan.elements_per_token for plan in artifact.plans)
    return {
        **with_interval("perplexity_full", scores.nll_full, perplexity),
        **with_interval("perplexity", scores.nll, perplexity),
        **with_interval("kl_mean", scores.kl, mean),
        **with_interval("kl_p99", scores.kl, p99),
        **with_interval("top1", scores.agrees.astype(np.float64), mean),
        "bits_per_element": 8.0 * scores.bytes / (scores.length * elements),
        "packed_share": packed_share(artifact.plans, protocol),
        "cache_bytes_per_token": scores.bytes / scores.length,
        "tokens": protocol.tokens,
        "context": scores.length,
        "recipe": artifact.recipe,
        "target": artifact.target,
    }


def packed_share(plans: Sequence[AttentionPlan], protocol: Protocol) -> float:
    """Return the share of the keys and values that scored queries read in quantized form."""
    packed = total = 0
    windows = [protocol.window] * (protocol.tokens // protocol.window)
    windows += [protocol.tokens % protocol.window]
    queries = [
        (protocol.prompt + at, i)
        for scored in windows
        for at in range(0, scored, protocol.block)
        for i in range(min(protocol.block, scored - at))
    ]
    for plan, layers in Counter(plans).items():
        for stream in (plan.k, plan.v):
            for history, i in queries:
                quantized, all_ = _read(plan.window, stream, history, i)
                packed, total = packed + layers * quantized, total + layers * all_
    return packed / total


def _read(window: int | None, stream: StreamPlan, history: int, i: int) -> tuple[int, int]:
    """Return how many tokens query i of a block reads, quantized and in all."""
    tokens, end = stream.tokens, history + i + 1
    begin = 0 if window is None else max(0, end - window)
    if not tokens.quantizes:
        return 0, end - begin
    return max(0, tokens.encoded_end(history) - max(begin, tokens.sink)), end - begin
