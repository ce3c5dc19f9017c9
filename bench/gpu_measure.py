"""How times are taken on a GPU: cold caches, in turns, medians with their spread.

What takes part in a comparison is timed in turns, A B A B, in the same process: other work, heat
and clocks meet all alike. Before each call the second cache is overwritten. Times are those of
events around a replayed graph, so that they hold nothing of the host; what cannot be captured is
called between the events, and says so.
"""

import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

ROUNDS, CALLS = 5, 10
FLUSH = 256 << 20
"""Bytes that are written before each call: more than twice the second cache of any GPU here."""
MOST_SPREAD = 0.3
"""Of the rounds of one call; a number that spreads more is not reported."""

Call = Callable[[], Any]


class Clock(Protocol):
    """Takes times."""

    def time(self, call: Call) -> float:
        """Return the microseconds of one call, over cold caches."""


@dataclass
class EventClock:
    """Events of torch on the current stream.

    Attributes:
        flush: memory that is overwritten before each call.
    """

    flush: Any

    def time(self, call: Call) -> float:
        """See `Clock`. The flush takes longer than the host needs to enqueue what follows."""
        import torch

        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.add_(1)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3


def open_clock() -> EventClock:
    """Return a clock for the current device."""
    import torch

    return EventClock(torch.zeros(FLUSH, dtype=torch.uint8, device="cuda"))


@dataclass(frozen=True, slots=True)
class Timed:
    """The times of one call.

    Attributes:
        rounds: medians of each round, in microseconds.
        graph: whether a graph was replayed.
    """

    rounds: tuple[float, ...]
    graph: bool = True

    @property
    def median(self) -> float:
        """Microseconds."""
        return statistics.median(self.rounds)

    @property
    def spread(self) -> float:
        """Of the rounds, as a share of the median."""
        return (max(self.rounds) - min(self.rounds)) / self.median


def in_turns(
    calls: Mapping[str, Call], clock: Clock, rounds: int = ROUNDS, each: int = CALLS
) -> dict[str, tuple[float, ...]]:
    """Return the medians of each round, by name of call.

    Args:
        calls: what is compared.
        clock: takes times.
        rounds: all calls take part in each.
        each: calls of a round.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        clock.time(call)  # the first one is slower
    for _ in range(rounds):
        for name, call in calls.items():
            found[name].append(statistics.median(clock.time(call) for _ in range(each)))
    return {name: tuple(times) for name, times in found.items()}


def ratio(peer: Timed, own: Timed) -> dict[str, float]:
    """Return time of a peer over ours: of medians, and of the worst round for us."""
    rounds = [a / b for a, b in zip(peer.rounds, own.rounds, strict=True)]
    return {"ratio": peer.median / own.median, "worst": min(rounds)}


def best(peers: Mapping[str, Timed]) -> str:
    """Return the name of the fastest."""
    return min(peers, key=lambda name: peers[name].median)


def captured(call: Call) -> tuple[Call, bool]:
    """Return what replays a call from a graph, and True; or the call, and False.

    The call must do the same each time, over the same memory.
    """
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except Exception as error:
        print(f"    not captured: {type(error).__name__}: {str(error).splitlines()[0]}")
        torch.cuda.synchronize()
        return call, False
    return graph.replay, True


def host_us(call: Call, wait: Call, calls: int = 200, rounds: int = ROUNDS) -> float:
    """Return the host's microseconds of one call that does not wait for the device.

    Args:
        call: what starts a kernel.
        wait: waits for the device.
        calls: so few that the device's queue never fills.
        rounds: of which the median is taken.
    """
    times = []
    for _ in range(rounds):
        wait()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - begin) / calls * 1e6)
    wait()
    return statistics.median(times)


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError after so long, in the main thread."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"it took more than {seconds:g} s to begin")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class Budget:
    """Seconds that are left of a run.

    Attributes:
        seconds: of the whole run.
        now: tells the time.
    """

    seconds: float
    now: Callable[[], float] = time.monotonic
    begin: float = field(init=False)

    def __post_init__(self) -> None:
        """Start."""
        self.begin = self.now()

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.seconds - (self.now() - self.begin)


def spread_too_far(times: Sequence[Timed]) -> str | None:
    """Return why times cannot be reported, or none."""
    worst = max(timed.spread for timed in times)
    return f"rounds spread over {worst:.0%}" if worst > MOST_SPREAD else None
