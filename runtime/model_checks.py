"""Is this the model that was compiled, and can its weights be edited? Checked before anything is.

Torch is not imported at the top: modules and parameters are asked for what they know themselves.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

from ..ir.errors import KvantError
from ..ir.plan import AttentionPlan

if TYPE_CHECKING:
    from .artifact import Artifact

Module: TypeAlias = Any
Parameter: TypeAlias = Any

DTYPES = ("torch.float32", "torch.bfloat16", "torch.float16")
_WHERE = "attach(model, artifact)"
# One rounding to bf16 moves a weight by 2^-9 of itself; two that meet, by less than this.
_SAMPLE_TOLERANCE = 2.0**-8


def check_model(model: Module, artifact: "Artifact") -> None:
    """Refuse a model that the artifact was not made from, or whose projections are not plain.

    Raises: KvantError "unsupported-model", "artifact-without-model", "wrong-architecture",
        "wrong-structure", "adapted-projection", "quantized-projection", "offloaded-projection",
        "wrong-device", "wrong-dtype" or "wrong-weights".
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise KvantError(
            "unsupported-model",
            f"a {type(model).__module__}.{type(model).__qualname__} is not a transformers model",
            where=_WHERE,
            fix="pass the transformers model itself; merge adapters or take wrappers off first",
        )
    _check_architecture(model, artifact)
    for module, entry in zip(attention_modules(model, artifact), artifact.layers, strict=True):
        _check_projections(module, entry.prefix, artifact.kernels.memory.device)
    check_samples(model, artifact.manifest["model"]["weights"])
    check_samples(model, _sinks(artifact))


def _sinks(artifact: "Artifact") -> dict[str, list[float]]:
    """Return the learned sinks of all layers by full parameter name: kernels read them from here.

    They are constants of the artifact, so a model that has others would be wrong without a word.
    """
    entries = zip(artifact.layers, artifact.plans, artifact.constants, strict=True)
    return {
        f"{entry.prefix}{plan.sinks}": own[plan.sinks].tolist()
        for entry, plan, own in entries
        if plan.sinks is not None
    }


def attention_modules(model: Module, artifact: "Artifact") -> tuple[Module, ...]:
    """Return the attention module of each layer, by the artifact's parameter prefixes."""
    found = dict(model.named_modules())
    modules = []
    for entry in artifact.layers:
        name = entry.prefix.rstrip(".")
        if name not in found:
            raise _wrong_structure(f"the model has no module {name!r}")
        modules.append(found[name])
    return tuple(modules)


def _check_architecture(model: Module, artifact: "Artifact") -> None:
    made_from = artifact.manifest["model"]
    if not all(entry.prefix for entry in artifact.layers):
        raise KvantError(
            "artifact-without-model",
            f"the artifact was compiled from a shape, {made_from['name']}, not from a model",
            where=_WHERE,
            fix="compile the model, or use art.new_cache() with your own model code",
        )
    if type(model).__name__ != made_from["architecture"]:
        raise KvantError(
            "wrong-architecture",
            f"the model is a {type(model).__name__}; the artifact was made from a "
            f"{made_from['architecture']} ({made_from['name']})",
            where=_WHERE,
            fix="attach the model that was compiled, or compile this one",
        )
    config = model.config.get_text_config(decoder=True)
    if config.num_hidden_layers != artifact.layer_count:
        raise _wrong_structure(
            f"the model has {config.num_hidden_layers} layers, the artifact {artifact.layer_count}"
        )
    hidden = made_from["facts"]["hidden"]
    if config.hidden_size != hidden:
        raise _wrong_structure(
            f"the model is {config.hidden_size} channels wide, the compiled one {hidden}"
        )
    for plan in dict.fromkeys(artifact.plans):
        _check_heads(config, plan)


def _check_heads(config: Any, plan: AttentionPlan) -> None:
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    if (heads, kv_heads, width) != (plan.q_heads, plan.k.heads, plan.k.channels):
        raise _wrong_structure(
            f"the model has {heads} query and {kv_heads} kv heads of {width} channels, the "
            f"artifact {plan.q_heads} and {plan.k.heads} of {plan.k.channels}"
        )


