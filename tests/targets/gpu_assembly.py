"""An evaluator of the few instructions of `targets/gpu_sequences.py`, on arrays of registers.

It reads the call of `inline_asm_elementwise` in the emitted source. Meanings are those of the PTX
and the GCN manuals; an instruction that is not in the tables is an error. An output that is not
marked as written early shares the register of the operand, as a compiler may have it.
"""

import ast
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
WORD = 0xFFFFFFFF


def bytes_of(x: Array) -> Array:
    return (x[..., None] >> (8 * np.arange(4))) & 255


def prmt(a: Array, b: Array, selector: Array) -> Array:
    """Byte i is byte s of b:a; with bit 3 of s set, eight copies of the sign of that byte."""
    pool = np.concatenate([bytes_of(a), bytes_of(b)], axis=-1)
    nibbles = (selector[..., None] >> (4 * np.arange(4))) & 15
    picked = np.take_along_axis(pool, nibbles & 7, axis=-1)
    picked = np.where(nibbles & 8, (picked >> 7) * 255, picked)
    return (picked << (8 * np.arange(4))).sum(axis=-1)


def perm(high: Array, low: Array, selector: Array) -> Array:
    """v_perm_b32: byte i is byte s of {high, low}, low first; 8..11 signs, 12 zero, above 255."""
    pool = np.concatenate([bytes_of(low), bytes_of(high)], axis=-1)
    numbers = bytes_of(selector)
    picked = np.take_along_axis(pool, numbers & 7, axis=-1)
    signs = (np.take_along_axis(pool, (2 * (numbers & 3) + 1), axis=-1) >> 7) * 255
    picked = np.where(numbers >= 8, signs, picked)
    picked = np.where(numbers >= 12, 0, picked)
    return (np.where(numbers > 12, 255, picked) << (8 * np.arange(4))).sum(axis=-1)


def lop3(a: Array, b: Array, c: Array, table: Array) -> Array:
    """Bit by bit, the bit 4 a + 2 b + c of the table."""
    bits = np.arange(32)
    index = sum(((x[..., None] >> bits) & 1) << i for i, x in ((2, a), (1, b), (0, c)))
    return (((table[..., None] >> index) & 1) << bits).sum(axis=-1)


def shift_right(x: Array, by: Array) -> Array:
    """PTX clamps the count: 32 and more give zero."""
    return np.where(by < 32, x >> np.minimum(by, 31), 0)


def shift_left(x: Array, by: Array) -> Array:
    return np.where(by < 32, x << np.minimum(by, 31), 0)


def halves_equal(a: Array, b: Array) -> Array:
    """1.0 where the float16 of a half are equal, else 0.0."""
    x, y = (np.stack([r & 65535, r >> 16]).astype(np.uint16).view(np.float16) for r in (a, b))
    low, high = (x == y).astype(np.float16).view(np.uint16).astype(np.int64)
    return low | high << 16


def halves_times(a: Array, b: Array) -> Array:
    """The products of the two float16 of a register, each rounded once."""
    x, y = (np.stack([r & 65535, r >> 16]).astype(np.uint16).view(np.float16) for r in (a, b))
    with np.errstate(all="ignore"):
        low, high = (x * y).view(np.uint16).astype(np.int64)
    return low | high << 16


OPCODES: dict[str, Callable[..., Array]] = {
    # PTX ISA, "Logic and Shift Instructions", "Data Movement".
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "not.b32": lambda a: ~a,
    "shr.b32": shift_right,
    "shr.u32": shift_right,
    "shl.b32": shift_left,
    "prmt.b32": prmt,
    "mul.lo.u32": lambda a, b: a * b,
    "mul.rn.f16x2": halves_times,
    "set.eq.f16x2.f16x2": halves_equal,
    "lop3.b32": lop3,
    # CDNA3 ISA, VOP1, VOP2 and VOP3; "rev" takes the count first, of which 5 bits count.
    "v_mov_b32": lambda a: a,
    "v_and_b32": lambda a, b: a & b,
    "v_or_b32": lambda a, b: a | b,
    "v_xor_b32": lambda a, b: a ^ b,
    "v_lshrrev_b32": lambda by, x: x >> (by & 31),
    "v_lshlrev_b32": lambda by, x: x << (by & 31),
    "v_and_or_b32": lambda a, b, c: (a & b) | c,
    "v_lshl_or_b32": lambda a, by, c: (a << (by & 31)) | c,
    "v_bfi_b32": lambda mask, a, b: (mask & a) | (~mask & b),
    "v_alignbit_b32": lambda high, low, by: (high << 32 | low) >> (by & 31),
    "v_bfe_u32": lambda a, by, width: (a >> (by & 31)) & ((1 << (width & 31)) - 1),
    "v_perm_b32": perm,
    "v_pk_mul_f16": halves_times,
}


