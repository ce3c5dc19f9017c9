"""Makes Triton's interpreter faster: what a call of the language does is found once, then repeated.

Triton decides by types, and by numbers known beforehand, which instructions a call becomes; the
interpreter decides it anew for each call, and that takes most of its time. Here the first call of a
kind is Triton's own, and the instructions that it gave its builder are written down; equal calls
repeat them. Each such program is held to the first result, bit for bit, before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

# What differs between programs of one grid, or is done rather than computed.
NOT_CONSTANT = {"create_get_program_id", "create_get_num_programs"}
# NumPy broadcasts by itself: between instructions that go element by element these do nothing.
SPREADING = {"create_broadcast", "create_splat", "create_expand_dims"}
RESHAPING = {"create_expand_dims", "create_reshape"}
BY_ELEMENT = {
    "create_addptr",
    "create_ashr",
    "create_fma",
    "create_idiv",
    "create_sdiv",
    "create_udiv",
}
NUMPY_CALLS = ("unary_op", "binary_op", "ternary_op", "cast_impl")
SLICE = slice(None)


class Unknown(Exception):
    """A call with an argument that has no description: Triton does it each time."""


def _described(value: Any, tensors: list[Any]) -> Any:
    """Return what of an argument decides what is done; tensors are gathered."""
    kind = value.__class__
    if kind is tl.tensor:
        tensors.append(value)
        return value.type.name, value.handle.dtype.name
    if kind is float:
        return value.hex()
    if kind is int or kind is bool or kind is str or value is None:
        return kind, value
    if kind is tuple or kind is list:
        return kind, *[_described(item, tensors) for item in value]
    if kind is tl.tuple:
        return kind, *[_described(item, tensors) for item in value.values]
    if kind is tl.constexpr:
        return kind, _described(value.value, tensors)
    if isinstance(value, tl.dtype):
        return kind, value.name
    if kind is slice and value == SLICE:
        return kind
    raise Unknown


class _Recorder:
    """A builder that writes down the instructions that it is given."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder
        self.calls: list[tuple[str, Any, tuple[Any, ...], Any]] = []
        self.numpy_calls: dict[int, tuple[str, tuple[Any, ...], Any]] = {}

    def __getattr__(self, name: str) -> Any:
        member = getattr(self.builder, name)
        if not callable(member):
            return member

        def call(*args: Any) -> Any:
            result = member(*args)
            self.calls.append((name, member, args, result))
            return result

        return call

    def numpy_call(self, name: str) -> Any:
        real = getattr(type(self.builder), name)

        def call(*args: Any) -> Any:
            result = real(self.builder, *args)
            self.numpy_calls[id(result)] = (name, args, result)
            return result

        return call


