"""What runtime and targets need to know of one attention structure: what is stored, in which bytes.

An artifact holds plans as JSON, one object a record, each with its "kind". A record checks itself,
so what was read from a file is as sound as what `plan_from_graph` made.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

from .attrs import ATTRS
from .encodings import Bfp, Int, Tokens, dense_of
from .encodings.raw import check_choice, check_integer
from .errors import KvantError
from .layouts import PageLayout, page_tokens
from .maps import Map

TABLE_BYTES = 8
# Bits of the integer queries for each code width: the products of a dot then fit 32 bits.
QUERY_BITS = {2: 8, 3: 8, 4: 8, 8: 16}


@dataclass(frozen=True, slots=True)
class StreamPlan:
    """How one role of a layer is stored.

    Attributes:
        role: "k" or "v".
        heads: KV heads.
        channels: channels of a head.
        maps: applied online at append, first one first; constants are [heads, channels].
        tokens: which token is stored how.
        page_tokens: tokens of a page.
    """

    role: str
    heads: int
    channels: int
    maps: tuple[Map, ...]
    tokens: Tokens
    page_tokens: int

    def __post_init__(self) -> None:
        """Refuse a plan whose parts do not fit one another."""
        where = f"stream {self.role}"
        check_choice(where, "role", self.role, ("k", "v"))
        for name in ("heads", "channels", "page_tokens"):
            check_integer(where, name, getattr(self, name), 1)
        _check_records(where, "tokens", (self.tokens,), Tokens)
        _check_maps(where, self.maps, self.channels)
        self.tokens.check(self.channels, where)
        if self.page_tokens % self.tokens.group_tokens:
            raise KvantError(
                "group-does-not-divide",
                f"groups of {self.tokens.group_tokens} do not divide pages of {self.page_tokens}",
                where=where,
                fix=f"use pages of {page_tokens(self.tokens.rest)} tokens",
            )

    @property
    def elements_per_token(self) -> int:
        """Numbers of one token, in all heads."""
        return self.heads * self.channels

    def page_layout(self) -> PageLayout:
        """Return the bytes of a page. Raises: KvantError if no layout holds the format."""
        return PageLayout(self.page_tokens, self.heads, self.channels, self.tokens.rest)

    def held_from(self, length: int, window: int | None) -> int:
        """Return the first position that the pages hold when `length` tokens are stored; >= sink.

        With a window of w, no query to come sees a position before length - w + 1. A page is given
        back when all of it is older than that by the tokens of one page more: that many tokens can
        always be taken back. So pages hold fewer than w + 2 page_tokens positions, however long
        the row.

        Args:
            length: tokens of the row, all that is due encoded.
            window: of the layer, or None for none.
        """
        sink, page = self.tokens.sink, self.page_tokens
        if window is None:
            return sink
        old = min(length - window + 1 - page, self.tokens.encoded_end(length)) - sink
        return sink + max(0, old) // page * page

    def bytes(self, length: int, window: int | None = None) -> int:
        """Return the bytes in use of a batch-1 cache of `length` tokens, all that is due encoded.

        Sink and tail tokens in their raw type, whole pages in use, 8 bytes of table a page.

        Args:
            length: tokens of the row.
            window: of the layer, or None for none; see `held_from`.
        """
        end = self.tokens.encoded_end(length)
        raw_tokens = min(length, self.tokens.sink) + max(0, length - end)
        raw_bytes = raw_tokens * self.elements_per_token * self.tokens.raw.itemsize
        pages = ceil((end - self.held_from(length, window)) / self.page_tokens)
        return raw_bytes + pages * (self.page_layout().page_bytes + TABLE_BYTES)

    def bits_per_element(self, length: int, window: int | None = None) -> float:
        """Return the stored bits for each number of a cache of `length` tokens; 0 for none."""
        elements = length * self.elements_per_token
        return 8.0 * self.bytes(length, window) / elements if elements else 0.0


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """One attention structure: what is stored, and what attend computes.

    Attributes:
        q_heads: query heads; a multiple of the KV heads.
        scale: factor on the dot products.
        softcap: bound of the scores, or None.
        window: keys that a query sees, or None for all.
        q_maps: applied to q online, with `repeat` = q_heads / heads.
        k: the key stream.
        v: the value stream.
        out_maps: applied to the output online, with the same `repeat`; usually none.
        compute: "float", or "int": kernels may multiply codes as integers. For keys with scales of
            tokens all targets then round q per (query, head), to 8 bits for keys of up to 4 bits
            and to 16 bits for 8-bit keys; what else is rounded, `ir/integers.py` says.
        sinks: name of the constant of learned sinks, one logit [q_heads] in each softmax; or None.
    """

    q_heads: int
    scale: float
    softcap: float | None
    window: int | None
    q_maps: tuple[Map, ...]
    k: StreamPlan
    v: StreamPlan
    out_maps: tuple[Map, ...]
    compute: Literal["float", "int"] = "float"
    sinks: str | None = None

    def __post_init__(self) -> None:
        """Refuse a plan whose parts do not fit one another."""
        where = "attention plan"
        check_integer(where, "q_heads", self.q_heads, 1)
        _check_records(where, "k and v", (self.k, self.v), StreamPlan)
        _check_number(where, "scale", self.scale)
        if self.softcap is not None:
            _check_number(where, "softcap", self.softcap)
        if self.window is not None:
            check_integer(where, "window", self.window, 1)
        _check_maps(where, self.q_maps, self.k.channels)
        _check_maps(where, self.out_maps, self.v.channels)
        self._check_heads(where)
        if self.sinks is not None and (not isinstance(self.sinks, str) or not self.sinks):
            raise _bad_plan(f"sinks is {self.sinks!r}, not the name of a constant", where)
        check_choice(where, "compute", self.compute, ("float", "int"))
        kept = self.k.tokens, self.v.tokens
        if self.compute == "int" and not any(tokens.quantizes for tokens in kept):
            raise KvantError(
                "integer-compute",
                f"compute = int with keys stored as {kept[0].rest} and values as {kept[1].rest}",
                where=where,
                fix="store keys or values as int, bfp or lut, or use compute = float",
            )

    @property
    def group(self) -> int:
        """Query heads that read one KV head; query head h reads h // group."""
        return self.q_heads // self.k.heads

    @property
    def elements_per_token(self) -> int:
        """Numbers of one token: of its keys and its values, in all KV heads."""
        return self.k.elements_per_token + self.v.elements_per_token

    @property
    def query_bits(self) -> int | None:
        """Bits of q under compute = int, or None where q stays float."""
        rest = dense_of(self.k.tokens.rest)
        if self.compute != "int" or rest is None:
            return None
        if isinstance(rest, Int) and rest.axis == "channel":
            return None
        return QUERY_BITS.get(rest.mantissa if isinstance(rest, Bfp) else rest.bits)

    def bytes(self, length: int) -> int:
        """Return the bytes in use of a batch-1 cache of one such layer; see `StreamPlan.bytes`."""
        return sum(stream.bytes(length, self.window) for stream in (self.k, self.v))

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON objects, each with its "kind"."""
        written = _to_json(self)
        return dict(written)

    @staticmethod
    def from_json(value: object, where: str = "plan.json") -> AttentionPlan:
        """Read what `to_json` gave, or its text.

        Raises: KvantError("bad-plan") for an unknown or missing key; for a wrong value, that or
            what its record raises.
        """
        plan = _from_json(_parsed(value, where), where)
        _check_records(where, "the plan", (plan,), AttentionPlan)
        return plan  # type: ignore[no-any-return]

    def _check_heads(self, where: str) -> None:
        roles = (self.k.role, self.v.role)
        if self.k.heads != self.v.heads or self.q_heads % self.k.heads or roles != ("k", "v"):
            raise KvantError(
                "bad-plan",
                f"{self.q_heads} query heads, {self.k.heads} heads of {self.k.role}, "
                f"{self.v.heads} of {self.v.role}",
                where=where,
                fix="use as many k as v heads, and a number of query heads that they divide",
            )


PLAN_RECORDS: dict[str, type[Any]] = {"attention": AttentionPlan, "stream": StreamPlan} | ATTRS
KIND_OF = {cls: kind for kind, cls in PLAN_RECORDS.items()}


def _parsed(value: object, where: str) -> object:
    if not isinstance(value, str | bytes):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise _bad_plan(f"no JSON: {error}", where) from error


def _to_json(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_to_json(item) for item in value]
    if type(value) not in KIND_OF:
        return value
    fields = {f.name: _to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return {"kind": KIND_OF[type(value)], **fields}


def _from_json(value: Any, where: str) -> Any:
    if isinstance(value, list):
        return tuple(_from_json(item, f"{where}[{i}]") for i, item in enumerate(value))
    if not isinstance(value, dict):
        return value
    kind = value.get("kind")
    if not isinstance(kind, str) or kind not in PLAN_RECORDS:
        raise _bad_plan(f"kind is {kind!r}; there are: {', '.join(PLAN_RECORDS)}", where)
    cls = PLAN_RECORDS[kind]
    names = [f.name for f in dataclasses.fields(cls)]
    unknown = sorted(set(value) - {"kind", *names})
    missing = [name for name in names if name not in value]
    if unknown or missing:
        raise _bad_plan(f"{kind}: unknown keys {unknown}, missing keys {missing}", where)
    return cls(**{name: _from_json(value[name], f"{where}.{name}") for name in names})


def _bad_plan(what: str, where: str) -> KvantError:
    fix = "compile the artifact again; this file is written by kvant alone"
    return KvantError("bad-plan", what, where=where, fix=fix)


def _check_records(where: str, name: str, values: tuple[object, ...], cls: type[Any]) -> None:
    if not all(isinstance(value, cls) for value in values):
        raise _bad_plan(f"{name}: {values!r} where {KIND_OF[cls]} should be", where)


def _check_number(where: str, name: str, value: object) -> None:
    if not isinstance(value, float) or not 0.0 < value < float("inf"):
        raise _bad_plan(f"{name} is {value!r}, not a positive number", where)


def _check_maps(where: str, maps: object, channels: int) -> None:
    if not isinstance(maps, tuple) or not all(isinstance(m, Map) for m in maps):
        raise _bad_plan(f"maps are {maps!r}", where)
    for m in maps:
        m.check(channels, where)
