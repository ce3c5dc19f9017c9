"""Text of a kernel in TVMScript: how it is written out, and the idioms of vectors and numbers used.

Everything is text so that the emitted source can be read, dumped and kept as a golden. An index is
64-bit, or 32-bit and constant once the loops marked `unroll` are written out.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .kernel_text import KernelText

SIZES = {"uint8": 1, "int8": 1, "float16": 2, "uint16": 2, "int16": 2, "float32": 4, "int32": 4}


@dataclass(slots=True)
class Kernel(KernelText):
    """One kernel in TVMScript while it is written.

    Attributes:
        names: how many names of each beginning `fresh` has bound.
        numbers: the int64 arguments of the function, where it finds what `arguments` lists in
            memory; None where it takes these themselves.
    """

    names: dict[str, int] = field(default_factory=dict)
    numbers: tuple[str, ...] | None = None

    def let(self, name: str, value: str) -> None:
        """Bind a name to a value."""
        self.line(f"{name}: T.let = {value}")

    def fresh(self, name: str, value: str) -> str:
        """Bind a new name that begins with `name` to a value, and return it."""
        self.names[name] = self.names.get(name, 0) + 1
        self.let(f"{name}_{self.names[name]}", value)
        return f"{name}_{self.names[name]}"

    def view(self, name: str, dtype: str, address: str) -> str:
        """Bind memory at an address, int64, as an array."""
        size = SIZES.get(dtype, 8)
        self.let(f"{name}_p", f'T.reinterpret(T.handle("{dtype}").ty, {address})')
        self.line(f'T.attr({name}_p, "storage_alignment", {size})')
        # How long it is, nobody asks.
        shape = f"(T.int64({1 << 48}),)"
        self.line(f'{name} = T.decl_buffer({shape}, "{dtype}", data={name}_p, align={size})')
        return name

    def scratch(self, name: str, count: int, dtype: str = "float32") -> str:
        """Declare memory of this thread. Under 1 KiB it is the stack's, else the pool's."""
        self.line(f'{name} = T.alloc_buffer(({count},), "{dtype}", scope="global")')
        return name

    def prefetch(self, buffer: str, index: str) -> None:
        """Ask for the cache line of an element that is read soon; any index is harmless."""
        address = f"T.address_of({buffer}[{index}])"
        how = "T.int32(0), T.int32(3), T.int32(1)"  # to read, into all levels, data
        self.line(f'T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch.p0", {address}, {how}))')

    def source(self) -> str:
        """Return the whole function.

        `align` is the element size: the arrays of a caller need no wider alignment.
        """
        own = self.numbers is None
        handles = [f"{name}_p: T.handle" for name, _ in self.buffers if own]
        numbers = self.scalars if self.numbers is None else self.numbers
        arguments = ", ".join(handles + [f"{name}: T.int64" for name in numbers])
        head = [
            "@T.prim_func(s_tir=True)",
            f"def {self.name}({arguments}):",
            f'    T.func_attr({{"global_symbol": "{self.name}", "tir.noalias": True}})',
        ]
        for name, dtype in self.buffers if own else ():
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
    """Return a b + c, rounded once where the processor has such an instruction, else twice."""
    return f"T.fma({a}, {b}, {c})"


def rint(value: str, lanes: int, dtype: str = "float32") -> str:
    """Return the nearest integer, ties to even."""
    return pure("llvm.rint", dtype, lanes, value)


def fold(kernel: Kernel, name: str, lanes: int, combine: str, first: int = 0) -> None:
    """Write lanes of a buffer combined, a power of two from `first` on, to the first of them."""
    half = lanes // 2
    while half:
        low, high = at(name, str(first), half), at(name, str(first + half), half)
        kernel.line(f"{low} = {combine.format(low, high)}")
        half //= 2


def fold_rows(
    kernel: Kernel, vectors: list[str], lanes: int, combine: str, out: str, first: int = 0
) -> None:
    """Write vector r combined over its lanes to `out[first + r]`.

    Neighbours of two vectors are woven into one, and those of two such, so that what is left of all
    of them is folded at once.

    Args:
        kernel: where to write.
        vectors: 1, 2 or 4 texts, f32.
        lanes: of each; a power of two, at least 4.
        combine: what to do with two numbers, associative.
        out: scratch of at least `first` + 4 elements.
        first: see above.
    """
    count, unit, left = len(vectors), 1, lanes
    names = [kernel.fresh("fold", vector) for vector in vectors]
    while len(names) > 1:
        pairs = zip(names[::2], names[1::2], strict=True)
        names = [kernel.fresh("fold", combine.format(*_woven(*two, lanes, unit))) for two in pairs]
        unit *= 2
    while left > 4:
        left //= 2
        halves = (f'T.vector{side}("float32x{left}", {names[0]})' for side in ("low", "high"))
        names = [kernel.fresh("fold", combine.format(*halves))]
    kernel.line(f"{at(out, str(first), 4)} = {names[0]}")
    while left > count:
        left //= 2
        low, high = at(out, str(first), left), at(out, str(first + left), left)
        kernel.line(f"{low} = {combine.format(low, high)}")


def _woven(a: str, b: str, lanes: int, unit: int) -> list[str]:
    """Return the lower and the upper pieces of four lanes of a and b, `unit` lanes of each in turn.

    These are the shuffles within 16 bytes that machines have: unpcklps, zip1 and so on.
    """
    order = (0, lanes, 1, lanes + 1) if unit == 1 else (0, 1, lanes, lanes + 1)
    pieces = ([4 * k + upper + i for k in range(lanes // 4) for i in order] for upper in (0, 2))
    return [f"T.Shuffle([{a}, {b}], {piece})" for piece in pieces]


def row_blocks(count: int) -> list[tuple[int, int]]:
    """Return (first, size) of blocks of rows that `fold_rows` takes."""
    found, first = [], 0
    for size in (4, 2, 1):
        while count - first >= size:
            found.append((first, size))
            first += size
    return found


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
        pairs = [kernel.fresh("pairs", _pair_sums(*two)) for two in ((a, b), (c, d))]
        kernel.let(f"sums{first}", _pair_sums(*pairs))
        low, high = (f'T.vector{side}("float32x4", sums{first})' for side in ("low", "high"))
        kernel.line(f"{at(out, str(first), 4)} = {low} + {high}")


def _pair_sums(a: str, b: str) -> str:
    """Return the sums of neighbours of eight lanes of a and b: of a, b, a, b, two of each.

    LLVM makes one instruction of it where there is one: vhaddps, two haddps or faddp.
    """
    even = (0, 2, 8, 10, 4, 6, 12, 14)
    sides = (f"T.Shuffle([{a}, {b}], {[i + odd for i in even]})" for odd in (0, 1))
    return f"({' + '.join(sides)})"


def as_f32(stored: str, dtype: str, lanes: int) -> str:
    """Return a stored f16, bf16 or f32 as f32; exact."""
    if dtype == "f32":
        return stored
    if dtype == "f16":
        return cast("float32", stored, lanes)
    wide = cast("uint32", stored, lanes)
    return bits_as("float32", f"T.shift_left({wide}, {splat('T.uint32(16)', lanes)})", lanes)


def rounded(value: str, dtype: str, lanes: int) -> str:
    """Return f32 rounded to f16 or bf16, to nearest even, as f32."""
    if dtype == "f16":
        return cast("float32", cast("float16", value, lanes), lanes)
    if dtype == "bf16":
        bits = f"T.shift_left({bf16_bits(value, lanes)}, {splat('T.uint32(16)', lanes)})"
        return bits_as("float32", bits, lanes)
    return value


def bf16_bits(value: str, lanes: int) -> str:
    """Return the bfloat16 bits of f32, as u32. A NaN may wrap around: look for it before."""
    bits = bits_as("uint32", value, lanes)
    low, one, half = (splat(f"T.uint32({n})", lanes) for n in (16, 1, 32767))
    odd = f"T.bitwise_and(T.shift_right({bits}, {low}), {one})"
    return f"T.shift_right({bits} + {half} + {odd}, {low})"


def to_stored(value: str, dtype: str, lanes: int) -> str:
    """Return f64 rounded once to f32 or f16; to bf16 by way of f32, as ir/arrays does."""
    if dtype == "f16":
        return cast("float16", _round_to_odd(value, lanes), lanes)
    single = cast("float32", value, lanes)
    return single if dtype == "f32" else cast("uint16", bf16_bits(single, lanes), lanes)


def _round_to_odd(value: str, lanes: int) -> str:
    """Return an f64 as f32 such that f16 of that is rounded once: cut, and mark what was cut."""
    bits = bits_as("int64", value, lanes)
    low, cut, none = (splat(f"T.int64({n})", lanes) for n in ((1 << 29) - 1, -(1 << 29), 0))
    marked = splat(f"T.int64({1 << 29})", lanes)
    mark = f"T.Select(T.bitwise_and({bits}, {low}) != {none}, {marked}, {none})"
    odd = f"T.bitwise_or(T.bitwise_and({bits}, {cut}), {mark})"
    return cast("float32", bits_as("float64", odd, lanes), lanes)


def bit_field(raw: str, shift: str, bits: int, lanes: int) -> str:
    """Return `bits` bits of each byte, from bit `shift` on."""
    amount = splat(f'T.Cast("uint8", {shift})', lanes)
    mask = splat(f"T.uint8({2**bits - 1})", lanes)
    return f"T.bitwise_and(T.shift_right({raw}, {amount}), {mask})"