def _wrong_structure(what: str) -> KvantError:
    return KvantError(
        "wrong-structure", what, where=_WHERE, fix="attach the model that was compiled"
    )


def _check_projections(module: Module, prefix: str, device: str) -> None:
    """Refuse a projection whose numbers are not simply there, in float, on the kernels' device."""
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    for name, child in module.named_modules():
        full = f"{prefix}{name}"
        if hasattr(child, "base_layer"):
            raise KvantError(
                "adapted-projection",
                f"{full} is a {type(child).__name__} around a base layer (LoRA)",
                where=_WHERE,
                fix="merge the adapter into the model first (merge_and_unload)",
            )
        own = dict(child.named_parameters(recurse=False))
        for parameter in own.values():
            known = type(child) in (Linear, Conv1D) or "Norm" in type(child).__name__
            is_plain = known and not _wraps(parameter)
            if not parameter.dtype.is_floating_point or (parameter.dim() > 1 and not is_plain):
                raise _quantized(full, child, parameter)
        if "qweight" in child._buffers:
            raise _quantized(full, child, child._buffers["qweight"])
        for key, parameter in own.items():
            _check_parameter(f"{full}.{key}", parameter, device)


def _wraps(parameter: Parameter) -> bool:
    """Return whether a parameter is a tensor subclass, as torch's own quantization makes them."""
    from torch import Tensor
    from torch.nn import Parameter as TorchParameter

    return type(parameter) is not TorchParameter or type(parameter.data) is not Tensor


def _quantized(name: str, module: Module, parameter: Parameter) -> KvantError:
    return KvantError(
        "quantized-projection",
        f"{name} is a {type(module).__name__} holding a {type(parameter.data).__qualname__} of "
        f"{parameter.dtype}, not a plain torch.nn.Linear",
        where=_WHERE,
        fix="load the model unquantized, with dtype float32, bfloat16 or float16",
    )


def _check_parameter(name: str, parameter: Parameter, device: str) -> None:
    if parameter.device.type == "meta":
        raise KvantError(
            "offloaded-projection",
            f"{name} is on the meta device: it is offloaded or was never loaded",
            where=_WHERE,
            fix="load the whole model into memory, without device_map offloading",
        )
    if str(parameter.device) != device:
        raise KvantError(
            "wrong-device",
            f"{name} is on {parameter.device}; this artifact's kernels run on {device}",
            where=_WHERE,
            fix=f'move the model with model.to("{device}")',
        )
    if str(parameter.dtype) not in DTYPES:
        raise KvantError(
            "wrong-dtype",
            f"{name} has dtype {parameter.dtype}, expected float32, bfloat16 or float16",
            where=_WHERE,
            fix="load the model with dtype=torch.float32, bfloat16 or float16",
        )


def check_samples(model: Module, samples: dict[str, list[float]]) -> None:
    """Compare a few weights with those that were compiled, up to the rounding of a bf16 copy.

    Raises: KvantError "wrong-weights" or "wrong-structure".
    """
    parameters = dict(model.named_parameters())
    for name, expected in samples.items():
        if name not in parameters:
            raise _wrong_structure(f"the model has no parameter {name!r}")
        flat = parameters[name].detach().reshape(-1)
        found = list(sampled(flat, len(expected)))
        if len(found) != len(expected) or not _are_close(found, expected):
            raise KvantError(
                "wrong-weights",
                f"{name} begins a sample with {found[0]:.6g}, the compiled model's with "
                f"{expected[0]:.6g}",
                where=_WHERE,
                fix="attach the weights that were compiled, or compile these",
            )


def sampled(flat: Any, count: int) -> Iterator[float]:
    """Yield `count` values of a flat array or tensor, evenly spaced from its beginning."""
    size = int(flat.shape[0])
    for value in flat[:: max(1, size // count)][:count]:
        yield float(value)


def _are_close(found: Iterable[float], expected: Iterable[float]) -> bool:
    return all(
        abs(a - b) <= _SAMPLE_TOLERANCE * max(abs(a), abs(b)) + 1e-7
        for a, b in zip(found, expected, strict=True)
    )
