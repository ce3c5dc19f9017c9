"""Two contestants in turns on a quiet machine, or a refusal. Needs nothing but Python.

Two, or three, take turns (A B A B ...), so that a slow moment meets both. A result needs all of:

    idle      before and after, others use less than BUSY of the cores while this process sleeps
    alone     during the rounds others use less than BUSY, from the machine's own counters
    steady    the slowest round of either contestant is less than SPREAD over its fastest

What is missing any of them is tried again, and then is no number but a sentence.
"""

import os
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Run = Callable[[], Any]

BUSY = 0.06
"""Share of all cores that others may use."""

SPREAD = 0.30
"""(slowest - fastest) / median of a contestant's rounds."""

ROUNDS = 7
ATTEMPTS = 3
WINDOW = 0.5  # seconds of sleep in which the machine is watched; the counters step by 10 ms
PAUSE = 0.02  # after a change of contestant: threads of the other one stop spinning
TURN = 0.12  # seconds that a turn aims to last


@dataclass(frozen=True, slots=True)
class Times:
    """Milliseconds of one contestant: median, fastest and slowest round."""

    median: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """How far the rounds are apart."""
        return (self.high - self.low) / self.median


@dataclass(frozen=True, slots=True)
class Clock:
    """Seconds since some moment: of the wall, of all processes, of this one."""

    wall: float
    all: float
    own: float


def pin(threads: int) -> list[int]:
    """Keep this process on its first `threads` cores; libraries loaded later see no others.

    Raises: SystemExit where there are fewer.
    """
    cores = sorted(os.sched_getaffinity(0))
    if threads > len(cores):
        raise SystemExit(f"{threads} threads, but this process may use {len(cores)} cores")
    os.sched_setaffinity(0, cores[:threads])
    return cores[:threads]


def read_clock(stat: Path = Path("/proc/stat")) -> Clock:
    """Return the time that passed and was used so far; what a host stole counts as used."""
    fields = stat.read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
    user, nice, system, _idle, _wait, irq, soft, steal = (int(x) for x in fields[:8])
    used = (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")
    mine = resource.getrusage(resource.RUSAGE_SELF)
    return Clock(time.perf_counter(), used, mine.ru_utime + mine.ru_stime)


def share_of_others(before: Clock, after: Clock, cores: int) -> float:
    """Return the share of `cores` that other processes used between two moments."""
    used = (after.all - before.all) - (after.own - before.own)
    return max(0.0, used / (cores * max(1e-9, after.wall - before.wall)))


def idle_share(seconds: float = WINDOW) -> float:
    """Return what others use of all cores while this process sleeps."""
    before = read_clock()
    time.sleep(seconds)
    return share_of_others(before, read_clock(), os.cpu_count() or 1)


def wait_until_idle(tries: int = 20, idle: Callable[[], float] = idle_share) -> str | None:
    """Return none as soon as others leave the machine alone, or why it is no use to begin."""
    busy = 0.0
    for _ in range(tries):
        busy = idle()
        if busy <= BUSY:
            return None
        time.sleep(1.0)
    return f"machine busy: others used {busy:.0%} of the cores"


def times(samples: Sequence[float]) -> Times:
    """Return median, fastest and slowest of the rounds, milliseconds."""
    return Times(statistics.median(samples), min(samples), max(samples))


def repeats(run: Run, turn: float = TURN) -> int:
    """Return how many calls a turn has; the first two calls warm up."""
    run()
    run()
    begin = time.perf_counter()
    run()
    return max(1, min(1000, int(turn / max(time.perf_counter() - begin, 1e-6))))


def take_turns(*runs: Run, rounds: int = ROUNDS) -> list[list[float]]:
    """Time all of them, round by round; a turn begins with a call that does not count.

    Returns: milliseconds a call of each round, for each of the runs.
    """
    counts = [repeats(run) for run in runs]
    samples: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, count, kept in zip(runs, counts, samples, strict=True):
            time.sleep(PAUSE)
            run()
            begin = time.perf_counter()
            for _ in range(count):
                run()
            kept.append((time.perf_counter() - begin) / count * 1e3)
    return samples


def compare(ours: Sequence[float], peer: Sequence[float]) -> dict[str, Any]:
    """Return what is reported of two lists of rounds: ratios are time of peer / ours."""
    a, b = times(ours), times(peer)
    return {
        "ours_ms": asdict(a),
        "peer_ms": asdict(b),
        "ratio": b.median / a.median,
        "worst": min(y / x for x, y in zip(ours, peer, strict=True)),
        "rounds": len(ours),
    }


def why_refused(
    ours: Times, peer: Times, shares: Sequence[float], third: Times | None = None
) -> str | None:
    """Return why rounds are no result, or none.

    Args:
        ours: our rounds.
        peer: the peer's.
        shares: of the cores that others used: before, meanwhile, after.
        third: those of what took turns with both.
    """
    if max(shares) > BUSY:
        return f"machine busy: others used {max(shares):.0%} of the cores"
    if max(ours.spread, peer.spread) > SPREAD:
        return (
            f"machine busy: the rounds spread by {ours.spread:.0%} (ours) "
            f"and {peer.spread:.0%} (peer)"
        )
    if third is not None and third.spread > SPREAD:
        return f"machine busy: the rounds beside both spread by {third.spread:.0%}"
    return None


def measure(
    ours: Run,
    peer: Run,
    *,
    third: Run | None = None,
    rounds: int = ROUNDS,
    attempts: int = ATTEMPTS,
    even_if_busy: bool = False,
    idle: Callable[[], float] = idle_share,
) -> dict[str, Any]:
    """Return the result of `compare`, or {"refused": why}.

    Args:
        ours: one step of ours.
        peer: one step of the peer.
        third: what else takes turns; its times are "third_ms".
        rounds: turns of each.
        attempts: after how many a busy machine is believed.
        even_if_busy: give numbers all the same, marked "busy"; for trying the harness.
        idle: gives what others use while this process sleeps.
    """
    reason = "machine busy"
    for attempt in range(attempts):
        before = idle()
        if before > BUSY and not even_if_busy:
            reason = f"machine busy: others used {before:.0%} of the cores"
            time.sleep(2.0 * attempt)
            continue
        begin = read_clock()
        samples = take_turns(ours, peer, *([third] if third else []), rounds=rounds)
        meanwhile = share_of_others(begin, read_clock(), os.cpu_count() or 1)
        found = compare(*samples[:2])
        shares = (before, meanwhile, idle())
        all_times = [times(x) for x in samples]
        refusal = why_refused(all_times[0], all_times[1], shares, *all_times[2:])
        if third:
            found["third_ms"] = asdict(all_times[2])
        if refusal is None:
            return found | {"others": max(shares)}
        if even_if_busy:
            return found | {"busy": refusal}
        reason = refusal
    return {"refused": reason}
