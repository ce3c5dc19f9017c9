"""One pair: ours and a peer over the same numbers, checked, then timed in turns."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cpu_limit
import cpu_measure
import cpu_peers
import cpu_prefill
import cpu_recipes
from cpu_cells import OURS, PREFILL, PROBE, Cell, l3_bytes, numbers_of, resident
from cpu_contest import Array, Contestant, error, truth

import kvant
from kvant.targets.cpu_counts import instructions_per_element
from kvant.targets.cpu_quads import why_floats
from kvant.targets.machines import CPUS

CHECKED = "checked.json"
"""In the folder of artifacts: shares of the tolerance, by artifact, size and bits of the output."""


def measure(cell: Cell, peer: str, folders: list[Path], even_if_busy: bool) -> dict[str, Any]:
    """Return what is known of a pair: errors, bytes, and times or why there are none.

    Args:
        cell: where.
        peer: name of PEERS, or kvant:RECIPE.
        folders: our artifact, and that of the peer where it is ours too.
        even_if_busy: see `cpu_measure.measure`.
    """
    shape = kvant.Shape(*numbers_of(cell.shape))
    if peer == PREFILL:
        return cpu_prefill.measure(cell, folders[0], even_if_busy)
    qkv = cpu_peers.tensors(shape, cell.context, cell.batch)
    ours, facts = _ours(folders[0], qkv, cell)
    right = truth(*qkv, shape.logit_scale)
    loop = None
    if peer == PROBE:
        found, loop = _limit(folders[0], str(facts["target"]), cell)
        facts |= found
    row = facts | {"ours_error": error(ours.output(), right)}
    refusal = cpu_peers.tolerance(facts["share"])
    if refusal:
        return row | {"refused": refusal}
    try:
        if peer.startswith(OURS):
            other, theirs = _ours(folders[1], qkv, cell)
            refusal = cpu_peers.tolerance(theirs["share"])
            row["peer_error"] = error(other.output(), right)
        else:
            other = cpu_peers.fastest(cpu_peers.PEERS[peer], qkv, shape.logit_scale, cell.threads)
            row["peer_error"] = cpu_peers.check_peer(peer, other, right)
    except cpu_peers.WrongPeer as wrong:
        refusal = str(wrong)
    if refusal:
        return row | {"refused": refusal}
    row |= {"peer_setting": dict(other.setting), "peer_bytes": other.bytes}
    third = loop.run if loop else None
    return row | cpu_measure.measure(ours.run, other.run, third=third, even_if_busy=even_if_busy)


def _ours(folder: Path, qkv: cpu_peers.QKV, cell: Cell) -> tuple[Contestant, dict[str, Any]]:
    """Return ours, having run once, and what is known of it before it is timed."""
    ours, cache, artifact = cpu_peers.open_ours(folder, qkv, cell.threads)
    ours.run()
    name = f"{artifact.id} {artifact.target} {cell.context} {cell.batch}"
    share = once(
        folder.parent / CHECKED,
        name,
        ours.output(),
        lambda: cpu_peers.share_of_tolerance(artifact, qkv, cache),
    )
    facts = {"target": artifact.target, "bytes": ours.bytes, "share": share}
    return ours, facts | {"resident": resident(ours.bytes, l3_bytes())}


def _limit(
    folder: Path, target: str, cell: Cell
) -> tuple[dict[str, Any], cpu_limit.IssueLoop | None]:
    """Return what is known of the instructions of a step, and the loop that shows their rate."""
    artifact, cpu = kvant.load(folder, target="reference"), CPUS[target.removeprefix("cpu-")]
    plan = artifact.plan_of(0)
    facts: dict[str, Any] = {
        "instructions": instructions_per_element(plan, cpu),
        "left_out": cpu_recipes.left_out(cell.recipe),
        "floats": {role: why_floats(plan, role) for role in ("k", "v")},
    }
    kinds = cpu_limit.executed(artifact, cpu, cell.batch, cell.context)
    if kinds is None:
        return facts, None
    loop = cpu_limit.fastest_loop(kinds, cpu, cell.threads)
    return facts | {"executed": kinds, "loop_instructions": loop.instructions}, loop


def once(path: Path, name: str, output: Array, check: Callable[[], float]) -> float:
    """Return what `check` gives, or gave before for an output of the very same bits.

    The data of a cell is the same in every process, and the check takes longer than the timing.
    """
    known = json.loads(path.read_text()) if path.exists() else {}
    digest = f"{name} {hashlib.sha256(output.tobytes()).hexdigest()}"
    if digest not in known:
        known[digest] = check()
        path.write_text(json.dumps(known))
    return float(known[digest])
