"""The text of a kernel while it is written: what all targets share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from ..ir.maps import Gather, Hadamard, Map, Scale, argument_name
from ..ir.plan import StreamPlan

LARGEST_F32 = 3.4028234663852886e38

# What the kernels of a plan do, by name, in the order in which a target writes them.
KERNELS = {
    "prepare": "map, scale and round the queries",
    "append_k": "map new keys and store them raw",
    "append_v": "map new values and store them raw",
    "encode_k": "encode due keys into pages",
    "encode_v": "encode due values into pages",
    "attend": "one query a row, for each split of the keys",
    "attend_block": "several queries a row, causal between them",
    "combine": "merge the splits",
}

# On a GPU, where a launch takes longer than storing a token, one kernel does what four do.
GPU_KERNELS = {
    "prepare": KERNELS["prepare"],
    "append": "map new keys and values and store them raw, and encode due ones into pages",
    "attend": KERNELS["attend"],
    "unpack": "write keys and values as plain numbers, for many queries to read",
    **{name: KERNELS[name] for name in ("attend_block", "combine")},
}

# On the host, where a call takes longer than storing a token, one more does the work of four.
HOST_KERNELS = {"step": "append one new token a row, and encode what is due, in one call"}


@dataclass(slots=True)
class KernelText:
    """Lines with indentation, and arguments: flat arrays first, then int64 numbers.

    Attributes:
        name: of the function.
        buffers: (name, dtype) of each array argument.
        scalars: names of the int64 arguments, which follow the arrays.
        lines: of the body.
    """

    name: str
    buffers: list[tuple[str, str]] = field(default_factory=list)
    scalars: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    depth: int = 1

    def line(self, text: str) -> None:
        """Write one line at the present depth."""
        self.lines.append("    " * self.depth + text)

    def note(self, text: str) -> None:
        """Write a comment."""
        self.line(f"# {text}")

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

    def source(self) -> str:
        """Return the whole function; every language has its own."""
        raise NotImplementedError

    def arguments(self) -> list[str]:
        """Return the arguments as launch.json has them: "name:dtype" for arrays, then "name"."""
        return [f"{name}:{dtype}" for name, dtype in self.buffers] + self.scalars


def kernels_text(head: str, sources: Mapping[str, str]) -> str:
    """Return kernels.py, what a person reads and what is compiled: imports, then each kernel.

    Args:
        head: the first lines.
        sources: text of each kernel by its name.
    """
    about = KERNELS | HOST_KERNELS | GPU_KERNELS
    parts = [f"\n\n# {name}: {about[name]}\n{source}" for name, source in sources.items()]
    return head + "".join(parts)


def chosen_word(
    operands: Sequence[int], word: Callable[[int], str], choose: Callable[[int, str, str], str]
) -> str:
    """Return the word of four bytes of a table that holds the operand of a code.

    Args:
        operands: bytes, a power of two of them, from four on.
        word: number of 32 bits -> text.
        choose: (bit of the code, text if it is set, text if not) -> text.
    """
    words = [
        word(int.from_bytes(bytes(operands[i : i + 4]), "little"))
        for i in range(0, len(operands), 4)
    ]
    while len(words) > 1:
        half = len(words) // 2
        pairs = zip(words[:half], words[half:], strict=True)
        words = [choose(4 * half, high, low) for low, high in pairs]
    return words[0]


def append_arguments(kernel: KernelText, stream: StreamPlan) -> None:
    """Declare what append takes: new tokens, where they go, the constants of the maps."""
    kernel.array("x", "float32")
    for name in ("first", "count"):
        kernel.array(name, "int64")
    store_arguments(kernel, stream)
    kernel.array("bad", "int64")
    constant_arguments(kernel, stream.maps)


def store_arguments(kernel: KernelText, stream: StreamPlan) -> None:
    """Declare where new tokens go."""
    role = stream.role
    kernel.array(f"{role}_length", "int64")
    if stream.tokens.sink:
        kernel.array(f"{role}_sink", "float32")
    kernel.array(f"{role}_tail", "float32")
    kernel.array(f"{role}_tail_first", "int64")


def constant_arguments(kernel: KernelText, maps: Sequence[Map]) -> None:
    """Declare the constants that maps read: f64 scales and i32 orders, flat [H, D]."""
    for m in maps:
        match m:
            case Gather(order=name):
                kernel.array(argument_name(name, "order"), "int32")
            case Scale(values=name):
                kernel.array(argument_name(name, "scale"), "float64")
            case Hadamard():
                pass
