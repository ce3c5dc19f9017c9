"""Rows of the CPU benchmark as it keeps them, made up."""

from typing import Any

import cpu_cells
import cpu_measure

QUIET = [1.0, 1.1, 1.0, 1.05, 1.0]


def row(**changes: Any) -> dict[str, Any]:
    """A row as it is kept: ours twice as fast."""
    cell = {"recipe": "int4-token", "shape": "32x8x128", "context": 4096, "batch": 1, "threads": 1}
    times = cpu_measure.compare(QUIET, [2 * x for x in QUIET])
    facts = {"bytes": 4_465_664, "peer_bytes": 4_718_592, "ours_error": 0.1, "peer_error": 0.12}
    facts |= {"share": 0.5, "resident": "L3", "peer_setting": {"threads": 1}, "others": 0.01}
    return cell | {"peer": "ik_q4_0"} | times | facts | changes


def data(*rows: dict[str, Any], bf16_dots: bool = False) -> dict[str, Any]:
    facts = {"processor": "P", "family": "1/2", "flags": ["avx2"], "cores": 2, "memory_gib": 24}
    machine = facts | {"l3_bytes": 32 << 20, "bf16_dots": bf16_dots}
    return {
        "cells": list(rows),
        "models": [],
        "machine": machine,
        "versions": {"torch": "2"},
        "source": "s",
    }


def goal_line(page: str, text: str) -> str:
    return next(line for line in page.splitlines() if line.startswith(f"| {text}"))


def probe(**changes: Any) -> dict[str, Any]:
    """A row beside the memory: 1 ms, of which 0.5 ms are reading and 0.84 instructions."""
    facts = {"bytes": 100, "peer_bytes": 400, "instructions": {"k": 0.125, "v": None}}
    facts |= {"executed": {"dot": 300, "scalar": 100}, "loop_instructions": 1000}
    facts |= {"floats": {"k": None, "v": "the recipe says so"}, "left_out": []}
    third = {"third_ms": {"median": 2.1, "low": 2.0, "high": 2.2}}
    return row(peer=cpu_cells.PROBE, peer_error=None, **facts | third | changes)
