"""The text form of a graph, and its reader. `parse(print_graph(g)) == g`.

    file   := "kvant 1" graph            graph := "graph @name" op* "return" %value*
    op     := result ("," result)* "=" name %value* ["{" key "=" attr ("," key "=" attr)* "}"]
    result := %value ":" type            type  := dtype "[" sizes "]" | "cache[" role "]"
    attr   := number | true | false | none | word | "quoted" | (attr, ...) | tag(field = attr, ...)

One op a line. A comment runs from # to the end of its line; `# from: ...` is the source location.
A record with one field prints it without its name. Attributes left out take their defaults.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from typing import Any, TypeVar, cast

from .arrays import STORED
from .attrs import ATTRS, AttrValue, Record
from .encodings.raw import Raw
from .encodings.tokens import Tokens
from .errors import KvantError
from .graph import Graph, Op, Value
from .ops import complete, nearest
from .types import CacheType, Dim, TensorType, Type

T = TypeVar("T")
VERSION = "kvant 1"
_WORDS: dict[str, AttrValue] = {
    "true": True,
    "false": False,
    "none": None,
    "inf": math.inf,
    "nan": math.nan,
}
_TAGS = {record: tag for tag, record in ATTRS.items()}
_WORD = re.compile(r"[A-Za-z_][\w.\-]*")
_TOKEN = re.compile(
    r'\s*(?:(?P<comment>#.*)|(?P<string>"(?:[^"\\]|\\.)*")|(?P<value>%[\w.\-]+)'
    r"|(?P<number>-inf\b|-?\d+(?:\.\d+)?(?:e[-+]?\d+)?)|(?P<word>[A-Za-z_][\w.\-]*)"
    r"|(?P<mark>[\[\](){},:=+]))"
)


def print_graph(graph: Graph) -> str:
    """Return the text of a graph; it ends in a newline."""
    lines = [VERSION, f"graph @{graph.name}", *(f"  {print_op(op)}" for op in graph.ops)]
    return "\n".join([*lines, "  " + " ".join(["return", *map(str, graph.outputs)]), ""])


def print_op(op: Op) -> str:
    """Return the line of one op, without indent."""
    results = ", ".join(f"{r} : {r.type}" for r in op.results)
    attrs = ", ".join(f"{key} = {print_attr(value)}" for key, value in op.attrs)
    line = " ".join([results, "=", op.name, *map(str, op.args)])
    line += f" {{{attrs}}}" if attrs else ""
    return line if op.loc is None else f"{line}  # from: {' '.join(op.loc.split())}"


def print_attr(value: AttrValue) -> str:
    """Return the text of an attribute."""
    if isinstance(value, str):
        return value if _WORD.fullmatch(value) and value not in _WORDS else json.dumps(value)
    if isinstance(value, tuple):
        return f"({', '.join(map(print_attr, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Tokens):
        raw, rest = value.raw.dtype, _print_format(value.rest)
        classes = f"sink {value.sink}: {raw}, recent {value.recent}: {raw}"
        return f"tokens({classes}, flush = {value.flush}, rest: {rest})"
    given = [(f, getattr(value, f.name)) for f in fields(value)]
    texts = ["none" if _says_none(f) and v == "none" else print_attr(v) for f, v in given]
    if len(given) > 1:
        texts = [f"{f.name} = {text}" for (f, _), text in zip(given, texts, strict=True)]
    return f"{_TAGS[type(value)]}({', '.join(texts)})"


def _print_format(value: Record) -> str:
    return value.dtype if isinstance(value, Raw) else print_attr(value)


def _says_none(field: Field[object]) -> bool:
    """Say whether "none" is a word of this field, as in zero = none."""
    return "none" in str(field.type)


def parse(text: str) -> Graph:
    """Return the graph of a text. It is not verified.

    Raises: KvantError ("ir-syntax") with the line's number if the text does not follow the grammar.
    """
    ops: list[Op] = []
    defined: dict[str, Value] = {}
    lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.split("#")[0].strip()]
    readers = [_Line(number, line) for number, line in lines]
    end = _Line(len(text.splitlines()) + 1, "")
    version, header = [*readers, end, end][:2]
    if version.text != VERSION:
        raise version.error(f"the first line must be {VERSION}", "a kvant text says its version")
    name = re.fullmatch(r"graph @([\w.\-]+)", header.text)
    if name is None:
        raise header.error("the second line must be graph @name", "name the graph")
    for place, reader in enumerate(readers[2:], 3):
        if reader.text.startswith("return"):
            outputs = reader.outputs(defined)
            if readers[place:]:
                raise readers[place].error("nothing may follow return", "remove this line")
            return Graph(name[1], tuple(ops), outputs)
        ops.append(reader.op(defined))
    raise end.error("the text ends without return", "end it with a line: return %value")


class _Line:
    """Reads one line, token by token."""

    def __init__(self, number: int, line: str) -> None:
        self.number, self.loc = number, None
        self.tokens: list[tuple[str, str]] = []
        self.text, at, self.at = line.strip(), 0, 0
        while at < len(line.rstrip()):
            found = _TOKEN.match(line, at)
            if found is None:
                raise self.error(f"cannot read {line[at:].strip()[:20]!r}", "see kvant.ir.text")
            kind, token = str(found.lastgroup), found[str(found.lastgroup)]
            if kind == "comment":
                self.loc = token.removeprefix("# from: ") if token.startswith("# from: ") else None
                self.text = line[: found.start()].strip()
            else:
                self.tokens.append((kind, token))
            at = found.end()

    def error(self, what: str, fix: str) -> KvantError:
        return KvantError("ir-syntax", what, where=f"line {self.number}: {self.text}", fix=fix)

    def peek(self, ahead: int = 0) -> str:
        """Return the next token; empty at the end."""
        return self.tokens[self.at + ahead][1] if self.at + ahead < len(self.tokens) else ""

    def take(self, *kinds: str) -> str:
        """Return the next token, which must be of one of these kinds, or be one of these marks."""
        kind, token = self.tokens[self.at] if self.at < len(self.tokens) else ("", "the end")
        if kind not in kinds and (kind != "mark" or token not in kinds):
            raise self.error(f"expected {' or '.join(kinds)}, found {token}", "see kvant.ir.text")
        self.at += 1
        return token

    def accept(self, token: str) -> bool:
        """Take the next token if it is this one."""
        self.at += (same := self.peek() == token)
        return same

    def checked(self, make: Callable[[], T]) -> T:
        """Return make(); a refusal of what is made becomes an error of this line."""
        try:
            return make()
        except KvantError as refusal:
            raise self.error(refusal.what, refusal.fix) from None

    def op(self, defined: dict[str, Value]) -> Op:
        """Read an op and define its results."""
        results = [self.result()]
        while self.accept(","):
            results.append(self.result())
        self.take("=")
        name = self.take("word")
        args = tuple(self.use(defined) for _ in iter(lambda: self.peek().startswith("%"), False))
        attrs: dict[str, AttrValue] = {}
        if self.accept("{"):
            while True:
                key = self.take("word")
                self.take("=")
                if key in attrs:
                    raise self.error(f"the attribute {key} is given twice", "keep one")
                attrs[key] = self.attr()
                if self.take(",", "}") == "}":
                    break
        self.finish()
        defined.update((r.name, r) for r in results)
        return Op(name, args, complete(name, attrs), tuple(results), self.loc)

    def outputs(self, defined: dict[str, Value]) -> tuple[Value, ...]:
        """Read a return line."""
        self.take("word")
        found = tuple(self.use(defined) for _ in iter(lambda: self.peek().startswith("%"), False))
        self.finish()
        return found

    def finish(self) -> None:
        if self.peek():
            raise self.error(f"expected the end of the line, found {self.peek()}", "one op a line")

    def use(self, defined: dict[str, Value]) -> Value:
        name = self.take("value")[1:]
        if name not in defined:
            fix = f"define it on an earlier line; {nearest(name, defined)}"
            raise self.error(f"%{name} is not defined before this line", fix)
        return defined[name]

    def result(self) -> Value:
        name = self.take("value")[1:]
        self.take(":")
        return Value(name, self.type())

    def type(self) -> Type:
        """Read the type of a value."""
        dtype = self.take("word")
        self.take("[")
        if dtype == "cache":
            role = self.take("word")
            self.take("]")
            return CacheType(role)
        shape: list[Dim] = []
        while not self.accept("]"):
            token = self.take("number", "word")
            while self.accept("+"):
                token += "+" + self.take("number", "word")
            shape.append(int(token) if token.isdigit() else token)
            if self.peek() != "]":
                self.take(",")
        return self.checked(lambda: TensorType(dtype, tuple(shape)))

    def attr(self) -> AttrValue:
        """Read an attribute."""
        kind, token = self.tokens[self.at] if self.peek() else ("", "")
        if self.accept("("):
            items: list[AttrValue] = []
            while not self.accept(")"):
                items.append(self.attr())
                if self.peek() != ")":
                    self.take(",")
            return tuple(items)
        self.take("number", "string", "word", "(")
        if kind == "word":
            if self.accept("("):
                return self.tokens_record() if token == "tokens" else self.record(token)
            return _WORDS.get(token, token)
        if kind == "number" and re.fullmatch(r"-?\d+", token):
            return int(token)
        try:
            return float(token) if kind == "number" else str(json.loads(token))
        except ValueError:
            raise self.error(f"cannot read {token}", "use the escapes of JSON") from None

    def record(self, tag: str) -> Record:
        """Read the rest of tag(field = value, ...)."""
        if tag not in ATTRS:
            raise self.error(f"no attribute {tag}(...); {nearest(tag, ATTRS)}", "use one of these")
        known, given = {f.name: f for f in fields(ATTRS[tag])}, dict[str, AttrValue]()
        while not self.accept(")"):
            key = next(iter(known))
            if len(known) > 1 or self.peek(1) == "=":
                key = self.take("word")
                self.take("=")
            if key not in known or key in given:
                fix = f"use each field of {tag} once"
                raise self.error(f"no field {key} here; {nearest(key, known)}", fix)
            value = self.attr()
            given[key] = "none" if value is None and _says_none(known[key]) else value
            if self.peek() != ")":
                self.take(",")
        lacking = [k for k, f in known.items() if f.default is MISSING and k not in given]
        if lacking:
            raise self.error(f"{tag} lacks {' '.join(lacking)}", "give a value to each")
        make = cast(Callable[..., Record], ATTRS[tag])
        return self.checked(lambda: make(**given))

    def tokens_record(self) -> Record:
        """Read the rest of tokens(sink n: dtype, recent n: dtype, flush = word, rest: format)."""
        given: dict[str, AttrValue] = {}
        while True:
            key = self.take("word")
            if key in ("sink", "recent"):
                given[key] = int(self.take("number"))
                self.take(":")
                raw = self.format()
                if given.setdefault("raw", raw) != raw:
                    raise self.error("sink and recent have two formats", "store both in one")
            elif key in ("flush", "rest"):
                self.take("=" if key == "flush" else ":")
                given[key] = self.take("word") if key == "flush" else self.format()
            else:
                raise self.error(f"no class of tokens {key}", "use sink, recent, flush, rest")
            if self.take(",", ")") == ")":
                break
        if "rest" not in given:
            raise self.error("tokens lacks rest", "say how the rest is stored")
        make = cast(Callable[..., Record], Tokens)
        return self.checked(lambda: make(**given))

    def format(self) -> AttrValue:
        """Read a number format; a bare bf16, f16 or f32 is raw."""
        value = self.attr()
        return Raw(cast(Any, value)) if value in [*STORED] else value
