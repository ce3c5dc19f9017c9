"""The kernels of the target cuda in Triton's interpreter: `stream.Kernels` without a GPU.

TRITON_INTERPRET must be set before triton is imported: tests/conftest.py sees to it.
"""

import importlib.util
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from ctypes import c_int64
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction

from kvant.ir.plan import AttentionPlan
from kvant.runtime.launch_gpu import Kernels
from kvant.runtime.memory import TorchMemory
from kvant.targets.gpu import emit, launch_facts

from . import gpu_replay  # noqa: F401
from .cpu_cases import Constants


@cache
def _known_block(element: str, shape: tuple[int, ...]) -> tuple[int, str]:
    """Return elements and name of a block type; a shape that triton refuses is refused."""
    return tl.core.validate_block_shape(shape), f"<{shape}, {element}>"


@cache
def _known_shape(shape: tuple[int, ...]) -> tl.tuple:
    return tl.tuple([tl.constexpr(size) for size in shape])


def _block_type(self: Any, element_ty: tl.dtype, shape: Any) -> None:
    self.element_ty = element_ty
    self.shape = tuple(tl.core._unwrap_shape(shape))
    if not self.shape:
        raise TypeError("0d block_type is forbidden")
    self.numel, self.name = _known_block(str(element_ty), self.shape)


_numpy_type_of = cache(interpreter._get_np_dtype)


def _numpy_type(of: tl.dtype) -> np.dtype:
    if isinstance(of.scalar, tl.pointer_type):
        return np.dtype(np.uint64)
    return _numpy_type_of(of.scalar)


def _tensor(self: Any, handle: Any, type: tl.dtype) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape = _known_shape(type.shape if type.is_block() else ())
    self.numel = tl.constexpr(math.prod(type.shape) if type.is_block() else 1)


# The interpreter spends a third of its time on making equal types again, and a fifth on asking
# whether 32 bits overflow: lengths are far too small for that here, and outputs are compared.
tl.block_type.__init__ = _block_type
tl.tensor.__init__ = _tensor
interpreter._get_np_dtype = _numpy_type
interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


@dataclass
class Held:
    """A kernel with its arguments, as `launch_gpu.Prepared` has it."""

    launcher: "Interpreter"
    key: str
    kernel: str
    arguments: list[Any]
    changing: list[int]

    def start(self, grid: Any, stream: int, *changing: Any) -> None:
        for place, value in zip(self.changing, changing, strict=True):
            self.arguments[place] = value.reshape(-1).view(self.arguments[place].dtype)
        given = [x.value if isinstance(x, c_int64) else x for x in self.arguments]
        self.launcher.launch(self.key, self.kernel, grid, given)


class Interpreter:
    """Starts kernels by reading them line by line."""

    def __init__(self, modules: Mapping[str, Any]) -> None:
        self.modules = modules
        self.capturing = False

    def prepare(
        self, key: str, kernel: str, arguments: Sequence[Any], changing: Sequence[int]
    ) -> Held:
        return Held(self, key, kernel, list(arguments), list(changing))

    def stream(self) -> int:
        return 0

    def is_capturing(self) -> bool:
        return self.capturing

    def launch(self, key: str, kernel: str, grid: Any, arguments: Sequence[Any]) -> None:
        with patched_once():
            getattr(self.modules[key], kernel)[grid](*arguments)


class Garbage(TorchMemory):
    """Memory of the host whose unset numbers are NaN: what no kernel writes must not matter."""

    def empty(self, shape: tuple[int, ...]) -> Any:
        return torch.full(shape, torch.nan)


@contextmanager
def patched_once() -> Iterator[None]:
    """Let the interpreter patch triton.language once a launch, not at every tl.sum."""
    real, done = interpreter._patch_lang, set()

    def once(function: Any) -> Any:
        if id(function.__globals__) in done:
            return interpreter._LangPatchScope()
        done.add(id(function.__globals__))
        return real(function)

    with patch.object(interpreter, "_patch_lang", once):
        yield


@lru_cache(maxsize=256)
def module_of(
    plan: AttentionPlan, change: tuple[str, str] = ("", ""), backend: str = "cuda"
) -> Any:
    """The emitted kernels of a plan, imported: the interpreter wants them in a file.

    Where a kernel has the text change[0], it gets change[1] instead: to see that it is caught.
    """
    with tempfile.TemporaryDirectory(prefix="kvant-test-") as folder:
        path = Path(folder) / "kernels.py"
        text = emit(plan, backend, plain=True).text()
        if change[0] not in text:  # no AssertionError: tests expect those of a wrong kernel
            raise LookupError(f"the kernels have no {change[0]!r}")
        path.write_text(text.replace(*change) if change[0] else text)
        spec = importlib.util.spec_from_file_location("kernels", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for function in list(vars(module).values()):
            if isinstance(function, InterpretedFunction):
                function.rewrite()
    return module


def interpreted(
    plans: list[AttentionPlan],
    constants: list[Constants],
    change: tuple[str, str] = ("", ""),
    backend: str = "cuda",
) -> Kernels:
    """A factory for `cache_runner`."""
    keys = [f"p{plans.index(plan)}" for plan in plans]
    own = dict(zip(keys, plans, strict=True))
    launches = {
        key: launch_facts(emit(plan, backend, plain=True), backend) for key, plan in own.items()
    }
    launcher = Interpreter({key: module_of(plan, change, backend) for key, plan in own.items()})
    return Kernels(plans, constants, keys, launches, launcher, Garbage("cpu"))
