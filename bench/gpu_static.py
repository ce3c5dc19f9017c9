"""The GPU kernels of every recipe, judged with no GPU: `make bench-gpu-static`.

    python bench/gpu_static.py                           all rows; goes on where it was stopped
    python bench/gpu_static.py --only int4-token --gpu sm_90 --shape 32x8x128    rows printed
    python bench/gpu_static.py --render                  docs/gpu-static.md again from its data
    python bench/gpu_static.py --budgets                 lowers the budgets of the tests to the data

A row is a recipe, a shape and a kind of GPU: its kernels are compiled and their machine code is
counted. A row is made anew only where the text of its kernels or what compiles and counts them has
changed. Budgets (tests/targets/gpu_budgets.json) only fall; a row without one gets one.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import gpu_static_render as page
import gpu_static_rows
from gpu_fp16 import fp16_attend

from kvant.compiler import recipe as recipes
from kvant.compiler.shape import parse_shape, shape_model
from kvant.compiler.variants import rewrite
from kvant.ir.errors import KvantError
from kvant.ir.halves import TILE
from kvant.ir.plan import AttentionPlan
from kvant.targets import TARGETS, cost, gpu_counts
from kvant.targets.gpu import DIALECTS, TRITON, Compiled, compile_kernels, launch_facts
from kvant.targets.gpu_splits import merged_at_once, split_facts, tile_bytes
from kvant.targets.gpu_text import Kernel
from kvant.targets.kernel_text import GPU_KERNELS
from kvant.targets.machines import DEVICES, GPUS, Gpu
from kvant.targets.source import Source

ROOT = Path(__file__).resolve().parent.parent
DATA, PAGE = ROOT / "docs" / "gpu-static.json", ROOT / "docs" / "gpu-static.md"
BUDGETS = ROOT / "tests" / "targets" / "gpu_budgets.json"
WHAT_MAKES_A_ROW = ("gpu", "gpu_compile", "gpu_counts", "gpu_loops")

KINDS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
FEW_KINDS = ("sm_80", "sm_90", "gfx942")
FEW = ("fp16", "int4-token", "int8-token", "kivi-4bit", "quarot-kv2")  # in other shapes
OTHER_SHAPES = ("8x2x64", "4x1x256")
# Kernels that attend are made for every kind of GPU; the rest for one of each maker's.
ATTEND = ("attend", "attend_block")
ALL_KERNELS = ("sm_90", "gfx942")


Budgets = dict[str, dict[str, dict[str, float]]]
"""Of each recipe and kind of GPU: what may only fall."""


FORMS = {gpu_static_rows.BASE: "rows", gpu_static_rows.TOKENS: "tokens"}


def _stream(bits: int, axis: str, group: int | str) -> dict[str, Any]:
    return {"format": "int", "bits": bits, "axis": axis, "group": group, "zero": "float"}


# What has a goal and no recipe: the 16-bit kernel that all are compared with, in two forms
# (`gpu_fp16.py`), three bits, and scales of channels for 64 tokens.
OWN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    gpu_static_rows.BASE: ({"format": "f16"}, {"format": "f16"}),
    gpu_static_rows.TOKENS: ({"format": "f16"}, {"format": "f16"}),
    "int3-token": (_stream(3, "token", "head"), _stream(3, "token", "head")),
    "int4-channel64": (_stream(4, "channel", 64), _stream(4, "token", "head")),
    "int2-channel64": (_stream(2, "channel", 64), _stream(2, "token", "head")),
}


def names() -> list[str]:
    """Return what is compiled: what has no recipe, then every recipe."""
    return [*OWN, *recipes.names()]


@lru_cache
def plan_of(name: str, shape: str) -> AttentionPlan:
    """Return the plan of a recipe; constants of its maps are arguments, so it needs no model."""
    if name in OWN:
        k, v = OWN[name]
        # What is raw has no integers to compute in.
        compute = "float" if name in FORMS else "int"
        recipe = recipes.parse({"name": name, "compute": compute, "k": k, "v": v}, name)
    else:
        recipe, _ = recipes.load(name)
    return rewrite(shape_model(parse_shape(shape)), recipe)[0].plan


def cases() -> Iterator[tuple[str, str, str]]:
    """Yield (recipe, shape, kind of GPU) of every row."""
    for name in names():
        yield from ((name, gpu_static_rows.MAIN, kind) for kind in KINDS)
    for shape in OTHER_SHAPES:
        yield from ((name, shape, kind) for name in FEW for kind in FEW_KINDS)


def kernels_for(shape: str, kind: str) -> tuple[str, ...]:
    """Return the kernels of a row."""
    return tuple(GPU_KERNELS) if shape == gpu_static_rows.MAIN and kind in ALL_KERNELS else ATTEND


def measure(name: str, shape: str, kind: str, only: tuple[str, ...] = ()) -> dict[str, Any]:
    """Compile and count the kernels of a plan.

    Args:
        name: of a recipe.
        shape: as "32x8x128".
        kind: of GPU.
        only: kernels; those of `kernels_for` if none is named.

    Returns: the row; with "refused" and the reason where there are no kernels.
    """
    gpu = GPUS[kind]
    row = {"recipe": name, "shape": shape, "gpu": kind}
    plan = plan_of(name, shape)
    try:
        source = source_of(name, plan, gpu)
        row["made_of"] = made_of(source.text(), gpu)
        wanted = only or kernels_for(shape, kind)
        chosen = tuple(kernel for kernel in source.kernels if kernel.name in wanted)
        made = compile_kernels(replace(source, kernels=chosen), gpu)
    except KvantError as error:
        return row | {"refused": error.what.strip().splitlines()[-1]}
    row["kernels"] = {x: _kernel(_count(x, y, gpu), y, gpu) for x, y in made.items()}
    attend = next(x for x in source.kernels if x.name == "attend").source()
    facts = launch_facts(source, gpu.backend)
    row |= {"rows": facts["rows"]["attend"]}
    stages, kept = DIALECTS[gpu.backend].stages, made["attend"].facts
    own = split_facts(plan, gpu, row["rows"], kept["shared"], kept["warps"], stages)
    row["split_tokens"] = own["least_tiles"] * TILE if own else facts["split_tokens"]
    row["most_splits"] = own.get("most_splits")
    return row | _loops(plan, attend, made["attend"], gpu)


def source_of(name: str, plan: AttentionPlan, gpu: Gpu) -> Source[Kernel]:
    """Return the kernels of a row as text: of a recipe, or attend of 16 bits."""
    if name in FORMS:
        return fp16_attend(plan, FORMS[name], DIALECTS[gpu.backend].stages)
    source: Source[Kernel] = TARGETS[f"{gpu.backend}:{gpu.name}"].stages[0].run(plan)
    return source


def made_of(text: str, gpu: Gpu) -> str:
    """Return a hash of what a row follows from: the kernels, and what compiles and counts them."""
    files = [(ROOT / "targets" / f"{name}.py").read_bytes() for name in WHAT_MAKES_A_ROW]
    given = f"{TRITON} {gpu} {text}".encode()
    return hashlib.sha256(b"".join([given, *files])).hexdigest()[:16]


def _count(name: str, kernel: Compiled, gpu: Gpu) -> gpu_counts.Counts:
    if gpu.backend == "cuda":
        return gpu_counts.count(kernel.binary, name)
    return gpu_counts.count_gcn(kernel.assembly)


def _kernel(counts: gpu_counts.Counts, kernel: Compiled, gpu: Gpu) -> dict[str, Any]:
    shared, warps = kernel.facts["shared"], kernel.facts["warps"]
    return {
        "seconds": round(kernel.facts["seconds"], 2),
        "instructions": counts.instructions,
        "registers": counts.registers,
        "stack": counts.stack,
        "spills": counts.spills,
        "shared": shared,
        "warps": warps,
        "resident": gpu_counts.resident(gpu, counts.registers, shared, warps),
    }


def _loops(plan: AttentionPlan, text: str, kernel: Compiled, gpu: Gpu) -> dict[str, Any]:
    """Return what stands in the loops of attend."""
    counts = _count("attend", kernel, gpu)
    passes = gpu_counts.passes_of(text, TILE)
    try:
        main, step = gpu_counts.main_loop(counts, passes)
    except ValueError as error:
        return {"refused": str(error)}

    def each(instructions: int, tokens: int) -> float:
        elements = gpu_counts.elements(plan, tokens)
        return gpu_counts.per_element(instructions, kernel.facts["warps"], gpu.warp, elements)

    found = asdict(main) | {"spills": main.spills, "scalar_loads": main.scalar_loads}
    found["opcodes"] = dict(main.opcodes[:8])
    found["loads"] = {str(size): many for size, many in main.loads.items()}
    others = [
        round(each(loop.instructions, one.tokens), 3)
        for loop, one in zip(counts.loops, passes, strict=False)
        if loop is not main
    ]
    return {
        "tokens": step.tokens,
        "stages": step.stages,
        "main": found,
        "other_loops": others,
        "per_element": round(each(main.instructions, step.tokens), 3),
        "vector_per_element": round(each(main.vector, step.tokens), 3),
    }


def predicted(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the predicted time of each cell of the grid, for the main shape."""
    if "refused" in row or row["shape"] != gpu_static_rows.MAIN:
        return []
    plan, device = plan_of(row["recipe"], row["shape"]), DEVICES[row["gpu"]]
    found = []
    for batch, tokens in page.GRID:
        result, parts = cost.decode(device, plan, attend_of(row, plan), batch, tokens)
        found.append(
            {
                "batch": batch,
                "tokens": tokens,
                "us": round(result.total, 2),
                "limit": result.limit,
                "splits": parts,
                "bytes": batch * stored_bytes(plan, tokens),
            }
        )
    return found


