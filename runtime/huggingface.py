"""The kvant cache inside a transformers model: `attach` and `detach`.

    model, cache = attach(model, artifact)
    model.generate(**inputs, past_key_values=cache)

transformers calls three things of ours, and nothing in the model's code is replaced:

    the mask function "kvant"        once a forward pass: checks the 2-D mask, finds each start
    `KvantLayer.update`              in each layer: hands k and v on with a tag that names the layer
    the attention function "kvant"   in each layer: reads the tag, appends, attends

A prompt that finds the cache empty is attended with the model's own SDPA, because no token of it is
stored in packed form yet; SDPA knows neither softcap nor learned sinks, so there the cache attends
what was appended. Either way the layer is flushed at once, so that the raw prompt of one layer at a
time is all that is ever held. Anything the cache cannot represent is refused.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache as TransformersCache
from transformers.cache_utils import CacheLayerMixin

from ..ir.errors import KvantError
from .model_call import Call, check_call, check_keywords, prompt_attention
from .model_checks import attention_modules, check_model
from .model_edits import edit_weights, restore_weights
from .model_mask import check_positions, padding_mask, refuse_mask, same_start, start_of

if TYPE_CHECKING:
    from .artifact import Artifact
    from .cache import Cache

IMPLEMENTATION = "kvant"
_LAYER = "_kvant_layer"  # the tag on k that names the layer
_DEFAULT_MAX_TOKENS = 32768


@dataclass(slots=True)
class Attachment:
    """What `attach` changed in one model.

    Attributes:
        artifact: id of the artifact.
        implementation: name of the attention implementation before.
        modules: the attention module of each layer.
        originals: edited parameters as they were, by name.
        active: false once the model was detached.
    """

    artifact: str
    implementation: str
    modules: tuple[nn.Module, ...]
    originals: dict[str, Tensor]
    active: bool = True


_ATTACHED: "WeakKeyDictionary[nn.Module, Attachment]" = WeakKeyDictionary()


def attach(
    model: PreTrainedModel, artifact: "Artifact", max_tokens: int | None = None
) -> tuple[PreTrainedModel, "KvantCache"]:
    """Prepare a model for the packed cache of an artifact that was compiled from it.

    The model is changed in place: its attention implementation, and the weights into which the
    recipe folds its maps (computed in float64, rounded once). `detach` undoes both. Attaching the
    same artifact again returns one more cache and changes nothing.

    Args:
        model: a transformers model on the CPU, in f32, bf16 or f16.
        artifact: from `kvant.runtime.load`.
        max_tokens: limit of a row's length; the model's own limit if not given.

    Returns: the model, and the cache to pass as `past_key_values`. No gradient flows through it.
    Raises: KvantError if the artifact was not made from this model or the model cannot be attached;
        the model is then unchanged.
    """
    attachment = _ATTACHED.get(model) if isinstance(model, nn.Module) else None
    if attachment is None:
        attachment = _attach(model, artifact)
    elif attachment.artifact != artifact.id:
        raise KvantError(
            "already-attached",
            f"the model is attached to artifact {attachment.artifact[:12]}, not {artifact.id[:12]}",
            where="attach(model, artifact)",
            fix="call detach(model) first",
        )
    if max_tokens is None:
        config = model.config.get_text_config(decoder=True)
        max_tokens = int(getattr(config, "max_position_embeddings", _DEFAULT_MAX_TOKENS))
    return model, KvantCache(artifact, attachment, max_tokens)


def _attach(model: PreTrainedModel, artifact: "Artifact") -> Attachment:
    check_model(model, artifact)
    modules = attention_modules(model, artifact)
    AttentionInterface.register(IMPLEMENTATION, attention)
    AttentionMaskInterface.register(IMPLEMENTATION, padding_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(IMPLEMENTATION)
    if model.config._attn_implementation != IMPLEMENTATION:
        raise KvantError(
            "unsupported-model",
            f"{type(model).__name__} does not let its attention implementation be set",
            where="attach(model, artifact)",
            fix="use a model class of transformers that goes through AttentionInterface",
        )
    try:
        originals = edit_weights(model, artifact)
    except BaseException:
        model.set_attn_implementation(before)
        raise
    attachment = Attachment(artifact.id, before, modules, originals)
    _ATTACHED[model] = attachment
    return attachment


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Give a model its weights and its attention back, bit for bit, and return it.

    Its caches refuse to be used afterwards.

    Raises: KvantError "not-attached".
    """
    attachment = _ATTACHED.pop(model, None) if isinstance(model, nn.Module) else None
    if attachment is None:
        raise KvantError(
            "not-attached",
            "the model is not attached to an artifact",
            where="detach(model)",
            fix="pass the model that attach returned, once",
        )
    restore_weights(model, attachment.originals)
    model.set_attn_implementation(attachment.implementation)
    attachment.active = False
    return model


