"""Where weights come from, one tensor at a time: safetensors files, a GGUF file, a torch module.

Each reader answers two questions: under which key a parameter (by its name in transformers) is
stored, and what it holds, as f32. None of them reads more than it is asked for.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..ir.errors import KvantError
from .extras import need

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Weights(Protocol):
    """A reader of stored weights."""

    def key(self, name: str) -> str | None:
        """Return the key under which the parameter `name` is stored, or None."""
        ...

    def read(self, key: str) -> NDArray[np.float32]:
        """Return the tensor of a key, as the transformers model holds it, in f32."""
        ...


def unreadable(path: Path, error: Exception | str) -> KvantError:
    """Return the one error for a file that cannot be read, whatever the library said."""
    said = str(error).strip().split("\n")[0]
    reason = said if isinstance(error, str) else f"{type(error).__name__}: {said}"
    return KvantError(
        "model-unreadable",
        f"{path.name} cannot be read: {reason}",
        where=str(path),
        fix="the file is damaged or incomplete; download or write it again",
    )


class SafetensorsWeights:
    """One safetensors file, or several with an index; mapped into memory."""

    def __init__(self, folder: Path) -> None:
        """Open the files of a folder. Raises: KvantError for each way in which they can be bad."""
        need("torch", "safetensors")
        self._file = _index(folder)
        paths = sorted(set(self._file.values())) or [folder / "model.safetensors"]
        self._open = {path: self._opened(path) for path in paths}
        if not self._file:
            self._file = dict.fromkeys(self._open[paths[0]].keys(), paths[0])

    @staticmethod
    def _opened(path: Path) -> Any:
        from safetensors import safe_open

        try:
            return safe_open(path, framework="pt", device="cpu")
        except Exception as error:
            raise unreadable(path, error) from error

    def key(self, name: str) -> str | None:
        """Return the key of a parameter; checkpoints of a base model lack the first component."""
        tail = name.split(".", 1)[-1]
        return next((key for key in (name, tail) if key in self._file), None)

    def read(self, key: str) -> NDArray[np.float32]:
        """Read one tensor."""
        path = self._file[key]
        try:
            tensor = self._open[path].get_tensor(key)
        except Exception as error:
            raise unreadable(path, error) from error
        return np.array(tensor.float().numpy(), dtype=np.float32)  # never a view of the file


def _index(folder: Path) -> dict[str, Path]:
    """Return the file of each tensor of a sharded checkpoint; empty if there is one file."""
    path = folder / "model.safetensors.index.json"
    if not path.exists():
        if not (folder / "model.safetensors").exists():
            raise _no_weights(folder)
        return {}
    try:
        shards = {str(k): str(v) for k, v in json.loads(path.read_bytes())["weight_map"].items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise unreadable(path, error) from error
    missing = [name for name in sorted(set(shards.values())) if not (folder / name).is_file()]
    if missing:
        raise KvantError(
            "shards-missing",
            f"{len(missing)} of {len(set(shards.values()))} weight files are missing: "
            + ", ".join(missing),
            where=str(folder),
            fix="download the missing files into the folder",
        )
    return {key: folder / name for key, name in shards.items()}


def _no_weights(folder: Path) -> KvantError:
    for path in sorted(folder.iterdir()):
        if is_pickle(path):
            return pickled(path)
    return KvantError(
        "model-missing",
        "there is a config.json but no model.safetensors",
        where=str(folder),
        fix="download the weights into the folder",
    )


def is_pickle(path: Path) -> bool:
    """Whether a file is, by its name, weights as torch pickles them."""
    return path.suffix in _PICKLES


def pickled(path: Path) -> KvantError:
    """Return the refusal of a pickle, with the way to convert it."""
    return KvantError(
        "pickle-weights",
        f"{path.name} is a pickle: reading it can run any code",
        where=str(path),
        fix='convert it once, where you trust it: python -c "from transformers import '
        "AutoModelForCausalLM as M; M.from_pretrained('IN').save_pretrained('OUT')\"",
    )


class GgufWeights:
    """A GGUF file: each tensor is dequantized when asked for, and laid out as in transformers.

    GGUF stores the rows of q and k of some architectures with RoPE pairs side by side. The table of
    tensor processors of transformers undoes that, and what else differs (transposes, norms + 1).
    """

    def __init__(self, path: Path) -> None:
        """Read the header. Raises: KvantError if the file is no whole GGUF file."""
        self._path = path
        need("torch", "transformers", "gguf")
        try:
            with path.open("rb") as file:
                magic = file.read(4)
            if magic != b"GGUF":
                raise unreadable(path, f"it begins with {magic!r}, not with b'GGUF'")
            reader = _gguf_reader(path)
            self._tensors = {str(tensor.name): tensor for tensor in reader.tensors}
            self.architecture = str(reader.get_field("general.architecture").contents())
        except KvantError:
            raise
        except Exception as error:
            raise unreadable(path, error) from error
        self._names: Any = None
        self._processor: Any = None
        self._check_architecture()

    def _check_architecture(self) -> None:
        import gguf
        from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

        known = gguf.MODEL_ARCH_NAMES.values()
        if self.architecture not in GGUF_SUPPORTED_ARCHITECTURES or self.architecture not in known:
            raise KvantError(
                "unsupported-architecture",
                f"transformers cannot load GGUF files of architecture {self.architecture!r}",
                where=str(self._path),
                fix="give the model as a Hugging Face folder",
            )

    def prepare(self, config: Any) -> None:
        """Build the map of names, which takes the number of layers from the config."""
        import gguf
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        archs = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
        self._names = gguf.get_tensor_name_map(archs[self.architecture], config.num_hidden_layers)
        kind = TENSOR_PROCESSORS.get(self.architecture, TensorProcessor)
        self._processor = kind(config=config.to_dict())

    def key(self, name: str) -> str | None:
        """Return GGUF's name of a parameter."""
        stem, _, kind = name.rpartition(".")
        for known in (stem, stem.split(".", 1)[-1]):
            found = self._names.get_name(known)
            if found is not None and f"{found}.{kind}" in self._tensors:
                return f"{found}.{kind}"
        return None

    def read(self, key: str) -> NDArray[np.float32]:
        """Dequantize one tensor."""
        import gguf

        tensor = self._tensors[key]
        try:
            plain = gguf.dequantize(tensor.data, tensor.tensor_type)
            made = self._processor.process(
                weights=plain, name=key, tensor_key_mapping={}, parsed_parameters={"tensors": {}}
            )
        except Exception as error:
            raise unreadable(self._path, error) from error
        return np.array(made.weights, dtype=np.float32, order="C")  # never a view of the file


