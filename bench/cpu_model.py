"""SmolLM2-135M as a user runs it: storing a token in all layers, and `generate` at 8k context.

The text is prose from Python's own documentation. Both sides of a pair run under all cores given.
"""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cpu_measure

import kvant
from kvant.compiler.bind import open_model
from kvant.compiler.debug import NUM_THREADS
from kvant.compiler.texts import demo_text

RECIPE = "kivi-4bit"
STORED = ("int4-token", "kivi-4bit")
FILLED = 1024  # tokens in the cache when appends begin
ROOM = 1 << 16  # tokens that a cache of appends can hold
PROMPT = 8001  # tokens, 8000 of them cached (hqq wants them even); all stays below 8,192
FEW = 16  # tokens of the prompt where attention costs next to nothing
NEW = 4  # tokens of one call of generate, for each row
ROUNDS = 5


@dataclass(frozen=True)
class Generated:
    """Which cache of transformers `generate` is compared with, for how many rows at once."""

    quantized: bool
    batch: int


GENERATED = {
    "generate": Generated(quantized=False, batch=1),
    "generate-quantized": Generated(quantized=True, batch=1),
    "generate-batch": Generated(quantized=False, batch=4),
    "generate-quantized-batch": Generated(quantized=True, batch=4),
}
BACKENDS = {"quanto": {"axis_key": 0, "axis_value": 0}, "hqq": {"axis_key": 1, "axis_value": 1}}
HQQ = Path(sys.prefix) / "bench-hqq"  # beside the other packages: transformers always imports it


def measure(name: str, root: Path, even_if_busy: bool) -> list[dict[str, Any]]:
    """Return the rows of one thing: "append", or one of GENERATED.

    Args:
        name: what.
        root: folder for artifacts, kept between calls.
        even_if_busy: see `cpu_measure.measure`.
    """
    cores = len(os.sched_getaffinity(0))
    os.environ[NUM_THREADS.name] = str(cores)
    if name in GENERATED and GENERATED[name].quantized:
        sys.path.append(str(HQQ))
    import torch

    torch.set_num_threads(cores)
    if name == "append":
        return [_append(recipe, root, even_if_busy) for recipe in STORED]
    with torch.inference_mode():
        return [_generate(name, root, even_if_busy)]


def _artifact(recipe: str, root: Path) -> Any:
    folder = root / f"smollm2-{recipe}.kvant"
    if folder.exists():
        return kvant.load(folder, target="cpu")
    return kvant.compile(open_model("smollm2"), recipe, ["cpu"], out=folder)


def _append(recipe: str, root: Path, even_if_busy: bool) -> dict[str, Any]:
    """Store one token in every layer, as bf16 tensors of torch, against a copy of torch's.

    The peer copies into a preallocated cache and quantizes nothing. Turns are long enough that ours
    encodes several groups in each.
    """
    import torch

    artifact = _artifact(recipe, root)
    plan, layers = artifact.plan_of(0), artifact.layer_count
    size = (1, plan.k.heads, 1, plan.k.channels)
    tokens = [torch.randn(2, *size, dtype=torch.bfloat16).unbind() for _ in range(layers)]
    cache = artifact.new_cache(batch=1, max_tokens=ROOM)
    copies = torch.zeros(layers, 2, 1, plan.k.heads, ROOM, plan.k.channels, dtype=torch.bfloat16)
    pairs = [copy.unbind() for copy in copies]
    for layer in range(layers):
        first = torch.randn(2, 1, plan.k.heads, FILLED, plan.k.channels).bfloat16()
        cache.append(layer, *first)
    at = FILLED

    def ours() -> None:
        for layer, (k, v) in enumerate(tokens):
            cache.append(layer, k, v)

    def peer() -> None:
        nonlocal at
        for (k, v), (k_copy, v_copy) in zip(tokens, pairs, strict=True):
            k_copy[:, :, at : at + 1].copy_(k)
            v_copy[:, :, at : at + 1].copy_(v)
        at += 1

    found = cpu_measure.measure(ours, peer, rounds=ROUNDS, even_if_busy=even_if_busy)
    return {"what": f"append-{recipe}"} | found | {"detail": _per_token(found, 1)}


