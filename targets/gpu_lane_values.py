"""Outputs of a whole tile with four heads as rows; see `gpu_lanes.py`."""

from __future__ import annotations

from ..ir.arrangements import TURNED
from ..ir.halves import TILE
from ..ir.plan import AttentionPlan
from .gpu_lanes import PORTION, Row, Stored, Values, scale_in
from .gpu_scales import affine, has_zero, middle_of
from .gpu_sources import pieces_of
from .gpu_text import LN_2, Kernel, both
from .gpu_values import LARGEST_LIFT


def fetched_values(v: tuple[Values, ...]) -> list[tuple[str, str]]:
    """Return (name, load) of all that a tile of values is."""
    found = []
    for part in v:
        reader = part.reader
        inside = "" if reader.layout.tokens == TILE else "v_in"
        found += [(row.name, _load_columns(part, row, inside)) for row in part.columns]
        names = [scale_in(reader, scale) for scale in part.all_scales]
        if has_zero(reader):
            names += [Stored(reader, "zero", scale) for scale in part.all_scales]
        found += [(one.name, one.load(inside)) for one in names]
    return found


def _load_columns(part: Values, row: Row, inside: str) -> str:
    """Return the load of a tile: half-words of two tokens of each column, [columns, N / 2]."""
    size, field = part.reader.layout.tokens, part.reader.part.field(row.field)
    more = f" + {inside} // 2" if inside else ""
    column = f"{part.name}_column"
    column = column if field.shape[1] == part.row else f"({column} % {field.shape[1]})"
    at = f"v_int16 + v_block // 2 + {field.offset // 2}{more}"
    at += f" + {column}[None, :, None] * {size // 2}"
    at += f" + tl.arange(0, {TILE // 2 // PORTION})[:, None, None] * {PORTION}"
    at += f" + tl.arange(0, {PORTION})[None, None, :]"
    shape = f"({part.wide}, {TILE // 2})"
    return f"tl.reshape(tl.permute(tl.load({at}), (1, 0, 2)), {shape})"


def write_sums(kernel: Kernel, v: tuple[Values, ...], rows: int) -> None:
    """Bind the outputs, what the loop adds up beside them, and the column of each lane."""
    for part in v:
        kernel.line(f"{part.name}_column = {part.column}")
        for name, bits in part.moves.items():
            moved = f"({bits}).to(tl.int16)[:, None] + {_no_tokens()}"
            kernel.line(f"{part.name}_{name} = {moved}")
        for i in range(part.planes):
            for scale in part.scales(i):
                shape = f"({rows}, {part.wide})"
                kernel.line(f"{part.name}_out_{i}_{scale} = tl.zeros({shape}, tl.float32)")
        for scale in part.all_scales:
            names = ["zeros"] if has_zero(part.reader) else []
            names += ["weights"] if middle_of(part.reader) else []
            for name in names:
                kernel.line(f"{part.name}_{name}_{scale} = tl.zeros(({rows}, {TILE}), tl.float32)")


def _no_tokens() -> str:
    return f"tl.zeros((1, {TILE // 2}), tl.int16)"


def write_weights(kernel: Kernel, plan: AttentionPlan, v: tuple[Values, ...]) -> None:
    """Bind `shrink` and <part>_w_g, the exponentials times the scales of group g, in float16."""
    names = []
    for part in v:
        for scale in part.all_scales:
            names.append(f"{part.name}_scale_{scale}")
            kernel.line(f"{names[-1]} = {scale_in(part.reader, scale).number}")
    kernel.note("the largest score, less the exponent of the largest scale, as a whole number")
    largest = f"{names[0]}.to(tl.int32, bitcast=True)"
    for name in names[1:]:
        largest = f"tl.maximum({largest}, {name}.to(tl.int32, bitcast=True))"
    kernel.line(f"bits = tl.max({largest}, axis=0)")
    kernel.line(
        f"lift = tl.minimum(tl.maximum((bits >> 23) - 126, -{LARGEST_LIFT}), {LARGEST_LIFT})"
    )
    kernel.line("most = tl.maximum(best, tl.max(tl.ceil(score).to(tl.int32), axis=1) + lift)")
    kernel.line("weight = tl.exp2(score - most.to(tl.float32)[:, None])")
    kernel.line("shrink = tl.exp2((best - most).to(tl.float32))[:, None]")
    kernel.line("best = most")
    kernel.line("total = total * shrink + weight")
    for part in v:
        for scale in part.all_scales:
            _write_group(kernel, part, scale)


