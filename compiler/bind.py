"""Bind: a path or a torch module becomes a source of structure, weights, and runnable model.

Three kinds: a Hugging Face folder (config.json and safetensors), a .gguf file, a torch module of
transformers. Everything a user can get wrong about a model is refused here, by one KvantError.
"""

import copy
import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..ir.arrays import FloatName
from ..ir.errors import KvantError
from .extras import PACKAGED, need
from .weights import (
    GgufWeights,
    ModuleWeights,
    SafetensorsWeights,
    Weights,
    is_pickle,
    pickled,
    unreadable,
)

_LOCAL = {"local_files_only": True, "trust_remote_code": False}


@dataclass(slots=True)
class ModelSource:
    """A model that is open for compilation.

    Attributes:
        name: short, fit for a file name.
        config: its transformers config.
        kind: where it comes from.
        path: folder or file; None for a torch module.
    """

    name: str
    config: Any
    kind: Literal["folder", "gguf", "module"]
    path: Path | None
    _weights: Weights
    _module: Any = None  # the user's module, or the model on the meta device once built
    _names: tuple[str, ...] | None = None

    def structure(self) -> Any:
        """Return a torch model to look at: on the meta device, or the user's own module.

        Raises: KvantError ("unsupported-architecture") if it is no causal language model.
        """
        if self._module is None:
            self._module = _on_meta(self.config, self.name)
        return self._module

    @property
    def dtype(self) -> FloatName:
        """What the model computes in; f32 where its config does not say."""
        stated = self.config.get_text_config().dtype or self.config.dtype
        if self.kind == "module":
            stated = next(p.dtype for p in self._module.parameters() if p.is_floating_point())
        name = str(stated).removeprefix("torch.")
        return {"bfloat16": "bf16", "float16": "f16"}.get(name, "f32")  # type: ignore[return-value]

    def names(self) -> tuple[str, ...]:
        """Return the names of all stored parameters, as in transformers, in the model's order."""
        if self._names is None:
            params = (name for name, _ in self.structure().named_parameters())
            self._names = tuple(name for name in params if self._weights.key(name) is not None)
        return self._names

    def weight(self, name: str) -> NDArray[np.float32]:
        """Return one parameter in f32, by its name in transformers.

        Raises: KvantError "unknown-tensor", or "model-unreadable" if the file is damaged there.
        """
        key = self._weights.key(name)
        if key is not None:
            return self._weights.read(key)
        near = difflib.get_close_matches(name, self.names(), 3, 0.6)
        raise KvantError(
            "unknown-tensor",
            f"there is no parameter {name!r}",
            where=self.name,
            fix=f"use one of: {', '.join(near)}" if near else "list them with .names()",
        )

    def load(self, dtype: str = "float32") -> Any:
        """Return the model in memory, on the CPU, in evaluation mode; each call a new one.

        Args:
            dtype: "float32", "bfloat16" or "float16".

        Raises: KvantError ("model-unreadable") for whatever transformers says about the files.
        """
        torch = need("torch", "transformers", "accelerate")
        kind = getattr(torch, dtype)
        if self.path is None:
            return copy.deepcopy(self._module).to(device="cpu", dtype=kind).eval()
        held = {name for name, _ in self.structure().named_parameters()}
        try:
            if self.kind == "gguf" and held == set(self.names()):
                return self._assembled(kind)
            folder, options = _pretrained(self.path)
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=kind, use_safetensors=True, **options, **_LOCAL
            )
        except Exception as error:
            raise unreadable(self.path, error) from error
        return model.eval()

    def _assembled(self, dtype: Any) -> Any:
        """Return the model from our reader: transformers' reads a GGUF file three times over."""
        torch = need("torch", "transformers")
        state = {name: torch.from_numpy(self.weight(name)).to(dtype) for name in self.names()}
        kind, config = type(self.structure()), copy.deepcopy(self.config)
        return kind.from_pretrained(None, config=config, state_dict=state, dtype=dtype).eval()

    def tokenizer(self) -> Any:
        """Return the tokenizer. Raises: KvantError ("no-tokenizer")."""
        need("torch", "transformers")
        from transformers import AutoTokenizer

        try:
            if self.path is None:
                raise ValueError("a torch module has none")
            folder, options = _pretrained(self.path)
            return AutoTokenizer.from_pretrained(folder, **options, **_LOCAL)
        except Exception as error:
            raise KvantError(
                "no-tokenizer",
                f"{self.name} has no tokenizer that can be read: {str(error).splitlines()[0]}",
                where=str(self.path or "the torch module"),
                fix="give a folder that holds tokenizer.json, or a .gguf file",
            ) from error


def open_model(model: Any) -> ModelSource:
    """Open a Hugging Face folder, a .gguf file or a torch module of transformers. Weights stay put.

    "smollm2" and "gemma3-270m" are models in Python packages, unless a file or folder is called so.

    Raises: KvantError "model-missing", "model-unreadable", "pickle-weights", "shards-missing",
        "unsupported-architecture", "quantized-weights", "adapted-weights", "offloaded-weights",
        "unsupported-projection", "unsupported-model" or "missing-extra".
    """
    if hasattr(model, "named_parameters"):
        return _open_module(model)
    if not isinstance(model, str | Path):
        raise KvantError(
            "unsupported-model",
            f"{type(model).__name__} is not a model",
            where="the model argument",
            fix="give a Hugging Face folder, a .gguf file or a transformers model",
        )
    path = Path(model).expanduser()
    if str(model) in PACKAGED and not path.exists():
        path = PACKAGED[str(model)]()
    if path.is_dir():
        return _open_folder(path)
    if path.is_file():
        return _open_gguf(path)
    raise KvantError(
        "model-missing",
        f"there is no file or folder {str(model)!r}",
        where="the model argument",
        fix="give a path that exists; kvant downloads nothing (for a model of the hub: "
        "hf download NAME --local-dir FOLDER)",
    )


