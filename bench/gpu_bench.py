"""`python bench/gpu.py --bench`: every line of the issue's table on this machine's GPU.

Rules: gpu_measure.py says how times are taken. The strongest setting of the strongest peer counts;
a kernel whose output is wrong gets no time; losses and what was left out are written down too.
"""

import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gpu_cells as cells
import gpu_measure as measure
import gpu_ours as ours
import gpu_peers as peers
import gpu_render
from gpu_cells import Cell
from gpu_measure import Budget, Clock, Timed

from kvant.runtime.machine import this_gpu

ROOT = Path(__file__).resolve().parent.parent
DATA, PAGE = ROOT / "docs" / "gpu-bench.json", ROOT / "docs" / "gpu-bench.md"
STATIC = ROOT / "docs" / "gpu-static.json"
SECONDS = 520.0
CELL_SECONDS = 25.0
"""That a cell may take; with less left it is not begun."""
PEER_SECONDS = 15.0
"""That a peer may take to begin: some compile their kernels then."""
FINALISTS = 3
"""Peers that are timed in turns with ours: the fastest of a first look."""
WRONG = 0.02
"""Root mean square of the error of a 16-bit peer, over the output."""
ASKED = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu"

Row = dict[str, Any]
Call = Callable[[], Any]


def run(folder: Path, checked: Mapping[str, Any], budget: Budget, clock: Clock) -> Row:
    """Time all cells, and return the data; written after each of them.

    Args:
        folder: of the artifacts.
        checked: what `--check` found.
        budget: seconds of the whole run.
        clock: takes times.
    """
    data: Row = {"machine": machine(), "versions": peers.versions(), "checked": dict(checked)}
    data |= {"clocks": [clocks()], "rows": []}
    for cell in cells.CELLS:
        print(cell.name, flush=True)
        data["rows"].append(row_of(folder, cell, budget, clock))
        write(data)
    data["launch"] = attempt(lambda: launches(folder))
    data["clocks"].append(clocks())
    write(data)
    return data


def row_of(folder: Path, cell: Cell, budget: Budget, clock: Clock) -> Row:
    """Return the row of a cell; with "refused" and the reason where there are no times."""
    row: Row = {"cell": asdict(cell)}
    if budget.left < CELL_SECONDS:
        return row | {"refused": "the time was up"}
    kinds = {"decode": decode, "prefill": prefill, "append": append}
    return row | attempt(lambda: kinds[cell.kind](folder, cell, clock))


def attempt(make: Callable[[], Row]) -> Row:
    """Return what is made, or what went wrong; the GPU's memory is free again after it."""
    import torch

    try:
        return make()
    except Exception as error:
        text = str(error).strip().splitlines() or [""]
        print(f"    refused: {type(error).__name__}: {text[0]}")
        return {"refused": f"{type(error).__name__}: {text[0]}"}
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def decode(folder: Path, cell: Cell, clock: Clock) -> Row:
    """Time one query a row: attend alone, and with the append of its token."""
    art, case = ours.artifact(folder, cell.recipe), ours.random_case(cell.batch, cell.tokens)
    want = exact(case)
    step = ours.step_of(art, case)
    found = ours.error(step.attend(), want)
    if not found < ours.ERRORS[cell.recipe]:
        return {"refused": f"our output is wrong by {found:.2f} of itself"}
    calls, refused = usable(peers.decoders(case), want, WRONG)
    plain, no_plain = usable([("plain Triton int4", lambda: peers.plain_int4(case))], want, 0.3)
    own = {"ours": step.attend, "ours, with append": step.whole}
    row = contest(own, calls, plain, clock) | {"refused_peers": refused | no_plain, "error": found}
    return row | {"bytes": step.cache.bytes(), "predicted": predicted(art, cell)}


def prefill(folder: Path, cell: Cell, clock: Clock) -> Row:
    """Time a prompt: its append to a packed cache and its attention, against 16-bit attention."""
    art = ours.artifact(folder, cell.recipe)
    case = ours.random_case(cell.batch, cell.tokens, queries=cell.tokens)
    calls, refused = usable(peers.prefills(case), None, WRONG)
    own = {"ours": ours.prefill(art, case)}
    return contest(own, calls, {}, clock, graph=False) | {"refused_peers": refused}


def append(folder: Path, cell: Cell, clock: Clock) -> Row:
    """Time the append of one token a row."""
    art, case = ours.artifact(folder, cell.recipe), ours.random_case(cell.batch, cell.tokens)
    step = ours.step_of(art, case)
    calls, refused = usable(peers.appends(case), None, WRONG)
    return contest({"ours": step.append}, calls, {}, clock) | {"refused_peers": refused}


