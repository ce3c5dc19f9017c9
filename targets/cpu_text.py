"""Text of a kernel in TVMScript: lines with indentation, arguments, and the vector idioms used.

Everything is text so that the emitted source can be read, dumped and kept as a golden. An index is
64-bit, or 32-bit and constant once the loops marked `unroll` are written out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

SIZES = {"uint8": 1, "int8": 1, "float16": 2, "uint16": 2, "int16": 2, "float32": 4, "int32": 4}


@dataclass(slots=True)
class Kernel:
    """One kernel while it is written.

    Attributes:
        name: of the function.
        buffers: (name, dtype) of each array argument; all are flat.
        scalars: names of the int64 arguments, which follow the arrays.
        lines: of the body.
    """

    name: str
    buffers: list[tuple[str, str]] = field(default_factory=list)
    scalars: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    depth: int = 1
    names: dict[str, int] = field(default_factory=dict)

    def line(self, text: str) -> None:
        """Write one line at the present depth."""
        self.lines.append("    " * self.depth + text)

    def note(self, text: str) -> None:
        """Write a comment."""
        self.line(f"# {text}")

    def let(self, name: str, value: str) -> None:
        """Bind a name to a value."""
        self.line(f"{name}: T.let = {value}")

    def fresh(self, name: str, value: str) -> str:
        """Bind a new name that begins with `name` to a value, and return it."""
        self.names[name] = self.names.get(name, 0) + 1
        self.let(f"{name}_{self.names[name]}", value)
        return f"{name}_{self.names[name]}"

    @contextmanager
    def block(self, head: str) -> Iterator[None]:
        """Write `head:` and indent what follows."""
        self.line(f"{head}:")
        self.depth += 1
        yield
        self.depth -= 1

    def array(self, name: str, dtype: str) -> str:
        """Declare an array argument, once, and return its name."""
        if (name, dtype) not in self.buffers:
            self.buffers.append((name, dtype))
        return name

    def scalar(self, name: str) -> str:
        """Declare an int64 argument, once, and return its name."""
        if name not in self.scalars:
            self.scalars.append(name)
        return name

    def scratch(self, name: str, count: int, dtype: str = "float32") -> str:
        """Declare memory of this thread. Under 1 KiB it is the stack's, else the pool's."""
        self.line(f'{name} = T.alloc_buffer(({count},), "{dtype}", scope="global")')
        return name

    def source(self) -> str:
        """Return the whole function.

        `align` is the element size: the arrays of a caller need no wider alignment.
        """
        handles = [f"{name}_p: T.handle" for name, _ in self.buffers]
        arguments = ", ".join(handles + [f"{name}: T.int64" for name in self.scalars])
        head = [
            "@T.prim_func(s_tir=True)",
            f"def {self.name}({arguments}):",
            f'    T.func_attr({{"global_symbol": "{self.name}", "tir.noalias": True}})',
        ]
        for name, dtype in self.buffers:
            size = SIZES.get(dtype, 8)
            head.append(f"    {name}_n = T.int64()")
            head.append(
                f'    {name} = T.match_buffer({name}_p, ({name}_n,), "{dtype}", align={size})'
            )
        return "\n".join(head + self.lines) + "\n"


def at(buffer: str, index: str, lanes: int) -> str:
    """Return `lanes` neighbours of a buffer, as value or as target of an assignment."""
    return f"{buffer}[{index}]" if lanes == 1 else f"{buffer}[T.ramp({index}, 1, {lanes})]"


def kind(dtype: str, lanes: int) -> str:
    """Return the name of a vector type."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def cast(dtype: str, value: str, lanes: int) -> str:
    """Return a value converted to a number type."""
    return f'T.Cast("{kind(dtype, lanes)}", {value})'


def splat(value: str, lanes: int) -> str:
    """Return a scalar in every lane."""
    return value if lanes == 1 else f"T.broadcast({value}, {lanes})"


def number(value: float, lanes: int = 1, dtype: str = "float32") -> str:
    """Return a constant in every lane."""
    text = f'float("{value!r}")' if value in (float("inf"), float("-inf")) else repr(value)
    return splat(f"T.{dtype}({text})", lanes)


def bits_as(dtype: str, value: str, lanes: int) -> str:
    """Return the bits of a value read as another type of the same width."""
    return f'T.reinterpret("{kind(dtype, lanes)}", {value})'


def pure(intrinsic: str, dtype: str, lanes: int, *arguments: str) -> str:
    """Return a call of an LLVM intrinsic without side effects."""
    return f'T.call_llvm_pure_intrin("{kind(dtype, lanes)}", "{intrinsic}", {", ".join(arguments)})'


def fma(a: str, b: str, c: str) -> str:
    """Return a b + c, rounded once."""
    return f"T.fma({a}, {b}, {c})"


def rint(value: str, lanes: int, dtype: str = "float32") -> str:
    """Return the nearest integer, ties to even."""
    return pure("llvm.rint", dtype, lanes, value)


def horizontal(kernel: Kernel, accumulators: list[tuple[str, str]], lanes: int, out: str) -> None:
    """Write the sum over lanes of accumulator i to `out[i]`; `out` holds a multiple of 4.

    Eight lanes go through a tree of pair sums, four accumulators at once.
    """
    if lanes < 8:
        for i, (buffer, index) in enumerate(accumulators):
            terms = [f"{buffer}[{index} + {lane}]" for lane in range(lanes)]
            kernel.line(f"{out}[{i}] = {' + '.join(terms)}")
        return
    for first in range(0, len(accumulators), 4):
        four = (accumulators[first : first + 4] + [accumulators[-1]] * 4)[:4]
        a, b, c, d = (at(buffer, index, 8) for buffer, index in four)
        hadd = "llvm.x86.avx.hadd.ps.256"
        pairs = (pure(hadd, "float32", 8, a, b), pure(hadd, "float32", 8, c, d))
        kernel.let(f"sums{first}", pure(hadd, "float32", 8, *pairs))
        low, high = (f'T.vector{side}("float32x4", sums{first})' for side in ("low", "high"))
        kernel.line(f"{at(out, str(first), 4)} = {low} + {high}")
