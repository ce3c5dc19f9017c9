"""Scores of integer arithmetic: q as integers times codes, summed in integers.

    s[r, t] = step_r sum_g s_g sum_c qi_c code_c + (sum q)_g z_g

4-bit codes meet int8 queries in vpmaddubsw (u8 x s8, pairs added in i16; at most 2 * 15 * 127 each,
so eight results add up without overflow) and vpmaddwd; 8-bit codes meet int16 queries in vpmaddwd.
"""

from __future__ import annotations

from ..ir.plan import AttentionPlan
from .cpu_pages import PageReader
from .cpu_rows import Rows
from .cpu_scores import TOKENS, store_sums, write_group_sums, write_scales_of_tokens
from .cpu_text import Kernel, at, cast, pure, splat

BYTE_PAIRS = "llvm.x86.avx2.pmadd.ub.sw"
WORD_PAIRS = "llvm.x86.avx2.pmadd.wd"
# Results of vpmaddubsw that fit one i16: 8 * 2 * 15 * 127 = 30,480.
MOST_PAIRS = 8
# Codes that one instruction takes, and the type of the integer queries, by bits of a code.
CHUNK = {4: (32, "int8"), 8: (16, "int16")}


def uses_integers(plan: AttentionPlan, reader: PageReader) -> bool:
    """Return whether the integer instructions serve a plan; else rounded q goes the float path."""
    if plan.query_bits is None:
        return False
    size = chunk(reader)[0]
    return reader.plane % size == 0 and reader.group % size == 0


def chunk(reader: PageReader) -> tuple[int, str]:
    """Return (codes of one instruction, type of the integer queries)."""
    return CHUNK[2 * 4 // reader.planes]


def write_page_scores_int(kernel: Kernel, reader: PageReader, rows: Rows) -> None:
    """Write the scores of the present page for a block of rows."""
    tokens = TOKENS.get(rows.count, 1)
    with kernel.block(f"for step in T.serial(T.truncdiv(k_t1 + {tokens - 1}, T.int64({tokens})))"):
        kernel.let("t", f"step * {tokens}")
        if reader.groups == 1:
            kernel.scratch("acc", rows.count * tokens * 8)
            with kernel.block(f"for s in T.unroll({tokens})"):
                _write_codes(kernel, reader, 0, "s")
                for r in range(rows.count):
                    total = _dot(reader, rows, 0, r)
                    kernel.line(f"{at('acc', f'({r} * {tokens} + s) * 8', 8)} = {total}")
            store_sums(kernel, rows, tokens, 8, "k_pos + t")
        else:
            write_group_sums(
                kernel, reader, rows, tokens, lambda g, s: _group(kernel, reader, rows, g, s)
            )
            store_sums(kernel, rows, tokens, 8, "k_pos + t")
    if reader.groups == 1:
        write_scales_of_tokens(
            kernel, reader, rows, lambda r: f"q_step[row_base + {rows.first} + {r}]"
        )


def _group(kernel: Kernel, reader: PageReader, rows: Rows, g: int, s: str) -> None:
    """Write `part`, the scaled dot of group g with token t + s, for every row."""
    _write_codes(kernel, reader, g, s)
    for r in range(rows.count):
        step = splat(f"q_step[row_base + {rows.first} + {r}]", 8)
        kernel.line(f"{at('part', str(r * 8), 8)} = {_dot(reader, rows, g, r)} * {step}")


def _channels(reader: PageReader, g: int) -> range:
    """Return the first channel of each chunk of group g."""
    return range(g * reader.group, (g + 1) * reader.group, chunk(reader)[0])


def _write_codes(kernel: Kernel, reader: PageReader, g: int, s: str) -> None:
    """Bind the codes of group g of token t + s, chunk by chunk."""
    size = chunk(reader)[0]
    for i, channel in enumerate(_channels(reader, g)):
        plane, place = divmod(channel, reader.plane)
        codes = reader.codes(f"t + {s}", str(place), size, plane)
        kernel.let(f"c{g}_{i}", codes if size == 32 else cast("int16", codes, size))


def _dot(reader: PageReader, rows: Rows, g: int, r: int) -> str:
    """Return the dot of the bound codes with row r, f32 in eight lanes."""
    size, dtype = chunk(reader)
    products = [
        _product(dtype, f"c{g}_{i}", at("q_codes", rows.query(str(r), str(channel)), size))
        for i, channel in enumerate(_channels(reader, g))
    ]
    if size == 16:
        return cast("float32", f"({' + '.join(products)})", 8)
    ones = splat("T.int16(1)", 16)
    words = [
        pure(WORD_PAIRS, "int32", 8, f"({' + '.join(products[i : i + MOST_PAIRS])})", ones)
        for i in range(0, len(products), MOST_PAIRS)
    ]
    return cast("float32", f"({' + '.join(words)})", 8)


def _product(dtype: str, codes: str, query: str) -> str:
    if dtype == "int16":
        return pure(WORD_PAIRS, "int32", 8, codes, query)
    return pure(BYTE_PAIRS, "int16", 16, codes, query)
