"""One pair: ours and a peer over the same numbers, checked, then timed in turns."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cpu_measure
import cpu_peers
from cpu_cells import OURS, PROBE, Cell, l3_bytes, numbers_of, resident
from cpu_contest import Array, Contestant, error, truth

import kvant
from kvant.targets.cpu_counts import instructions_per_element
from kvant.targets.machines import CPUS

CHECKED = "checked.json"
"""In the folder of artifacts: shares of the tolerance, by artifact, size and bits of the output."""


def tolerance(share: float) -> str | None:
    """Return why a kernel gets no time, or none; `share` is its error over what is allowed."""
    if share <= 1.0:
        return None
    return f"out of tolerance: the kernel's error is {share:.3g} times what is allowed"


def measure(cell: Cell, peer: str, folders: list[Path], even_if_busy: bool) -> dict[str, Any]:
    """Return what is known of a pair: errors, bytes, and times or why there are none.

    Args:
        cell: where.
        peer: name of PEERS, or kvant:RECIPE.
        folders: our artifact, and that of the peer where it is ours too.
        even_if_busy: see `cpu_measure.measure`.
    """
    shape = kvant.Shape(*numbers_of(cell.shape))
    qkv = cpu_peers.tensors(shape, cell.context, cell.batch)
    ours, facts = _ours(folders[0], qkv, cell)
    right = truth(*qkv, shape.logit_scale)
    if peer == PROBE:
        facts["instructions"] = _instructions(folders[0], str(facts["target"]))
    row = facts | {"ours_error": error(ours.output(), right)}
    refusal = tolerance(facts["share"])
    if refusal:
        return row | {"refused": refusal}
    try:
        if peer.startswith(OURS):
            other, theirs = _ours(folders[1], qkv, cell)
            refusal = tolerance(theirs["share"])
            row["peer_error"] = error(other.output(), right)
        else:
            other = cpu_peers.fastest(cpu_peers.PEERS[peer], qkv, shape.logit_scale, cell.threads)
            row["peer_error"] = cpu_peers.check_peer(peer, other, right)
    except cpu_peers.WrongPeer as wrong:
        refusal = str(wrong)
    if refusal:
        return row | {"refused": refusal}
    row |= {"peer_setting": dict(other.setting), "peer_bytes": other.bytes}
    return row | cpu_measure.measure(ours.run, other.run, even_if_busy=even_if_busy)


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


def _instructions(folder: Path, target: str) -> dict[str, float | None]:
    """Return the instructions of the inner loop for each element of keys and of values."""
    plan = kvant.load(folder, target="reference").plan_of(0)
    return instructions_per_element(plan, CPUS[target.removeprefix("cpu-")])


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
