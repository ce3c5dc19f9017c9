"""Attention masks: left padding becomes the first valid column of each row; all else is refused.

transformers calls `padding_mask` once a forward pass and hands its result to every layer. Torch is
not imported here: masks are tensors that know their own methods.
"""

from collections.abc import Callable
from typing import Any, NoReturn, TypeAlias

from ..ir.errors import KvantError

Tensor: TypeAlias = Any

_START = "_kvant_start"  # the tag on a mask that we have checked


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """Return the checked 2-D mask bool[B, S+T], or None if it hides nothing.

    The signature is that of the mask functions of transformers.

    Raises: KvantError "unsupported-mask" unless every row is padding, then at least one token.
    """
    from transformers.masking_utils import causal_mask_function

    # A window comes with its own function; overlays and packed sequences replace the causal one.
    is_plain = mask_function is None or mask_function is causal_mask_function or local_size
    if use_vmap or not is_plain:
        refuse_mask(
            "the model or its inputs ask for packed sequences or a mask that is not causal",
            "pass one sequence per row, padded on the left, with its attention_mask",
        )
    if attention_mask is None:
        return None
    if tuple(attention_mask.shape) != (batch_size, kv_length):
        refuse_mask(
            f"the attention mask has shape {list(attention_mask.shape)}, expected "
            f"[{batch_size}, {kv_length}]: {kv_length - q_length} columns in the cache and "
            f"{q_length} new",
            "pass a 2-D mask of all columns since the prompt; cache.reset() for a new prompt",
        )
    return _checked(attention_mask.bool())


def _checked(mask: Tensor) -> Tensor | None:
    """Return a 2-D mask with its start attached, or None if it is all ones."""
    if bool(mask.all()):
        return None
    if bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        refuse_mask(
            "the attention mask hides tokens that come after visible ones",
            'pad on the left: tokenizer.padding_side = "left"',
        )
    if not bool(mask[:, -1].all()):
        refuse_mask(
            "a row of the attention mask is all padding",
            "give every row at least one token; prefill in larger chunks than the padding",
        )
    setattr(mask, _START, (~mask).sum(-1))
    return mask


def start_of(mask: Tensor | None) -> Tensor | None:
    """Return the first valid column of each row, int64[B], or None for a batch without padding.

    Raises: KvantError "unsupported-mask" for a mask that did not come from `padding_mask`.
    """
    if mask is None:
        return None
    start = getattr(mask, _START, None)
    if start is None:
        refuse_mask(
            f"the attention mask has {getattr(mask, 'ndim', '?')} dimensions",
            "pass a 2-D mask of ones and zeros, padded on the left",
        )
    return start


def same_start(one: Tensor | None, other: Tensor | None) -> bool:
    """Return whether two batches are padded alike; None means not at all."""
    if one is None or other is None:
        return one is other
    return bool(one.shape == other.shape and (one == other).all())


def check_positions(positions: Tensor | None, start: Tensor | None, seen: int) -> None:
    """Refuse positions that do not count up by one within each row, padding aside.

    Args:
        positions: int64[B or 1, T], or None.
        start: int64[B], or None.
        seen: columns before these.
    """
    if positions is None or positions.ndim != 2 or positions.shape[1] < 2:
        return
    jumps = positions[:, 1:] != positions[:, :-1] + 1
    if start is not None:
        columns = positions.new_ones(positions.shape[1] - 1).cumsum(0) - 1 + seen
        jumps = jumps & (columns >= start[:, None])
    if bool(jumps.any()):
        refuse_mask(
            "position_ids jump within a row, so several sequences seem to be packed into it",
            "pass one sequence per row, padded on the left, with its attention_mask",
        )


def refuse_mask(what: str, fix: str) -> NoReturn:
    """Raise KvantError "unsupported-mask"."""
    raise KvantError("unsupported-mask", what, where="attention_mask", fix=fix)