class _Writer:
    """Writes the Python of one program; `spread` says that NumPy is left to broadcast."""

    def __init__(self, recorder: _Recorder, tensors: list[Any], spread: bool) -> None:
        self.recorder, self.spread = recorder, spread
        self.names = {id(t.handle): f"t{i}.handle.data" for i, t in enumerate(tensors)}
        self.handles = {id(t.handle): f"t{i}.handle" for i, t in enumerate(tensors)}
        self.inputs = {id(t): f"t{i}" for i, t in enumerate(tensors)}
        self.space: dict[str, Any] = {
            "Handle": TensorHandle,
            "tensor": _tensor_of,
            "spread": _spread,
            "load": interpreter._interpreter.load,
        }
        self.lines: list[str] = []

    def constant(self, value: Any) -> str:
        name = f"c{len(self.space)}"
        self.space[name] = value
        return name

    def data(self, handle: TensorHandle) -> str:
        """The text of the array of a handle."""
        if id(handle) not in self.names:
            raise Unknown  # made without the builder
        return self.names[id(handle)]

    def argument(self, value: Any) -> str:
        """The text of an argument of a builder's method."""
        if id(value) in self.handles and isinstance(value, TensorHandle):
            return self.handles[id(value)]
        if isinstance(value, TensorHandle):
            return f"Handle({self.data(value)}, {self.constant(value.dtype)})"
        if isinstance(value, list | tuple) and any(isinstance(x, TensorHandle) for x in value):
            raise Unknown
        return self.constant(value)

    def call(self, name: str, member: Any, args: tuple[Any, ...], result: Any) -> None:
        handles = [x for x in args if isinstance(x, TensorHandle)]
        if not isinstance(result, TensorHandle | tuple | None):
            return  # a type, or the like
        if not handles and name not in NOT_CONSTANT:
            if result is not None:
                self.names[id(result)] = self.constant(result.data)
            return
        if name in SPREADING and self.spread:
            if name == "create_expand_dims" and args[1] != 0:
                raise Unknown  # NumPy puts new axes in front
            self.names[id(result)] = self.data(handles[0])
            return
        if "atomic" in name:
            raise Unknown  # done twice it gives another result
        numpy_call = self.recorder.numpy_calls.get(id(result))
        text = numpy_call and self.numpy_text(*numpy_call, handles)
        if self.spread and not text and name not in BY_ELEMENT:
            raise Unknown
        text = text or self.short_text(name, args, handles, result)
        made = f"d{len(self.lines)}"
        if not text:
            text = f"{self.constant(member)}({', '.join(self.argument(x) for x in args)})"
            text += ".data" if isinstance(result, TensorHandle) else ""
        self.lines.append(f"{made} = {text}")
        for place, one in enumerate(result if isinstance(result, tuple) else ()):
            self.names[id(one)] = f"{made}[{place}].data"
        if isinstance(result, TensorHandle):
            self.names[id(result)] = made

    def short_text(
        self, name: str, args: tuple[Any, ...], handles: list[Any], result: Any
    ) -> str | None:
        """The text of an instruction that NumPy does faster than the interpreter."""
        if name == "create_addptr":
            ptr, offset = handles
            size = max(1, ptr.get_element_ty().primitive_bitwidth // 8)
            integer = self.constant(np.uint64)
            return f"{self.data(ptr)} + {size} * {self.data(offset)}.astype({integer})"
        if name in RESHAPING:
            return f"{self.data(handles[0])}.reshape({result.data.shape})"
        if name in SPREADING:
            return f"spread({self.data(handles[0])}, {result.data.shape})"
        if name in ("create_load", "create_masked_load"):
            given = [self.data(x) for x in handles]
            if len(given) < 2:
                given.append(self.constant(np.ones(result.data.shape, bool)))
            if len(given) < 3:
                given.append(self.constant(np.zeros_like(result.data)))
            return f"load({', '.join(given)}, {self.constant(result.data.dtype)})"
        return None

    def numpy_text(
        self, kind: str, args: tuple[Any, ...], result: Any, handles: list[Any]
    ) -> str | None:
        """The text of an instruction that is one call of NumPy."""
        given = [x for x in args if isinstance(x, TensorHandle)]
        if [id(x) for x in given] != [id(x) for x in handles]:
            return None
        data = [self.data(x) for x in given]
        if kind == "cast_impl":
            if tl.bfloat16 in (given[0].dtype.scalar, result.dtype):
                return None
            return f"{data[0]}.astype({self.constant(result.data.dtype)})"
        if kind == "binary_op" and all(x.data.dtype == np.bool_ for x in given):
            bits = {np.bitwise_and, np.bitwise_or, np.bitwise_xor}
            if args[-1] not in bits:
                return None
        text = f"{self.constant(args[-1])}({', '.join(data)})"
        plain = args[-1](*(x.data[..., :1].reshape(-1)[:1] for x in given)).dtype
        return text if plain == result.data.dtype else f"{text}.astype({result.data.dtype.char!r})"

    def returned(self, value: Any) -> str:
        if value is None:
            return "None"
        if id(value) in self.inputs:
            return self.inputs[id(value)]
        if isinstance(value, tl.tensor):
            if value.handle is None:
                return self.constant(value)  # of a store
            # Made by Triton once; a tensor like it has other data.
            facts = self.constant({k: v for k, v in vars(value).items() if k != "handle"})
            return (
                f"tensor({self.data(value.handle)}, {self.constant(value.handle.dtype)}, {facts})"
            )
        if type(value) is tuple:
            return f"({', '.join(self.returned(x) for x in value)},)"
        raise Unknown

    def program(self, result: Any, count: int) -> Callable[..., Any]:
        for call in self.recorder.calls:
            self.call(*call)
        arguments = ", ".join(f"t{i}" for i in range(count))
        lines = [f"def program({arguments}):", *self.lines, f"return {self.returned(result)}"]
        exec(_code("\n ".join(lines)), self.space)  # its text is written above
        return self.space["program"]


@cache
def _code(text: str) -> Any:
    return compile(text, "<program>", "exec")


def _spread(data: Any, shape: tuple[int, ...]) -> Any:
    """As `np.broadcast_to`; for so few numbers a copy is faster than a view."""
    made = np.empty(shape, data.dtype)
    made[...] = data
    return made


def _tensor_of(data: Any, dtype: Any, facts: dict[str, Any]) -> Any:
    handle = TensorHandle.__new__(TensorHandle)
    handle.data, handle.dtype, handle.attr = data, dtype, {}
    made = tl.tensor.__new__(tl.tensor)
    made.__dict__ = {"handle": handle, **facts}
    return made


def _copied(value: Any, tensors: list[Any]) -> Any:
    """The argument with tensors of its own: one that is given twice is two."""
    kind = value.__class__
    if kind is tl.tensor:
        handle = value.handle
        tensors.append(tl.tensor(TensorHandle(handle.data, handle.dtype), value.type))
        return tensors[-1]
    if kind is tuple or kind is list:
        return kind(_copied(item, tensors) for item in value)
    if kind is tl.tuple:
        return tl.tuple([_copied(item, tensors) for item in value.values], value.type)
    return value


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, tuple):
        return all(_same(a, b) for a, b in zip(one, two, strict=True))
    if one.handle is None:
        return two.handle is None
    a, b = one.handle.data, two.handle.data
    same = a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
    return same and one.handle.dtype == two.handle.dtype


