"""JSON without surprises: what Python's reader repairs in silence is refused here.

Python keeps the last of two equal keys, accepts NaN and Infinity, turns 1e999 into infinity and
overflows its stack on deep nesting. A file that two readers can understand differently is refused.
"""

import json
import re
from typing import NoReturn, TypeAlias, cast

from ..ir.errors import KvantError

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

MAX_DEPTH = 32
MAX_INTEGER = 2**53  # beyond it a double, and so most JSON readers, cannot tell neighbours apart

# An unfinished string runs to the end of the text, so that the scan is linear in any case.
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.?)*+(?:"|\Z)|[\[\]{}]', re.DOTALL)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_FIX = "copy the artifact again from its source, or compile it again"


def canonical(value: Json) -> bytes:
    """Return the one spelling of a JSON value: sorted keys, ASCII, two spaces, a final newline."""
    text = json.dumps(value, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False)
    return text.encode("ascii") + b"\n"


def parse(raw: bytes, where: str) -> Json:
    """Return the value that `raw` spells.

    Args:
        raw: UTF-8 without a byte order mark.
        where: the file, for the error.

    Raises: KvantError "json-encoding", "json-depth", "json-syntax", "json-duplicate-key",
        "json-number" or "json-text" (a control character in a string).
    """
    text = _decode(raw, where)
    _check_depth(text, where)

    def pairs(items: list[tuple[str, Json]]) -> dict[str, Json]:
        found: dict[str, Json] = {}
        for key, value in items:
            if key in found:
                _refuse("json-duplicate-key", f"the key {key!r} is written twice", where)
            found[key] = value
        return found

    def integer(digits: str) -> int:
        if len(digits) > 17 or abs(int(digits)) > MAX_INTEGER:
            _refuse("json-number", f"the integer {_short(digits)} is beyond 2^53", where)
        return int(digits)

    def number(digits: str) -> float:
        value = float(digits)
        if value in (float("inf"), float("-inf")):
            _refuse("json-number", f"the number {_short(digits)} is not finite", where)
        return value

    def constant(name: str) -> NoReturn:
        _refuse("json-number", f"{name} is not a JSON number", where)

    try:
        value = json.loads(
            text,
            object_pairs_hook=pairs,
            parse_int=integer,
            parse_float=number,
            parse_constant=constant,
        )
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        _refuse("json-syntax", f"not JSON: {error.msg} at {place}", where)
    _check_text(value, where)
    return cast(Json, value)


def parse_object(raw: bytes, where: str) -> dict[str, Json]:
    """Return the object that `raw` spells; see `parse`."""
    value = parse(raw, where)
    if not isinstance(value, dict):
        _refuse("json-syntax", "the file holds no JSON object", where)
    return value


def _decode(raw: bytes, where: str) -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        _refuse("json-encoding", f"byte {error.start} is not UTF-8", where)
    if text.startswith("\ufeff"):
        _refuse("json-encoding", "the file begins with a byte order mark", where)
    return text


def _check_depth(text: str, where: str) -> None:
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        token = match.group()
        depth += (token in "[{") - (token in "]}")
        if depth > MAX_DEPTH:
            _refuse("json-depth", f"nested more than {MAX_DEPTH} deep", where)


def _check_text(value: Json, where: str) -> None:
    """Refuse control characters and lone surrogates: they hide things in logs and terminals."""
    match value:
        case str():
            if _CONTROL.search(value):
                what = f"control character in the string {_short(ascii(value))}"
                _refuse("json-text", what, where)
        case list():
            for item in value:
                _check_text(item, where)
        case dict():
            for key, item in value.items():
                _check_text(key, where)
                _check_text(item, where)


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}..."


def _refuse(code: str, what: str, where: str) -> NoReturn:
    raise KvantError(code, what, where=where, fix=_FIX)
