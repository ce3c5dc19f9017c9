"""Our CPU kernels beside every CPU engine that installs from a wheel: `make bench-cpu`.

    python bench/cpu.py --headline                 the first tables; about 25 minutes
    python bench/cpu.py --full                     the whole grid; hours
    python bench/cpu.py --cell int4-token,32x8x128,4096,1,1 --peer ik_q4_0     one pair, printed
    python bench/cpu.py --render                   docs/bench-cpu.md again from its data

Each pair has a process of its own. A cell is recipe, shape, context, batch, threads. What a busy
machine gave is refused; --even-if-busy prints numbers all the same and publishes none.
docs/bench-cpu.json and its page are written when all pairs are through; --keep goes on where a run
was stopped, and --full always does: it measures what has no number from these very kernels.
"""

import argparse
import hashlib
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cpu_cells as cells
import cpu_measure
import cpu_recipes
import cpu_render

ROOT = Path(__file__).resolve().parent.parent
DATA, PAGE = ROOT / "docs" / "bench-cpu.json", ROOT / "docs" / "bench-cpu.md"
PACKAGES = (
    "torch",
    "onnxruntime",
    "xllamacpp",
    "ik-llama-cpp-python",
    "transformers",
    "optimum-quanto",
    "numpy",
    "apache-tvm",
)
PROGRESS = {  # what is published once it is complete
    "headline": ROOT / "build" / "bench-cpu.json",
    "full": ROOT / "build" / "bench-cpu-full.json",
}
RETRIES = 2  # of what was refused because the machine was busy
LONGEST = 3600  # seconds of one pair
PATIENCE = 4  # pairs refused one after another, because the machine was busy, before we stop


def pair(cell: cells.Cell, peer: str, root: Path, even_if_busy: bool = False) -> dict[str, Any]:
    """Measure one pair in this process and return its row."""
    row = {**asdict(cell), "peer": peer}
    need, have = cells.bytes_needed(cell), cells.memory_available()
    if need > have:
        gib = f"{need / 2**30:.0f} GiB, {have / 2**30:.0f} are free"
        return row | {"refused": f"does not fit: needs about {gib}"}
    names = [cell.recipe] + [peer.removeprefix(cells.OURS)] * peer.startswith(cells.OURS)
    folders = [cpu_recipes.compiled(root, name, cells.numbers_of(cell.shape)) for name in names]
    cpu_measure.pin(cell.threads)
    import cpu_pair  # the engines are loaded after this process was pinned

    return row | cpu_pair.measure(cell, peer, folders, even_if_busy)


