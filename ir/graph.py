"""The program: straight-line SSA, frozen all the way down."""

from dataclasses import dataclass, field
from typing import TypeVar

from .attrs import AttrValue
from .errors import KvantError
from .types import TensorType, Type

A = TypeVar("A")


@dataclass(frozen=True, slots=True)
class Value:
    """What an op gives; printed as %name. The name is unique in its graph."""

    name: str
    type: Type

    def __str__(self) -> str:
        return f"%{self.name}"

    @property
    def tensor(self) -> TensorType:
        """The type, where it is known to be a tensor. Raises: KvantError for a cache."""
        if isinstance(self.type, TensorType):
            return self.type
        raise KvantError("not-a-tensor", f"{self} is {self.type}", where=str(self), fix="read it")


@dataclass(frozen=True, slots=True)
class Op:
    """One operation: what it is (a row of OPS), on what, and what it gives.

    `loc` is the model's own source line where known; two ops that differ in it alone are equal.
    """

    name: str
    args: tuple[Value, ...]
    attrs: tuple[tuple[str, AttrValue], ...]  # sorted by key
    results: tuple[Value, ...]
    loc: str | None = field(default=None, compare=False)

    @property
    def result(self) -> Value:
        """The only result. Raises: ValueError if there are several."""
        (only,) = self.results
        return only

    def attr(self, key: str) -> AttrValue:
        """Return the attribute `key`. Raises: KeyError if the op has none."""
        return dict(self.attrs)[key]

    def attr_as(self, key: str, kind: type[A]) -> A:
        """Return the attribute `key`, known to be a `kind`. Raises: KeyError, TypeError."""
        value = self.attr(key)
        if not isinstance(value, kind):
            raise TypeError(f"{self.name}: {key} = {value!r} is not a {kind.__name__}")
        return value


@dataclass(frozen=True, slots=True)
class Graph:
    """Ops in order; each uses only what ops before it gave. Inputs and parameters are ops too."""

    name: str
    ops: tuple[Op, ...]
    outputs: tuple[Value, ...]

    def producer(self, value: Value) -> Op:
        """Return the op that gives `value`. Raises: KeyError if none does."""
        for op in self.ops:
            if value in op.results:
                return op
        raise KeyError(value.name)

    def users(self, value: Value) -> tuple[Op, ...]:
        """Return the ops that take `value`, in order."""
        return tuple(op for op in self.ops if value in op.args)

    def find(self, name: str) -> tuple[Op, ...]:
        """Return the ops called `name`, in order."""
        return tuple(op for op in self.ops if op.name == name)

    def params(self) -> dict[str, TensorType]:
        """Return the type of each parameter by its name (not the name of its value)."""
        return {op.attr_as("name", str): op.result.tensor for op in self.find("param")}

    def inputs(self) -> dict[str, TensorType]:
        """Return the type of each input by its name."""
        return {op.attr_as("name", str): op.result.tensor for op in self.find("input")}