def _write_group(kernel: Kernel, part: Values, scale: int) -> None:
    """Bind the weights of one scale, and add up what goes beside the products."""
    reader, own = part.reader, f"{part.name}_scale_{scale}"
    kernel.line(f"w = (weight * {own}[None, :]).to(tl.float16)")
    kernel.line(f"{part.name}_w_{scale} = in_turn(w)")
    if middle_of(reader):
        name = f"{part.name}_weights_{scale}"
        kernel.line(f"{name} = {name} * shrink + w.to(tl.float32)")
    if not has_zero(reader):
        return
    zero, middle = Stored(reader, "zero", scale).number, float(middle_of(reader))
    if affine(reader).zero == "int":
        zero = f"({middle} - {zero}) * {own}"
    elif middle:
        zero = f"{zero} + {middle} * {own}"
    kernel.line(f"zero = {zero}")
    name = f"{part.name}_zeros_{scale}"
    kernel.line(f"{name} = {name} * shrink + weight * zero[None, :]")


def write_values(kernel: Kernel, v: tuple[Values, ...]) -> None:
    """Add the products of weights and codes to the outputs."""
    for part in v:
        names = [f"{part.name}_{kind}_{i}" for kind in ("even", "odd") for i in range(part.planes)]
        given = [row.name for row in part.columns] + [f"{part.name}_{x}" for x in part.moves]
        kernel.line(f"{', '.join(names)} = {part.sequence.name}({', '.join(given)})")
        for i in range(part.planes):
            codes = f"tl.trans(by_turns({part.name}_even_{i}, {part.name}_odd_{i}))"
            kernel.line(f"codes = {codes}")
            for scale in part.scales(i):
                out, weights = f"{part.name}_out_{i}_{scale}", f"{part.name}_w_{scale}"
                kernel.line(f"{out} = tl.dot({weights}, codes, {out} * shrink)")


def write_partials(kernel: Kernel, plan: AttentionPlan, v: tuple[Values, ...]) -> None:
    """Store the split's share of the result."""
    kernel.note("the split's share of the result; zero points are the same for all of a scale")
    kernel.line("part = (bh * parts + split) * rows + row")
    kernel.line(f"tl.store(part_max + part, best.to(tl.float32) * {LN_2}, mask=exists)")
    kernel.line("tl.store(part_sum + part, tl.sum(total, axis=1), mask=exists)")
    for part in v:
        for i in range(part.planes):
            kernel.line(f"out = {_picked(part, i)}")
            at = f"part[:, None] * {plan.v.channels} + ({part.channels(i)})[None, :]"
            inside = f"({part.inside})[None, :]" if part.inside else ""
            mask = both("exists[:, None]", inside)
            kernel.line(f"tl.store(part_out + {at}, out, mask={mask})")
    for piece in pieces_of(plan.v, TURNED):
        if not piece.reader.is_stored:
            piece.reader.write_columns(kernel)
            at = f"part[:, None] * {plan.v.channels} + ({piece.channels})[None, :]"
            columns = piece.reader.columns
            mask = both("exists[:, None]", f"{columns}[None, :]" if columns else "")
            kernel.line(f"tl.store(part_out + {at}, 0.0, mask={mask})")


def _picked(part: Values, plane: int) -> str:
    """Return the outputs of a plane: of each lane, the sum of its own scale."""
    found = ""
    for scale in part.scales(plane):
        own = f"{part.name}_out_{plane}_{scale} * {1.0 / part.unit(plane)!r}"
        if has_zero(part.reader):
            own += f" + tl.sum({part.name}_zeros_{scale}, axis=1)[:, None]"
        if middle_of(part.reader):
            middle = float(middle_of(part.reader))
            own += f" - {middle} * tl.sum({part.name}_weights_{scale}, axis=1)[:, None]"
        is_own = f"(({part.scale_of(plane)}) == {scale})[None, :]"
        found = f"tl.where({is_own}, {own}, {found})" if found else own
    return found