def exact(case: peers.Case) -> Any:
    """Return the attention of one query a row in float32, row by row."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    q = case.folded()
    rows = [
        scaled_dot_product_attention(*(x[b : b + 1].float() for x in (q, case.k, case.v)))
        for b in range(len(q))
    ]
    return torch.cat(rows).reshape(case.q.shape)


def usable(made: Any, want: Any, limit: float) -> tuple[dict[str, Call], dict[str, str]]:
    """Return the calls that run and are right, and why the others take no part."""
    found: dict[str, Call] = {}
    refused: dict[str, str] = {}
    for name, make in made:
        try:
            with measure.limit(PEER_SECONDS):
                call = make()
                out = call()
        # Whatever a library raises that is not installed, or does not take this.
        except Exception as error:
            text = str(error).strip().splitlines() or [""]
            refused[name] = f"{type(error).__name__}: {text[0]}"[:200]
            continue
        off = 0.0 if want is None else ours.error(out, want)
        if off < limit:
            found[name] = call
        else:
            refused[name] = f"its output is wrong by {off:.3f} of itself"
    return found, refused


def contest(
    own: Mapping[str, Call],
    others: Mapping[str, Call],
    plain: Mapping[str, Call],
    clock: Clock,
    *,
    graph: bool = True,
) -> Row:
    """Return the times of ours, of the fastest peers, and of what else is told.

    `graph`: whether calls are replayed from graphs.
    """
    every = {**own, **others, **plain}
    made = {
        name: measure.captured(call) if graph else (call, False) for name, call in every.items()
    }
    replays = {name: replay for name, (replay, _) in made.items()}
    look = measure.in_turns({name: replays[name] for name in others}, clock, rounds=1, each=3)
    order = sorted(look, key=lambda name: look[name])
    kept = [*own, *order[:FINALISTS], *plain]
    times = measure.in_turns({name: replays[name] for name in kept}, clock)
    timed = {name: Timed(rounds, made[name][1]) for name, rounds in times.items()}
    row: Row = {
        "times": {name: {"us": list(x.rounds), "graph": x.graph} for name, x in timed.items()},
        "first_look": {name: look[name][0] for name in order},
    }
    if not order:
        return row | {"refused": "no peer runs here"}
    best = measure.best({name: timed[name] for name in order[:FINALISTS]})
    why = measure.spread_too_far([timed["ours"], timed[best]])
    row |= {"best": best} | measure.ratio(timed[best], timed["ours"])
    return row if why is None else row | {"refused": why}


def predicted(art: Any, cell: Cell) -> float | None:
    """Return the microseconds that the cost model gives for this device, or none."""
    try:
        return _predicted(art, cell)
    # What counts instructions may miss a package that no other part of a run needs.
    except Exception as error:
        print(f"    no prediction: {type(error).__name__}: {error}")
        return None


def _predicted(art: Any, cell: Cell) -> float | None:
    import gpu_static
    import torch

    from kvant.targets import cost
    from kvant.targets.machines import DEVICES

    kind, _ = this_gpu()
    data = json.loads(STATIC.read_text())
    keys = {"recipe": cell.recipe, "shape": cells.SHAPE, "gpu": kind}
    row = next((r for r in data["rows"] if r.items() >= keys.items() and "refused" not in r), None)
    if row is None or kind is None:
        return None
    count = torch.cuda.get_device_properties().multi_processor_count
    device = replace(DEVICES[kind], sms=count, bandwidth=bandwidth())
    plan = art.plan_of(0)
    result = cost.decode(device, plan, gpu_static.attend_of(row, plan), cell.batch, cell.tokens)
    return round(result[0].total, 2)


def bandwidth() -> float:
    """Return the GB/s of this GPU's memory, as its maker says."""
    import torch

    from kvant.targets.machines import DEVICES

    device = torch.cuda.get_device_properties()
    kind, _ = this_gpu()
    known = DEVICES[str(kind)]
    if known.name.split()[0] in device.name or not hasattr(device, "memory_bus_width"):
        return known.bandwidth
    # Two transfers a clock; kHz and bits.
    return 2 * device.memory_clock_rate * device.memory_bus_width / 8 / 1e6


def launches(folder: Path) -> Row:
    """Return the host's microseconds of a launch: ours, all of a step, and Triton's."""
    import torch

    art, case = ours.artifact(folder, "int4-token"), ours.random_case(1, 1024)
    step, wait = ours.step_of(art, case), torch.cuda.synchronize
    row = {"ours": measure.host_us(step.whole, wait) / 4}
    try:
        call = peers.plain_int4(case)
    except ImportError as error:
        return row | {"why_no_triton": str(error)}
    call()
    return row | {"triton": measure.host_us(call, wait) / 2}


def machine() -> Row:
    """Return facts of the GPU."""
    import torch

    device = torch.cuda.get_device_properties()
    kind, _ = this_gpu()
    found = {"name": device.name, "kind": kind, "sms": device.multi_processor_count}
    return found | {"memory": device.total_memory, "bandwidth": bandwidth()}


def clocks() -> str:
    """Return what nvidia-smi says of clocks, power and heat now; nothing is set."""
    command = ["nvidia-smi", f"--query-gpu={ASKED}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not known: {error}"


def write(data: Row) -> None:
    """Write the data and the page made from it; both whole or not at all."""
    text = json.dumps(data, indent=1, sort_keys=True) + "\n"
    for path, content in ((DATA, text), (PAGE, gpu_render.page(data))):
        new = path.with_suffix(".new")
        new.write_text(content, encoding="utf-8")
        os.replace(new, path)


def artifacts(folder: Path) -> Iterator[Path]:
    """Yield the artifacts of a folder, those that are timed first."""
    timed = {f"{cell.recipe}-{cells.SHAPE}.kvant" for cell in cells.CELLS}
    yield from sorted(folder.glob("*.kvant"), key=lambda path: (path.name not in timed, path.name))
