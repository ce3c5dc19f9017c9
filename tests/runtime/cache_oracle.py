"""The oracle of the cache: it keeps every token and knows nothing of pages, tails and slots.

With a window it also counts which tokens may be gone, page by page, and so which calls are refused.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from kvant.ir.attention import EXACT, Products, attend, round_queries
from kvant.ir.maps import apply
from kvant.ir.plan import AttentionPlan, StreamPlan

Array = np.ndarray[Any, np.dtype[Any]]
Constants = Mapping[str, Array]


class OracleStream:
    """Full history of one role of one row."""

    def __init__(self, plan: StreamPlan, constants: Constants, window: int | None) -> None:
        self.plan, self.constants, self.window = plan, constants, window
        self.x = np.zeros((plan.heads, 0, plan.channels), np.float32)
        self.end = self.gone = plan.tokens.sink

    def settle(self, reserve: int) -> None:
        length, page = max(0, self.x.shape[1] - reserve), self.plan.page_tokens
        due = self.plan.tokens.encoded_end(length)
        self.end = max(self.end, due)
        if self.window is not None:
            # Position `length` sees `window` tokens with itself; one page older is kept too.
            unseen = length - self.window + 1 - page
            while self.gone + page <= min(due, unseen):
                self.gone += page

    def append(self, x: Array) -> None:
        new = apply(self.plan.maps, x, self.constants)
        new = self.plan.tokens.as_raw(new).astype(np.float32)
        self.x = np.concatenate([self.x, new], axis=1)

    def stored(self) -> Array:
        y = self.x.astype(np.float64)
        encoded = replace(self.plan.tokens, recent=0, flush="group")
        end = min(self.end, y.shape[1])
        y[:, :end] = encoded.simulate(y[:, :end])
        return y

    def has_window_of(self, position: int) -> bool:
        first = 0 if self.window is None else position - self.window + 1
        return self.gone == self.plan.tokens.sink or first >= self.gone

    def can_cut(self, n: int) -> bool:
        sink, group = self.plan.tokens.sink, self.plan.tokens.rest.group_tokens
        if n > sink and not self.has_window_of(n):
            return False
        return n >= self.end or n <= sink or (n - sink) % group == 0

    def cut(self, n: int) -> None:
        self.x = self.x[:, :n]
        self.end = max(self.plan.tokens.sink, min(self.end, n))
        self.gone = min(self.gone, self.end)


class Oracle:
    """One layer. `valid` has one bool[B] per column."""

    def __init__(
        self, plan: AttentionPlan, constants: Constants, batch: int, start: tuple[int, ...] | None
    ) -> None:
        self.plan, self.constants, self.batch = plan, constants, batch
        self.start = start or (0,) * batch
        self.reserve = 0
        self.valid: list[Array] = []
        self.k = [OracleStream(plan.k, constants, plan.window) for _ in range(batch)]
        self.v = [OracleStream(plan.v, constants, plan.window) for _ in range(batch)]

    def flush(self) -> None:
        for stream in self.k + self.v:
            stream.settle(self.reserve)

    def append(self, k: Array, v: Array, lengths: Array | None = None) -> None:
        self.flush()
        tokens, before = k.shape[2], len(self.valid)
        ends = np.full(self.batch, tokens) if lengths is None else lengths
        columns = np.arange(tokens)
        mask = (columns + before >= np.asarray(self.start)[:, None]) & (columns < ends[:, None])
        for row in range(self.batch):
            self.k[row].append(k[row][:, mask[row]])
            self.v[row].append(v[row][:, mask[row]])
        self.valid += list(mask.T)

    def length(self, row: int, column: int) -> int:
        return sum(bool(valid[row]) for valid in self.valid[:column])

    def can_cut(self, n: int) -> bool:
        return all(
            stream.can_cut(self.length(row, n))
            for row in range(self.batch)
            for stream in (self.k[row], self.v[row])
        )

    def can_attend(self, tokens: int) -> bool:
        """Whether no query of the last columns sees what is gone."""
        for row in range(self.batch):
            first = self.length(row, len(self.valid) - tokens)
            if first < self.length(row, len(self.valid)):
                if not (self.k[row].has_window_of(first) and self.v[row].has_window_of(first)):
                    return False
        return True

    def cut(self, n: int) -> None:
        for row in range(self.batch):
            for stream in (self.k[row], self.v[row]):
                stream.cut(self.length(row, n))
        del self.valid[n:]

    def reorder(self, index: Array) -> None:
        self.valid = [valid[index] for valid in self.valid]
        self.start = tuple(self.start[i] for i in index)
        self.k = [_copy(self.k[i]) for i in index]
        self.v = [_copy(self.v[i]) for i in index]

    def queries(self, q: Array) -> Array:
        x = apply(self.plan.q_maps, q, self.constants, self.plan.group)
        bits = self.plan.query_bits
        return x if bits is None else round_queries(x, bits)

    def attend(
        self,
        q: Array,
        stored: Callable[[int], tuple[Array, Array]] | None = None,
        dtype: Any = np.float64,
        products: Callable[[int, int], Products | None] | None = None,
    ) -> tuple[Array, Array]:
        """Row by row; `stored` gives (k, v) of a row, by default what the oracle encodes itself.

        `products` gives the arithmetic of (row, queries). A window makes the kernels see each
        row's own queries, without the padding of its neighbours.
        """
        tokens = q.shape[2]
        out = np.zeros((*q.shape[:3], self.plan.v.channels))
        lse = np.full(q.shape[:3], -np.inf)
        x = self.queries(q)
        for row in range(self.batch):
            mask = np.array([v[row] for v in self.valid[len(self.valid) - tokens :]], bool)
            if not mask.any():
                continue
            k, v = stored(row) if stored else (self.k[row].stored(), self.v[row].stored())
            args = (x[row][None, :, mask], k[None], v[None])
            plan, n = self.plan, np.array([k.shape[1]])
            options = {"softcap": plan.softcap, "window": plan.window, "dtype": dtype}
            seen = tokens if plan.window is None else int(mask.sum())
            options["products"] = products(row, seen) if products else None
            options["products"] = options["products"] or EXACT
            options["sinks"] = None if plan.sinks is None else self.constants[plan.sinks]
            o, e = attend(*args, lengths=n, scale=plan.scale, **options)
            o = apply(plan.out_maps, o, self.constants, plan.group)
            out[row][:, mask], lse[row][:, mask] = o[0], e[0]
        return out, lse


def _copy(stream: OracleStream) -> OracleStream:
    new = OracleStream(stream.plan, stream.constants, stream.window)
    new.x, new.end, new.gone = stream.x, stream.end, stream.gone
    return new