def _child(arguments: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Run this file in a process of its own and return the row that it printed last."""
    command = [sys.executable, __file__, "--json", *arguments]
    if options.even_if_busy:
        command.append("--even-if-busy")
    elif reason := cpu_measure.wait_until_idle():
        return {"refused": reason}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST)
    except subprocess.TimeoutExpired:
        return {"refused": f"no result within {LONGEST} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"refused": f"failed: {last}"}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def versions() -> dict[str, str]:
    """Return the versions of all engines, and what the two builds of ggml were built for."""
    import cpu_ggml

    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    for library, package in (("llama", "xllamacpp"), ("ik", "ik-llama-cpp-python")):
        found[package] += f" (built for {cpu_ggml.built_for(library)})"
    return found


def source() -> str:
    """Return the start of a digest of all that kernels are made of and run by."""
    files = [
        p for folder in ("ir", "passes", "runtime", "targets") for p in ROOT.glob(f"{folder}/**/*")
    ]
    files = [p for p in files if not p.name.startswith("gpu_")]
    digest = hashlib.sha256()
    for path in sorted(p for p in files if p.suffix in (".py", ".c")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def begin(options: argparse.Namespace) -> dict[str, Any]:
    """Return the data that rows are added to: with --keep, those that these kernels gave before.

    Raises: SystemExit if rows should be kept that another machine or engine gave.
    """
    data = {"machine": cells.machine(), "versions": versions(), "source": source()}
    if not options.keep or not options.data.exists():
        return data | {"cells": [], "models": []}
    kept: dict[str, Any] = json.loads(options.data.read_text())
    for name in ("machine", "versions"):
        if kept[name] != data[name]:
            raise SystemExit(f"{options.data} is of another {name}: measure without --keep")
    for name in ("cells", "models"):
        rows = [row for row in kept[name] if row.get("source") == data["source"]]
        data[name] = [row for row in rows if "busy" not in row and not _again(row)]
    return data


def _again(row: dict[str, Any]) -> bool:
    """Return whether a row may get a number if it is tried again."""
    why = str(row.get("refused", ""))
    return bool(why) and not why.startswith("does not fit")


def sweep(pairs: list[tuple[cells.Cell, str]], options: argparse.Namespace) -> None:
    """Measure pairs one after another, then the model, then again what was refused for noise.

    The data is written after each.
    """
    data = begin(options)
    with tempfile.TemporaryDirectory(prefix="kvant-bench-") as folder:
        root = str(options.artifacts or folder)
        done = {cells.key(row) for row in data["cells"]}
        _measure_pairs([x for x in pairs if (str(x[0]), x[1]) not in done], data, root, options)
        measured = {row["what"] for row in data["models"]}
        models = [name for name, what in cells.MODELS.items() if not measured.issuperset(what)]
        _measure_models(models, data, root, options)
        for _ in range(RETRIES):
            noisy = [row for row in data["cells"] if _noisy(row)]
            lost = {row["what"] for row in data["models"] if _noisy(row)}
            data["cells"] = [row for row in data["cells"] if not _noisy(row)]
            again = [(cells.parse_cell(name), peer) for name, peer in map(cells.key, noisy)]
            _measure_pairs(again, data, root, options)
            models = [name for name, what in cells.MODELS.items() if lost & set(what)]
            _measure_models(models, data, root, options)
    _write(data, options.data)
    if options.data in PROGRESS.values() and not options.even_if_busy:
        _write(data, DATA)
        PAGE.write_text(cpu_render.page(data), encoding="utf-8")


def _noisy(row: dict[str, Any]) -> bool:
    return str(row.get("refused", "")).startswith("machine busy")


def _measure_pairs(
    pairs: list[tuple[cells.Cell, str]],
    data: dict[str, Any],
    root: str,
    options: argparse.Namespace,
) -> None:
    """Add a row for each pair."""
    fresh: list[dict[str, Any]] = []
    for number, (cell, peer) in enumerate(pairs, 1):
        call = ["--cell", str(cell), "--peer", peer, "--artifacts", root]
        row = {**asdict(cell), "peer": peer} | _child(call, options) | {"source": data["source"]}
        print(f"{number}/{len(pairs)} {cpu_render.line(row)}", flush=True)
        data["cells"].append(row)
        fresh.append(row)
        _write(data, options.data)
        _stop_if_busy(fresh)


def _measure_models(
    names: list[str], data: dict[str, Any], root: str, options: argparse.Namespace
) -> None:
    """Add the rows of some of MODELS, in place of those there are."""
    for name in names:
        whats = cells.MODELS[name]
        given = _child(["--model", name, "--artifacts", root], options)
        none = [{"what": what, "refused": given.get("refused", "no row")} for what in whats]
        found = [row | {"source": data["source"]} for row in given.get("rows", none)]
        print("\n".join(cpu_render.model_line(row) for row in found), flush=True)
        data["models"] = [row for row in data["models"] if row["what"] not in whats] + found
        _write(data, options.data)


def _stop_if_busy(rows: list[dict[str, Any]]) -> None:
    """Stop where nothing can be measured; rows stay, --keep goes on from them."""
    last = [str(row.get("refused", "")) for row in rows[-PATIENCE:]]
    if len(last) == PATIENCE and all(why.startswith("machine busy") for why in last):
        raise SystemExit(f"stopped: {last[-1]}; leave it alone, and go on with --keep")


def _write(data: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _model(name: str, root: Path, even_if_busy: bool) -> dict[str, Any]:
    cpu_measure.pin(min(2, cells.machine()["cores"]))
    import cpu_model

    return {"rows": cpu_model.measure(name, root, even_if_busy)}


def main() -> None:
    """Measure what the options say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--headline", action="store_true", help="the first table")
    what.add_argument("--full", action="store_true", help="the whole grid, and the first table")
    what.add_argument("--cell", metavar="CELL", help="recipe,shape,context,batch,threads")
    what.add_argument("--model", choices=cells.MODELS, help="a row on SmolLM2")
    what.add_argument("--render", action="store_true", help="the page from the data there is")
    parser.add_argument("--peer", default="ik_q4_0", help="see PEERS; kvant:RECIPE for ours")
    parser.add_argument("--data", type=Path, help="where rows are kept until all are there")
    parser.add_argument("--keep", action="store_true", help="go on: measure what has no number yet")
    parser.add_argument("--even-if-busy", action="store_true", help="print noisy numbers")
    parser.add_argument("--artifacts", type=Path, help="where compiled artifacts are kept")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    options = parser.parse_args()
    if options.render:
        PAGE.write_text(cpu_render.page(json.loads(DATA.read_text())), encoding="utf-8")
    elif options.headline or options.full:
        names, cores = cpu_recipes.names(), cells.machine()["cores"]
        options.data = options.data or PROGRESS["full" if options.full else "headline"]
        options.keep = options.keep or options.full
        pairs = cells.headline(names, cores)
        pairs += cells.whole_grid(names, cores) if options.full else []
        sweep(list(dict.fromkeys(pairs)), options)
    else:
        _one(options)


def _one(options: argparse.Namespace) -> None:
    """Measure one pair, or one thing of the model, in this process; print it."""
    with tempfile.TemporaryDirectory(prefix="kvant-bench-") as folder:
        root = options.artifacts or Path(folder)
        if options.model:
            found = _model(options.model, root, options.even_if_busy)
            text = "\n".join(cpu_render.model_line(row) for row in found["rows"])
        else:
            cell = cells.parse_cell(options.cell)
            found = pair(cell, options.peer, root, options.even_if_busy)
            text = cpu_render.line(found)
    print(json.dumps(found) if options.json else f"{text}\n{json.dumps(found, indent=1)}")


if __name__ == "__main__":
    main()