class KvantLayer(CacheLayerMixin):  # type: ignore[misc]  # the library is not typed for us
    """One layer as transformers sees it: it counts columns and hands k and v to the attention.

    Attributes:
        seen: columns in the cache, padding included.
    """

    is_sliding = False
    supports_early_init = False

    def __init__(self, owner: "KvantCache", index: int) -> None:
        super().__init__()
        self.owner, self.index = owner, index
        self.seen = 0
        self.is_pending = False

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return k and v of the new tokens; the attention function appends them."""
        if not self.owner.attachment.active or self.is_pending:
            raise KvantError(
                "not-attached",
                "the cache was passed to a model that is not attached to its artifact",
                where=f"layer {self.index}",
                fix="pass the cache to the model that attach returned, and do not detach it before",
            )
        self.is_pending = True
        setattr(key_states, _LAYER, self)
        return key_states, value_states

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the cache is made when the first prompt shows its batch and padding."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the columns of the mask after this pass, and 0.

        Raises: KvantError "empty-input": transformers cuts what is cached off a prompt, and nothing
            was left.
        """
        if query_length == 0:
            raise KvantError(
                "empty-input",
                f"the prompt has no token beyond the {self.seen} in the cache",
                where="past_key_values",
                fix="call cache.reset() before a new prompt",
            )
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Return the columns in the cache, padding included."""
        return self.seen

    def get_max_length(self) -> int:
        """Return -1: the length is no shape of ours; a full cache is refused when it is full."""
        return -1


class KvantCache(TransformersCache):  # type: ignore[misc]
    """A transformers cache whose layers live in one packed cache of kvant.

    Made by `attach`. The packed cache appears with the first prompt, which shows the batch size and
    the padding; `reset` drops it, so that the same object serves any number of prompts.

    Attributes:
        packed: the cache of `kvant.runtime`, or none before the first prompt.
    """

    def __init__(self, artifact: "Artifact", attachment: Attachment, max_tokens: int) -> None:
        super().__init__(layers=[KvantLayer(self, i) for i in range(len(attachment.modules))])
        self.artifact, self.attachment, self.max_tokens = artifact, attachment, max_tokens
        self.packed: Cache | None = None
        self._start: Tensor | None = None
        self._is_drafting = False

    def bytes(self) -> int:
        """Return the bytes in use by the packed cache."""
        return 0 if self.packed is None else self.packed.bytes()

    def flush(self) -> None:
        """Encode everything that is due, now instead of at the next append."""
        if self.packed is not None:
            self.packed.flush()

    def reset(self) -> None:
        """Forget everything; the next prompt may have another batch size."""
        self.packed, self._start, self._is_drafting = None, None, False
        for layer in self.layers:
            layer.seen, layer.is_pending = 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give row i the content of row beam_idx[i]."""
        if self.packed is not None:
            self.packed.reorder(beam_idx.cpu().numpy())
            if self._start is not None:
                self._start = self._start[beam_idx.to(self._start.device)]

    def activate_past_recording(self) -> None:
        """Begin speculative decoding: every forward pass may be followed by `crop`.

        From here on nothing is encoded before `crop` has said which tokens stay, so that a draft
        that is rolled back was never stored in packed form.
        """
        self._is_drafting = True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens; the argument is their number times -1.

        Raises: KvantError if they were encoded already in groups that would be cut, or the window
            of a sliding layer would reach behind what it still holds: see `Cache.truncate`.
        """
        if tokens_to_remove > 0 or -tokens_to_remove > self.get_seq_length():
            raise KvantError(
                "crop",
                f"crop({tokens_to_remove}) of a cache of {self.get_seq_length()} tokens",
                where="cache.crop",
                fix="pass minus the number of tokens to remove",
            )
        if self.packed is None:
            return
        if tokens_to_remove:
            self.packed.truncate(self.packed.length + tokens_to_remove)
            for layer in self.layers:
                layer.seen += tokens_to_remove
        if self._is_drafting:
            self.packed.flush()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refuse: rows of a cache cannot multiply."""
        _refuse_rows()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Refuse: rows of a cache cannot be dropped."""
        _refuse_rows()

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        """Refuse: a copy would share pages and drag the model along."""
        raise KvantError(
            "unsupported-copy",
            "a packed cache cannot be copied with copy.deepcopy",
            where="past_key_values",
            fix="run the prefix once for each cache; attach(model, artifact) gives more of them",
        )

    def attend(
        self, layer: KvantLayer, q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, call: Call
    ) -> Tensor:
        """Append k and v, [B, H, T, D], and return the attention of q, as [B, T, Hq, Dv]."""
        if self.attachment.modules[layer.index] is not call.module:
            raise KvantError(
                "not-attached",
                "the cache belongs to another model of the same kind",
                where=f"layer {layer.index}",
                fix="use each cache with the model it was attached with",
            )
        index = layer.index
        plan = self.artifact.plans[index]
        check_call(plan, call, index)
        packed = self._open(layer, q, start, call)
        if layer.seen == 0 and plan.softcap is None and plan.sinks is None:
            out = prompt_attention(q, k, v, start, call)
            packed.append(index, k, v)
        else:
            packed.append(index, k, v)
            out = packed.attend(index, q).transpose(1, 2).contiguous()
        if layer.seen == 0 and not self._is_drafting:
            packed.flush_layer(index)
        layer.seen += q.shape[2]
        return out

    def _open(self, layer: KvantLayer, q: Tensor, start: Tensor | None, call: Call) -> "Cache":
        """Return the packed cache; the first layer sees that this pass continues the last one."""
        if layer.index == 0:
            if any(other.seen != layer.seen for other in self.layers):
                raise KvantError(
                    "torn-cache",
                    "a forward pass was interrupted: the layers hold different numbers of tokens",
                    where="cache",
                    fix="call cache.reset() and start again with the prompt",
                )
            check_positions(call.keywords.get("position_ids"), start, layer.seen)
            if layer.seen and self.packed is not None:
                self.packed.check()
            if layer.seen == 0:
                first = None if start is None else start.cpu().numpy()
                self.packed = self.artifact.new_cache(
                    batch=q.shape[0], max_tokens=self.max_tokens, start=first
                )
                self._start = start
        if not same_start(start, self._start):
            refuse_mask(
                "the padding of the attention mask changed since the prompt",
                "pass the prompt's mask, with ones for new tokens; cache.reset() for a new prompt",
            )
        if self.packed is None:
            raise KvantError(
                "torn-cache",
                f"layer {layer.index} ran before layer 0",
                where="cache",
                fix="run the whole model",
            )
        return self.packed


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """The attention function that `attach` registers; called by the model in each layer."""
    layer: KvantLayer | None = getattr(key, _LAYER, None)
    if layer is not None:
        layer.is_pending = False
    call = Call(module, scaling, keywords)
    start = start_of(attention_mask)
    check_keywords(call, dropout)
    if layer is not None:
        return layer.owner.attend(layer, query, key, value, start, call), None
    if key.shape[2] != query.shape[2]:
        raise KvantError(
            "foreign-cache",
            f"an attached model was called with a history of {key.shape[2] - query.shape[2]} "
            "tokens in a cache that is not kvant's",
            where=f"layer {getattr(module, 'layer_idx', '?')}",
            fix="pass past_key_values=cache with the cache from attach, or detach the model",
        )
    return prompt_attention(query, key, value, start, call), None


def _refuse_rows() -> NoReturn:
    raise KvantError(
        "unsupported-batch-change",
        "the number of rows of a packed cache cannot change",
        where="past_key_values",
        fix="pass the prompts with the batch size you need after cache.reset()",
    )