def _generate(name: str, root: Path, even_if_busy: bool) -> dict[str, Any]:
    """Continue a long prompt by a few tokens again and again, each side from its own cache."""
    from kvant.runtime.huggingface import attach

    artifact, source = _artifact(RECIPE, root), open_model("smollm2")
    against, plain = GENERATED[name], source.load("float32")
    prompt = source.tokenizer()(demo_text(), return_tensors="pt")["input_ids"][:, :PROMPT]
    history = _history(plain, prompt, root, against.batch)
    prompt = prompt.repeat(against.batch, 1)
    model, cache = attach(source.load("float32"), artifact)
    ours = _continue(model, cache, prompt)
    if against.quantized:
        peer, what = _quantized(plain, prompt, history)
    else:
        peer, what = _plain(plain, prompt, history), "DynamicCache"
    free = _plain(plain, prompt[:, :FEW], [])
    found = cpu_measure.measure(ours, peer, third=free, rounds=ROUNDS, even_if_busy=even_if_busy)
    tokens = NEW * against.batch
    detail = f"{what}, {_per_token(found, tokens)}{_at_most(found, tokens)}"
    return {"what": name, "context": PROMPT, "batch": against.batch} | found | {"detail": detail}


def _history(model: Any, prompt: Any, root: Path, batch: int) -> list[tuple[Any, Any]]:
    """Return keys and values of each layer for a prompt without its last token, in equal rows.

    Those of one row are kept in root.
    """
    from safetensors.torch import load_file, save_file
    from transformers import DynamicCache

    path = root / "prompt.safetensors"
    layers = model.config.num_hidden_layers
    if not path.exists():
        cache = DynamicCache(config=model.config)
        model(prompt[:, :-1], past_key_values=cache, logits_to_keep=1)
        kept = {f"k{i}": cache.layers[i].keys for i in range(layers)}
        kept |= {f"v{i}": cache.layers[i].values for i in range(layers)}
        save_file({name: x.contiguous() for name, x in kept.items()}, path)
    stored = load_file(path)
    rows = {name: x.repeat(batch, 1, 1, 1) for name, x in stored.items()}
    return [(rows[f"k{i}"], rows[f"v{i}"]) for i in range(layers)]


def _filled(cache: Any, history: list[tuple[Any, Any]]) -> Any:
    """Return a cache of transformers that has read the history, as a forward pass hands it over."""
    for layer, (k, v) in enumerate(history):
        cache.update(k, v, layer)
    return cache


def _continue(model: Any, cache: Any, prompt: Any) -> Callable[[], None]:
    """Return a call that generates NEW tokens more; what the cache lacks is read here."""
    import torch

    ids = prompt

    def more() -> None:
        nonlocal ids
        ids = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
        )

    more()
    return more


def _plain(model: Any, prompt: Any, history: list[tuple[Any, Any]]) -> Callable[[], None]:
    from transformers import DynamicCache

    return _continue(model, _filled(DynamicCache(config=model.config), history), prompt)


def _quantized(
    model: Any, prompt: Any, history: list[tuple[Any, Any]]
) -> tuple[Callable[[], None], str]:
    """Return the call over a QuantizedCache of 4 bits, under the faster of its backends."""
    from transformers import QuantizedCache

    best: tuple[float, Callable[[], None], str] | None = None
    for backend, axes in BACKENDS.items():
        cache = _filled(QuantizedCache(backend, model.config, nbits=4, **axes), history)
        call = _continue(model, cache, prompt)
        begin = time.perf_counter()
        call()
        took = time.perf_counter() - begin
        if best is None or took < best[0]:
            best = took, call, f"QuantizedCache of {backend}"
    if best is None:
        raise ValueError("no backend")
    return best[1], best[2]


def _at_most(found: dict[str, Any], tokens: int) -> str:
    """Return how fast all but attention is, and what ratio no attention could exceed."""
    if "refused" in found:
        return ""
    free = found["third_ms"]["median"]
    rate, ratio = 1e3 * tokens / free, found["peer_ms"]["median"] / free
    share = free / found["ours_ms"]["median"]
    return (
        f"; with a context of some tens of tokens {rate:,.1f} tokens/s, which is {share:.0%} of "
        f"our time: no attention reaches more than {ratio:.2f}"
    )


def _per_token(found: dict[str, Any], tokens: int) -> str:
    """Return tokens a second of both sides; nothing where there is no number."""
    if "refused" in found:
        return ""
    ours, peer = (1e3 * tokens / found[side]["median"] for side in ("ours_ms", "peer_ms"))
    return f"{ours:,.1f} and {peer:,.1f} tokens/s"
