"""What Python's JSON reader repairs in silence is refused; what kvant writes is read."""

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvant.ir.errors import KvantError
from kvant.runtime.strict_json import canonical, parse, parse_object

FIX = "copy the artifact again from its source, or compile it again"


@pytest.mark.parametrize(
    ("raw", "code", "what"),
    [
        (b'{"a": 1, "b": {"x": 1, "x": 2}}', "duplicate-key", "the key 'x' is written twice"),
        (b'{"a": 1, "\\u0061": 2}', "duplicate-key", "the key 'a' is written twice"),
        (b"[NaN]", "number", "NaN is not a JSON number"),
        (b"[-Infinity]", "number", "-Infinity is not a JSON number"),
        (b"[1e999]", "number", "the number 1e999 is not finite"),
        (b"[9007199254740993]", "number", "the integer 9007199254740993 is beyond 2^53"),
        (
            b"[" + b"9" * 5000 + b"]",
            "number",
            f"the integer {'9' * 40}... is beyond 2^53",
        ),
        (b"[" * 33 + b"]" * 33, "depth", "nested more than 32 deep"),
        (b"[" * 100_000, "depth", "nested more than 32 deep"),
        (b'{"a":' * 33 + b"1" + b"}" * 33, "depth", "nested more than 32 deep"),
        (b'"\xff"', "encoding", "byte 1 is not UTF-8"),
        (b"\xef\xbb\xbf{}", "encoding", "the file begins with a byte order mark"),
        (
            b'["a\\u0000b"]',
            "text",
            "control character in the string 'a\\x00b'",
        ),
        (b'["\\ud800"]', "text", "control character in the string '\\ud800'"),
        (b'{"\\u001b[31m": 1}', "text", "control character in the string '\\x1b[31m'"),
        (b"", "syntax", "not JSON: Expecting value at line 1, column 1"),
        (b'{"a": 1', "syntax", "not JSON: Expecting ',' delimiter at line 1, column 8"),
        (b"{} {}", "syntax", "not JSON: Extra data at line 1, column 4"),
        (b"{'a': 1}", "syntax",
         "not JSON: Expecting property name enclosed in double quotes at line 1, column 2"),
    ],
)  # fmt: skip
def test_refused(raw: bytes, code: str, what: str) -> None:
    with pytest.raises(KvantError) as caught:
        parse(raw, "x.json")
    assert str(caught.value) == f"{what}\n  where: x.json\n  fix: {FIX}  [json-{code}]"


def test_an_object_is_asked_for() -> None:
    with pytest.raises(KvantError, match="the file holds no JSON object"):
        parse_object(b"[]", "x.json")


def test_brackets_in_strings_do_not_count() -> None:
    text = "[" * 50 + '\\"' + "{" * 50
    assert parse(f'["{text}"]'.encode(), "x") == ["[" * 50 + '"' + "{" * 50]
    assert parse(b"[" * 32 + b"]" * 32, "x") is not None


@pytest.mark.parametrize("text", ['"' + '\\"' * 2_000_000, '"' * 3_000_001, '"\\'])
def test_hostile_text_takes_no_time(text: str) -> None:
    begin = time.perf_counter()
    with pytest.raises(KvantError):
        parse(text.encode(), "x")
    assert time.perf_counter() - begin < 5


NUMBERS = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(st.characters(exclude_categories=["Cc", "Cs"]))
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=20,
)


@given(VALUES)
def test_what_is_written_is_read(value: Any) -> None:
    raw = canonical(value)
    assert parse(raw, "x") == value
    assert canonical(parse(raw, "x")) == raw
    assert raw.isascii()


def test_one_spelling() -> None:
    assert canonical({"b": 1.0, "a": ["é"]}) == b'{\n "a": [\n  "\\u00e9"\n ],\n "b": 1.0\n}\n'
    with pytest.raises(ValueError):
        canonical(float("nan"))


@given(st.binary(max_size=40))
def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
    codes = []
    try:
        parse(raw, "x")
    except KvantError as error:
        codes.append(error.code)
    assert all(code.startswith("json-") for code in codes)