def _gguf_reader(path: Path) -> Any:
    """Return gguf's reader of a file, which looks at each word of a vocabulary by itself.

    A slice of a memory map costs several times one of a plain array over the same memory: 10 s
    for a vocabulary of 262,144.
    """
    from gguf import GGUFReader

    class Reader(GGUFReader):  # type: ignore[misc]
        data: Any

        def _get(self, *args: Any, **options: Any) -> Any:
            self.data = self.data.view(np.ndarray)
            return super()._get(*args, **options)

    return Reader(path)


class ModuleWeights:
    """The parameters of a torch module, copied when they are asked for."""

    def __init__(self, module: Any) -> None:
        self._params = dict(module.named_parameters())

    def key(self, name: str) -> str | None:
        """Return the name itself if the module has it."""
        return name if name in self._params else None

    def read(self, key: str) -> NDArray[np.float32]:
        """Copy one parameter."""
        made: NDArray[np.float32] = self._params[key].detach().cpu().float().numpy().copy()
        return made


class Source(Protocol):
    """A model whose parameters can be read by name."""

    def names(self) -> tuple[str, ...]:
        """Return the names of all stored parameters."""
        ...

    def weight(self, name: str) -> NDArray[np.float32]:
        """Return one parameter."""
        ...


class LayerWeights(Mapping[str, np.ndarray]):
    """The parameters of one layer by their name relative to its prefix, in float64."""

    def __init__(self, source: Source, prefix: str) -> None:
        self._source, self._prefix = source, prefix
        self._names = tuple(n[len(prefix) :] for n in source.names() if n.startswith(prefix))

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        return self._source.weight(self._prefix + name).astype(np.float64)

    def __iter__(self) -> Any:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