def _program_of(recorder: _Recorder, tensors: list[Any], result: Any) -> Any:
    """The program of what was written down, or None if it cannot be repeated."""
    for spread in (True, False):
        try:
            program = _Writer(recorder, tensors, spread).program(result, len(tensors))
        except Unknown:
            continue
        if result is None or _same(program(*tensors), result):
            return program
    return None


class Language:
    """Stands between the kernels and Triton's language."""

    def __init__(self) -> None:
        self.is_plain = False
        self.semantic = interpreter.interpreter_semantic
        self.builder = self.semantic.builder
        self.replaced: dict[Any, Any] = {}

    def record(self, member: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Return what Triton gives, and the program that repeats it."""
        tensors: list[Any] = []
        own = [_copied(x, tensors) for x in args]
        named = {name: _copied(x, tensors) for name, x in kwargs.items()}
        recorder = _Recorder(self.builder)
        for name in NUMPY_CALLS:
            setattr(self.builder, name, recorder.numpy_call(name))
        self.semantic.builder = recorder
        try:
            result = member(*own, **named, _semantic=self.semantic)
        finally:
            self.semantic.builder = self.builder
            for name in NUMPY_CALLS:
                delattr(self.builder, name)
        return result, _program_of(recorder, tensors, result)

    def replaying(self, member: Any) -> Any:
        """The function of the language that does what `member` does."""
        programs: dict[Any, Any] = {}
        semantic, builder = self.semantic, self.builder

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs.pop("_semantic", None)
            # The latter: within a call that is being written down.
            if self.is_plain or semantic.builder is not builder:
                return member(*args, **kwargs, _semantic=semantic)
            tensors: list[Any] = []
            key: list[Any] = []
            try:
                for value in args:
                    if value.__class__ is tl.tensor:  # nearly all are
                        tensors.append(value)
                        key += (value.type.name, value.handle.dtype.name)
                    else:
                        key.append(_described(value, tensors))
                for name, value in kwargs.items():
                    key += (name, _described(value, tensors))
            except Unknown:
                return member(*args, **kwargs, _semantic=semantic)
            program = programs.get(kind := tuple(key), self)
            if program is self:
                result, programs[kind] = self.record(member, args, kwargs)
                return result
            if program is None:
                return member(*args, **kwargs, _semantic=semantic)
            return program(*tensors)

        return call

    def patch(self, obj: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        """As `interpreter._patch_attr`."""
        if member not in self.replaced:
            self.replaced[member] = self.replaying(member)
        scope.set_attr(obj, name, self.replaced[member])


LANGUAGE = Language()
interpreter._patch_attr = LANGUAGE.patch


@contextmanager
def plain() -> Iterator[None]:
    """Let Triton's interpreter do each call by itself."""
    LANGUAGE.is_plain = True
    try:
        yield
    finally:
        LANGUAGE.is_plain = False
