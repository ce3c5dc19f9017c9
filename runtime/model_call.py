"""One call of a model's attention: what it may ask for, and its answer where nothing is packed.

Torch is not imported at the top, as in `model_checks`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from ..ir.errors import KvantError
from ..ir.plan import AttentionPlan

Module: TypeAlias = Any
Tensor: TypeAlias = Any

# Keywords of the attention call that do not change its result, or that are checked elsewhere.
_KNOWN_KEYWORDS = frozenset(
    "position_ids use_cache sliding_window softcap output_hidden_states output_router_logits "
    "num_items_in_batch return_dict s_aux".split()
)


@dataclass(frozen=True, slots=True)
class Call:
    """What a model passes to its attention function beside the tensors."""

    module: Module
    scaling: float | None
    keywords: Mapping[str, Any]

    @property
    def window(self) -> int | None:
        """The newest tokens that a query sees, or none."""
        window = self.keywords.get("sliding_window")
        return None if window is None else int(window)


def check_keywords(call: Call, dropout: float) -> None:
    """Refuse what would change the attention in a way that the packed cache does not know."""
    where = f"attention of layer {getattr(call.module, 'layer_idx', '?')}"
    given = {k: v for k, v in call.keywords.items() if v is not None and v is not False}
    causal = call.keywords.get("is_causal") in (None, True)
    unknown = sorted(given.keys() - _KNOWN_KEYWORDS - ({"is_causal"} if causal else set()))
    if call.keywords.get("is_causal") is False:
        unknown.append("is_causal=False")
    if unknown:
        raise KvantError(
            "unsupported-keyword",
            f"the model passes {', '.join(unknown)} to its attention",
            where=where,
            fix="call the model without it, or detach the model",
        )
    if dropout:
        raise KvantError(
            "training-mode",
            f"the model asks for attention dropout of {dropout}",
            where=where,
            fix="call model.eval()",
        )


def check_call(plan: AttentionPlan, call: Call, layer: int) -> None:
    """Refuse a module whose scale, window or softcap are not those that were compiled."""
    softcap, sinks = call.keywords.get("softcap"), call.keywords.get("s_aux")
    scale = plan.scale if call.scaling is None else call.scaling
    is_same = abs(scale - plan.scale) <= 1e-6 * abs(plan.scale)
    if not is_same or call.window != plan.window or softcap != plan.softcap:
        raise KvantError(
            "wrong-structure",
            f"the model attends with scale {scale:.6g}, window {call.window}, softcap {softcap}; "
            f"the artifact has {plan.scale:.6g}, {plan.window} and {plan.softcap}",
            where=f"attention of layer {layer}",
            fix="compile this model",
        )
    if (sinks is None) != (plan.sinks is None):
        raise KvantError(
            "wrong-structure",
            f"the model attends {'with' if plan.sinks is None else 'without'} learned sinks, "
            f"the artifact {'without' if plan.sinks is None else 'with'} them",
            where=f"attention of layer {layer}",
            fix="compile this model",
        )


def prompt_attention(q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, call: Call) -> Tensor:
    """Causal attention without history in the model's own arithmetic, [B, T, Hq, Dv].

    Rows with the same padding are computed together and without it, exactly as if each were alone.
    Padded positions give zeros.
    """
    if start is None:
        return _attend(q, k, v, call)
    out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
    for first in start.unique().tolist():
        rows = (start == first).nonzero().flatten()
        out[rows, first:] = _attend(
            q[rows, :, first:], k[rows, :, first:], v[rows, :, first:], call
        )
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    import torch

    mask, tokens = None, q.shape[2]
    if call.window is not None and tokens > call.window:
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device)
        mask = mask.tril().triu(1 - call.window)[None, None]
    return torch_attention(q, k, v, mask, call)


def torch_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: Call) -> Tensor:
    """Attention as torch computes it: its SDPA, or in steps where SDPA lacks what the call asks.

    Args:
        q: [B, Hq, T, D].
        k: [B, H, S+T, D].
        v: [B, H, S+T, Dv].
        mask: bool, whether a query sees a key; causal if none.
        call: scale, softcap, learned sinks.

    Returns: [B, T, Hq, Dv].
    """
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    softcap, sinks = call.keywords.get("softcap"), call.keywords.get("s_aux")
    if softcap is None and sinks is None:
        causal = mask is None and q.shape[2] > 1
        options: dict[str, Any] = {"scaling": call.scaling, "is_causal": causal}
        return sdpa_attention_forward(call.module, q, k, v, mask, **options)[0]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if call.scaling is None else call.scaling)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if mask is None:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
        mask = seen.tril(k.shape[2] - q.shape[2])
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)[..., : k.shape[2]]
    return (weights @ v).transpose(1, 2).contiguous()
