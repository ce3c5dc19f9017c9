"""kvant: compile the attention and KV-cache part of a language model to quantized kernels."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["KvantError", "Shape", "compile", "load"]

if TYPE_CHECKING:
    from .compiler.driver import compile
    from .compiler.shape import Shape
    from .ir.errors import KvantError
    from .runtime.artifact import load

_LAZY = {
    "compile": (".compiler.driver", "compile"),
    "Shape": (".compiler.shape", "Shape"),
    "KvantError": (".ir.errors", "KvantError"),
    "load": (".runtime.artifact", "load"),
}


def __getattr__(name: str) -> Any:
    """Import the compiler on first use, so that `import kvant.runtime` stays small."""
    if name not in _LAZY:
        raise AttributeError(f"module 'kvant' has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _LAZY[name]
    return getattr(import_module(module, __name__), attribute)