def stored_bytes(plan: AttentionPlan, tokens: int) -> int:
    """Return all bytes of a row: codes, scales, raw tokens, page table."""
    return sum(stream.bytes(tokens, plan.window) for stream in (plan.k, plan.v))


def attend_of(row: dict[str, Any], plan: AttentionPlan) -> cost.Attend:
    """Return what the cost model needs to know of a compiled attend."""
    tile = tile_bytes(plan, row["tokens"])
    gpu, kernel = GPUS[row["gpu"]], row["kernels"]["attend"]
    return cost.Attend(
        per_element=row["vector_per_element" if gpu.backend == "hip" else "per_element"],
        rows=row["rows"],
        warps=kernel["warps"],
        resident=kernel["resident"],
        # Without a pipeline keys and values are asked for one after the other.
        ahead=tile * (row["stages"] - 1) if row["stages"] > 1 else tile / 2,
        split_tokens=row["split_tokens"],
        merged=merged_at_once(plan),
        most_splits=row["most_splits"],
    )


def run(chosen: list[tuple[str, str, str]], kept: list[dict[str, Any]], jobs: int) -> None:
    """Make the rows that have changed, and write data and page after each."""
    found = {_key(row): row for row in kept}
    waiting = []
    for case in chosen:
        gpu = GPUS[case[2]]
        source = source_of(case[0], plan_of(*case[:2]), gpu)
        if found.get(case, {}).get("made_of") != made_of(source.text(), gpu):
            waiting.append(case)
    print(f"{len(chosen) - len(waiting)} rows stand, {len(waiting)} to make")
    order = list(cases())
    with ThreadPoolExecutor(jobs) as pool:
        for i, row in enumerate(pool.map(lambda case: measure(*case), waiting), 1):
            found[_key(row)] = row
            print(f"{i}/{len(waiting)} {page.line(row)}", flush=True)
            write([found[case] for case in order if case in found])
    write([found[case] for case in order if case in found])


