"""Edit the weights of a model as an artifact asks, and put the old ones back.

An edited parameter gets new storage and the old storage is kept, so restoring is exact and a file
mapped into memory is never written.
"""

from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..ir.errors import KvantError
from ..ir.weight_edits import apply_weight_edits

if TYPE_CHECKING:
    from .artifact import Artifact

Module: TypeAlias = Any
Tensor: TypeAlias = Any
Float64 = NDArray[np.float64]


def edit_weights(model: Module, artifact: "Artifact") -> dict[str, Tensor]:
    """Apply the weight edits of an artifact and return the edited parameters as they were.

    Each is computed in float64 and rounded once to the parameter's dtype. On an error the model is
    as it was.
    """
    originals: dict[str, Tensor] = {}
    try:
        for edit in artifact.weight_edits:
            name = edit["parameter"]
            parameter = model.get_parameter(name)
            weight = parameter.detach().double().cpu().numpy()
            edited = apply_weight_edits(edit["ops"], weight, artifact.tensors)
            originals.setdefault(name, parameter.data)
            parameter.data = rounded(edited, parameter.dtype).to(parameter.device)
            if edited.ndim > weight.ndim:
                _place_heads(model, name)
    except BaseException:
        restore_weights(model, originals)
        raise
    return originals


class _Seen(Exception):
    """What a norm was called with; ends the pass of `_norm_input`."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(shape)
        self.shape = shape


def _place_heads(model: Module, name: str) -> None:
    """Give a norm weight [H, D], a row per head, the shape that meets the heads in the model.

    Some models normalise [B, T, H, D], which [H, D] fits; some [B, H, T, D], which needs [H, 1, D].
    Which one is seen by running the attention up to its norm, on T != H tokens of zeros.

    Raises: KvantError "unsupported-norm".
    """
    path, _, own = name.rpartition(".")
    norm, parameter = model.get_submodule(path), model.get_parameter(name)
    heads, width = parameter.shape
    tokens = heads + 1
    hidden = model.config.get_text_config(decoder=True).hidden_size
    x = parameter.data.new_zeros(1, tokens, hidden)
    shape = _norm_input(model.get_submodule(path.rpartition(".")[0]), norm, x)
    if own == "weight" and shape == (1, heads, tokens, width):
        parameter.data = parameter.data[:, None, :]
    elif own != "weight" or shape != (1, tokens, heads, width):
        _refuse_norm(name, f"its input has shape {list(shape)}")
    try:
        fits = norm(parameter.data.new_zeros(shape)).shape == shape
    except Exception as error:
        _refuse_norm(name, str(error))
    if not fits:
        _refuse_norm(name, "its output has another shape")


def _norm_input(attention: Module, norm: Module, x: Tensor) -> tuple[int, ...]:
    """Return the shape that a norm of an attention module is given for x; () if it is not seen."""
    import torch

    def stop(module: Module, inputs: tuple[Tensor, ...]) -> None:
        raise _Seen(tuple(inputs[0].shape))

    hook = norm.register_forward_pre_hook(stop)
    try:
        with torch.no_grad():
            attention(hidden_states=x, position_embeddings=None, attention_mask=None)
    except _Seen as seen:
        return seen.shape
    except Exception:
        return ()
    finally:
        hook.remove()
    return ()


def _refuse_norm(name: str, why: str) -> NoReturn:
    raise KvantError(
        "unsupported-norm",
        f"{name} cannot hold a row for each head: {why}",
        where="attach(model, artifact)",
        fix="compile with a recipe that does not fold scales into norms (without smooth-k)",
    )


def restore_weights(model: Module, originals: dict[str, Tensor]) -> None:
    """Give each parameter its old storage back."""
    for name, data in originals.items():
        model.get_parameter(name).data = data


def rounded(x: Float64, dtype: Any) -> Tensor:
    """Return float64 values as a tensor of `dtype`, rounded once, to nearest even.

    NOTE: torch converts float64 to a 16-bit type by way of float32, which rounds twice. NumPy
    rounds to float16 in one step. For bfloat16 the step to float32 rounds to odd, after which the
    second rounding cannot go wrong: 24 bits are more than 8 + 2.
    """
    import torch

    if dtype == torch.float16:
        return torch.from_numpy(np.ascontiguousarray(x.astype(np.float16)))
    if dtype == torch.bfloat16:
        return torch.from_numpy(np.ascontiguousarray(_to_odd(x))).to(dtype)
    return torch.from_numpy(np.ascontiguousarray(x)).to(dtype)


def _to_odd(x: Float64) -> NDArray[np.float32]:
    """Return float32 rounded to odd: exact values stay, others get a last bit of 1."""
    near = x.astype(np.float32)
    bits = np.atleast_1d(near).view(np.uint32)
    error = np.atleast_1d(x) - np.atleast_1d(near).astype(np.float64)
    is_even = (bits & 1) == 0
    towards = np.where(error > 0, np.float32(np.inf), np.float32(-np.inf)).astype(np.float32)
    odd = np.where((error != 0) & is_even, np.nextafter(np.atleast_1d(near), towards), near)
    return np.asarray(odd.reshape(near.shape), np.float32)
