"""Generate text through the packed cache, streaming, with the figures a user asks for."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..ir.errors import KvantError
from .bind import ModelSource
from .extras import need

if TYPE_CHECKING:
    from ..runtime.artifact import Artifact


def generate(
    artifact: "Artifact",
    source: ModelSource,
    prompt: str,
    tokens: int,
    on_text: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Continue a prompt greedily and return text, tokens, tokens/s and cache bytes.

    Args:
        artifact: loaded artifact of this model.
        source: the model.
        prompt: text to continue.
        tokens: new tokens at most.
        on_text: called with each piece of text as it appears.

    Raises: KvantError if the artifact does not belong to the model, or "empty-prompt".
    """
    torch = need("torch", "transformers")
    from ..runtime.huggingface import attach, detach

    tokenizer = source.tokenizer()
    inputs = _tokens(tokenizer, prompt)
    model, cache = attach(source.load("float32"), artifact)
    begin = time.perf_counter()
    try:
        with torch.inference_mode():
            output = model.generate(
                **inputs,
                past_key_values=cache,
                max_new_tokens=tokens,
                do_sample=False,
                streamer=None if on_text is None else _streamer(tokenizer, on_text),
                pad_token_id=tokenizer.eos_token_id,
            )
        seconds = time.perf_counter() - begin
    finally:
        detach(model)
    new = output[0, inputs["input_ids"].shape[1] :]
    return {
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "tokens": int(new.numel()),
        "seconds": seconds,
        "tokens_per_second": new.numel() / seconds,
        "cache_bytes": cache.bytes(),
        "context": int(output.shape[1]),
    }


def _tokens(tokenizer: Any, prompt: str) -> Any:
    """Return what `generate` takes for a prompt. Raises: KvantError ("empty-prompt")."""
    inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].numel() == 0:
        raise KvantError(
            "empty-prompt",
            "the prompt has no tokens",
            where="the prompt",
            fix="give some text to continue",
        )
    return inputs


def _streamer(tokenizer: Any, on_text: Callable[[str], None]) -> Any:
    """Return what `generate` hands each finished piece of text to."""
    from transformers import TextStreamer

    class Pieces(TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            on_text(text)

    return Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True)