class UnknownInstruction(AssertionError):
    """The evaluator has no meaning for it: add it, from the manual."""


@dataclass(frozen=True)
class Assembly:
    """One call of `inline_asm_elementwise`.

    Attributes:
        lines: instructions.
        outputs: constraints of $0, $1, ...
        operands: constraints of the operands, which follow the outputs.
        pack: elements of a register.
        dtypes: of the results.
        kept: registers that it declares for the whole kernel.
    """

    lines: tuple[str, ...]
    outputs: tuple[str, ...]
    operands: tuple[str, ...]
    pack: int
    dtypes: tuple[str, ...]
    kept: tuple[str, ...] = ()


def assembly_of(source: str) -> Assembly | None:
    """Read the emitted function; None where it is plain Triton."""
    calls = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.inline_asm_elementwise"
    ]
    if not calls:
        return None
    (call,) = calls
    text, constraints, arguments = (ast.unparse(x) for x in call.args)
    options = {word.arg: ast.unparse(word.value) for word in call.keywords}
    every = ast.literal_eval(constraints).split(",")
    outputs = [text for text in every if text.startswith("=")]
    operands = every[len(outputs) :]
    assert len(operands) == len(arguments.split(",")), arguments
    body = ast.literal_eval(text).strip()
    if body.startswith("{"):
        assert body.endswith("}"), body
        body = re.sub(r"^\{\s*(?:/\* words \*/ )?\.reg \.b32 [\w, ]+;", "", body).removesuffix("}")
    declared = re.match(r"\.reg \.b32 ([\w, ]+);", body)
    body = body[declared.end() :] if declared else body
    kept = tuple(declared[1].split(", ")) if declared else ()
    assert options["is_pure"] == str(not kept), "what others need is not left out"
    lines = tuple(line.strip() for line in re.split(r"[;\n]", body) if line.strip())
    dtypes = tuple(re.findall(r"tl\.(\w+)", options["dtype"]))
    assert len(dtypes) == len(outputs)
    return Assembly(lines, tuple(outputs), tuple(operands), int(options["pack"]), dtypes, kept)


def evaluated(
    assembly: Assembly, *given: Array, held: Mapping[str, Array] | None = None
) -> tuple[Array, ...]:
    """Return the output registers for those of the operands, then those kept, uint32 in int64.

    `held`: registers of the kernel that were filled before.

    Raises: UnknownInstruction; KeyError for a register that was not written.
    """
    first = f"${len(assembly.outputs)}"
    early = {f"${i}" for i, text in enumerate(assembly.outputs) if "&" in text}
    registers = dict(held or {})
    registers |= {f"${len(assembly.outputs) + i}": x for i, x in enumerate(given)}

    outputs = {f"${i}" for i in range(len(assembly.outputs))}

    def slot(name: str) -> str:
        is_shared = name in outputs and name not in early
        return first if is_shared else name

    def read(name: str) -> Array:
        if re.fullmatch(r"0x[0-9a-fA-F]+|\d+", name):
            return np.full_like(given[0], int(name, 0))
        return registers[slot(name)]

    for line in assembly.lines:
        opcode, _, rest = line.partition(" ")
        target, *names = (name.strip() for name in rest.split(","))
        if opcode not in OPCODES:
            raise UnknownInstruction(f"{opcode!r} in {line!r}: gpu_assembly.py has no meaning")
        registers[slot(target)] = OPCODES[opcode](*map(read, names)) & WORD
    names = (*(f"${i}" for i in range(len(assembly.outputs))), *assembly.kept)
    return tuple(registers[slot(name)] for name in names)