def write(rows: list[dict[str, Any]]) -> None:
    """Write the data with the predictions, and the page; both whole or not at all."""
    rows = [row | {"predicted": predicted(row)} for row in rows]
    data = {"triton": TRITON, "rows": rows}
    for path, text in ((DATA, dumped(data)), (PAGE, page.page(data))):
        new = path.with_suffix(".new")
        new.write_text(text, encoding="utf-8")
        os.replace(new, path)


def dumped(data: dict[str, Any]) -> str:
    """Return the data as JSON, one line a row: a diff then names the rows."""
    rows = ",\n".join(json.dumps(row, sort_keys=True) for row in data["rows"])
    head = {key: value for key, value in data.items() if key != "rows"}
    return json.dumps(head)[:-1] + ', "rows": [\n' + rows + "\n]}\n"


def dumped_budgets(budgets: Budgets) -> str:
    """Return the budgets as JSON, one line a recipe and kind of GPU."""
    parts = []
    for name, each in budgets.items():
        lines = ",\n".join(f'  "{kind}": {json.dumps(of)}' for kind, of in each.items())
        parts.append(f' "{name}": {{\n{lines}\n }}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def held(row: dict[str, Any]) -> dict[str, float]:
    """Return what budgets hold of a row: numbers that may only fall."""
    main = row["main"]
    return {
        "per_element": row["per_element"],
        "spills": main["spills"],
        "scalar_loads": main["scalar_loads"],
    }


def lower(rows: list[dict[str, Any]], budgets: Budgets) -> list[str]:
    """Lower the budgets to the counts of the main shape; return what rose and was not taken."""
    risen = []
    for row in rows:
        if row["shape"] != gpu_static_rows.MAIN or "refused" in row:
            continue
        before = budgets.setdefault(row["recipe"], {}).setdefault(row["gpu"], held(row))
        for name, count in held(row).items():
            if count > before[name]:
                where = f"{row['recipe']} on {row['gpu']}"
                risen.append(f"{where}: {name} {count:g}, budget {before[name]:g}")
            before[name] = min(before[name], count)
    return risen


def _key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["recipe"], row["shape"], row["gpu"]


def _kept() -> list[dict[str, Any]]:
    return json.loads(DATA.read_text())["rows"] if DATA.exists() else []  # type: ignore[no-any-return]


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="RECIPE", choices=names(), help="print rows of it alone")
    parser.add_argument("--gpu", choices=KINDS, help="with --only: this kind of GPU")
    parser.add_argument("--shape", default=gpu_static_rows.MAIN, help="with --only")
    parser.add_argument("--jobs", type=int, default=1, help="compiled at once; seconds grow")
    parser.add_argument("--render", action="store_true", help="the page again from its data")
    parser.add_argument("--budgets", action="store_true", help="lower the budgets to the data")
    options = parser.parse_args()
    if options.only:
        for kind in [options.gpu] if options.gpu else KINDS:
            row = measure(options.only, options.shape, kind)
            print(json.dumps(row | {"predicted": predicted(row)}, indent=1))
    elif options.budgets:
        budgets = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
        risen = lower(_kept(), budgets)
        BUDGETS.write_text(dumped_budgets(budgets))
        sys.exit("\n".join(["above their budgets:", *risen]) if risen else 0)
    elif options.render:
        write(_kept())
    else:
        run(list(cases()), _kept(), options.jobs)


if __name__ == "__main__":
    main()