def _open_folder(path: Path) -> ModelSource:
    need("torch", "transformers", "safetensors")
    file = path / "config.json"
    if not file.is_file():
        raise KvantError(
            "model-missing",
            "the folder has no config.json",
            where=str(path),
            fix="give the folder that a model was saved to, or a .gguf file",
        )
    if (path / "adapter_config.json").exists():
        raise _adapted("the folder holds a LoRA adapter (adapter_config.json)", str(path))
    try:
        stated = json.loads(file.read_bytes())
        kind, quantized = stated["model_type"], stated.get("quantization_config")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise unreadable(file, error) from error
    if quantized:
        raise KvantError(
            "quantized-weights",
            f"the checkpoint is quantized ({quantized.get('quant_method', 'unknown method')})",
            where=str(file),
            fix="give the model before its weights were quantized, or a .gguf file",
        )
    from transformers import CONFIG_MAPPING

    if kind not in CONFIG_MAPPING:
        raise _unsupported(f"no model type {kind!r}", str(file))
    weights = SafetensorsWeights(path)
    return ModelSource(path.resolve().name, _config(path), "folder", path, weights)


def _open_gguf(path: Path) -> ModelSource:
    if is_pickle(path):
        raise pickled(path)
    need("torch", "transformers", "gguf", "accelerate")
    weights = GgufWeights(path)
    config = _config(path)
    weights.prepare(config)
    return ModelSource(path.stem, config, "gguf", path, weights)


def _open_module(module: Any) -> ModelSource:
    config = getattr(module, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise KvantError(
            "unsupported-model",
            f"{type(module).__name__} has no transformers config",
            where="the model argument",
            fix="give a transformers model, such as AutoModelForCausalLM.from_pretrained(...)",
        )
    need("torch", "transformers")

    for prefix, attention in attention_modules(module):
        _check_projections(prefix, attention)
    name = Path(getattr(config, "_name_or_path", "") or type(module).__name__).name
    return ModelSource(name, config, "module", None, ModuleWeights(module), module)


def _check_projections(prefix: str, attention: Any) -> None:
    """Refuse projections whose numbers are not simply there, in a Linear or a Conv1D."""
    torch = need("torch", "transformers")
    from transformers.pytorch_utils import Conv1D

    plain = (torch.nn.Linear, Conv1D)
    floats = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    for name, part in attention.named_modules():
        full, kind = prefix + name, type(part).__name__
        if hasattr(part, "base_layer") or any(
            n.startswith("lora_") for n, _ in part.named_children()
        ):
            raise _adapted(f"{full} is a {kind} with an adapter", full)
        if isinstance(getattr(part, "qweight", None), torch.Tensor):
            raise _not_plain(f"{full} is a {kind} with packed weights", full)
        for own, param in part.named_parameters(recurse=False):
            if param.is_meta:
                raise KvantError(
                    "offloaded-weights",
                    f"{full}.{own} is on the meta device: its values are elsewhere",
                    where=full,
                    fix="load the model without device_map offloading",
                )
            # A norm may hold a row for each head; what it computes is seen at capture.
            fits = param.dim() < 2 or type(part) in plain or "Norm" in kind
            if not (fits and type(param) is torch.nn.Parameter and param.dtype in floats):
                raise _not_plain(f"{full} is a {kind} that holds {param.dtype}", full)


def _not_plain(what: str, where: str) -> KvantError:
    return KvantError(
        "unsupported-projection",
        f"{what}; kvant rewrites projections: plain Linear or Conv1D in floating point",
        where=where,
        fix="give the model before its weights were quantized",
    )


def _adapted(what: str, where: str) -> KvantError:
    return KvantError(
        "adapted-weights",
        f"{what}; kvant rewrites projections and cannot see through an adapter",
        where=where,
        fix="merge it first: model.merge_and_unload().save_pretrained(FOLDER)",
    )


def _pretrained(path: Path) -> tuple[Path, dict[str, Any]]:
    """Return the folder and the options by which transformers finds a model."""
    return (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})


def _config(path: Path) -> Any:
    from transformers import AutoConfig

    folder, options = _pretrained(path)
    try:
        return AutoConfig.from_pretrained(folder, **options, **_LOCAL)
    except Exception as error:
        raise unreadable(path, error) from error


def _on_meta(config: Any, where: str) -> Any:
    """Build the model of a config on the meta device: all its shapes, none of its numbers."""
    torch = need("torch", "transformers")
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    except Exception as error:
        raise _unsupported(str(error).splitlines()[0], where) from error
    return model.eval()


def _unsupported(why: str, where: str) -> KvantError:
    return KvantError(
        "unsupported-architecture",
        f"transformers cannot build this model as a causal language model: {why}",
        where=where,
        fix="give a decoder-only language model, or install the transformers release that knows it",
    )


def attention_modules(module: Any) -> tuple[tuple[str, Any], ...]:
    """Return (parameter prefix, module) of each self-attention layer, in order.

    An attention module of transformers says of itself which layer of the cache it uses and whether
    it is causal; nothing else does both.
    """
    return tuple(
        (f"{name}.", part)
        for name, part in module.named_modules()
        if isinstance(getattr(part, "layer_idx", None), int) and hasattr(part, "is_causal")
    )
