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
from .errors import KvantError, nearest
from .graph import Graph, Op, Value
from .ops import complete
from .types import CacheType, Dim, TensorType

T = TypeVar("T")
VERSION = "kvant 1"
_FROM = "# from: "
_WORDS: dict[str, AttrValue] = {"true": True, "false": False, "none": None}
_WORDS |= {"inf": math.inf, "nan": math.nan}
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
    source = " ".join((op.loc or "").split())
    return f"{line}  {_FROM}{source}" if source else line


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
        raw, rest = value.raw.dtype, value.rest
        last = rest.dtype if isinstance(rest, Raw) else print_attr(rest)
        classes = f"sink {value.sink}: {raw}, recent {value.recent}: {raw}"
        return f"tokens({classes}, flush = {value.flush}, rest: {last})"
    given = [(f, getattr(value, f.name)) for f in fields(value)]
    texts = ["none" if _says_none(f) and v == "none" else print_attr(v) for f, v in given]
    if len(given) > 1:
        texts = [f"{f.name} = {text}" for (f, _), text in zip(given, texts, strict=True)]
    return f"{_TAGS[type(value)]}({', '.join(texts)})"


def _says_none(field: Field[object]) -> bool:
    """Say whether "none" is a word of this field, as in zero = none."""
    return "none" in str(field.type)


def parse(text: str) -> Graph:
    """Return the graph of a text. It is not verified.

    Raises: KvantError ("ir-syntax") with the line's number if the text does not follow the grammar.
    """
    lines = [_Line(n, line) for n, line in enumerate(text.splitlines(), 1)]
    rest = iter([line for line in lines if line.text])
    end = _Line(len(lines) + 1, "")
    if (line := next(rest, end)).text != VERSION:
        raise line.error(f"expected {VERSION}", "a kvant text begins with its version")
    if (name := re.fullmatch(r"graph @([\w.\-]+)", (line := next(rest, end)).text)) is None:
        raise line.error("expected graph @name", "the second line names the graph")
    ops: list[Op] = []
    defined: dict[str, Value] = {}
    for line in rest:
        if line.text.split()[0] == "return":
            outputs = line.outputs(defined)
            if more := next(rest, None):
                raise more.error("something follows return", "remove it; one graph a text")
            return Graph(name[1], tuple(ops), outputs)
        ops.append(line.op(defined))
    raise end.error("the text ends without return", "end it with: return %value")


class _Line:
    """Reads one line, token by token."""

    def __init__(self, number: int, line: str) -> None:
        self.number, self.line, self.at = number, line.rstrip(), 0
        self.text = line.split("#")[0].strip()
        self.tokens: list[tuple[str, str]] = []
        self.loc: str | None = None

    def error(self, what: str, fix: str = "the grammar is in kvant.ir.text") -> KvantError:
        return KvantError("ir-syntax", what, where=f"line {self.number}: {self.text}", fix=fix)

    def split(self) -> None:
        """Split the line into tokens, each with its kind."""
        at = 0
        while at < len(self.line):
            found = _TOKEN.match(self.line, at)
            if found is None:
                raise self.error(f"cannot read {self.line[at:].strip()[:20]!r}")
            kind, token = str(found.lastgroup), found[str(found.lastgroup)]
            if kind != "comment":
                self.tokens.append((kind, token))
            elif token.startswith(_FROM):
                self.loc = token.removeprefix(_FROM)
            at = found.end()
        self.tokens.append(("end", "the end of the line"))

    def take(self, *kinds: str) -> str:
        """Return the next token, which must be of one of these kinds, or one of these marks."""
        kind, token = self.tokens[self.at]
        if kind not in kinds and (kind != "mark" or token not in kinds):
            raise self.error(f"expected {' or '.join(kinds)}, found {token}")
        self.at += 1
        return token

    def accept(self, kind: str) -> bool:
        """Take the next token if it is of this kind, or this mark."""
        self.at += (found := kind in self.tokens[self.at])
        return found

    def listed(self, close: str, item: Callable[[], T]) -> list[T]:
        """Read items parted by commas, up to the mark `close`."""
        found: list[T] = []
        while not self.accept(close):
            found.append(item())
            if close not in self.tokens[self.at]:
                self.take(",")
        return found

    def checked(self, make: Callable[..., T], *args: object, **named: object) -> T:
        """Return make(...); a refusal becomes an error of this line."""
        try:
            return make(*args, **named)
        except KvantError as refusal:
            raise self.error(refusal.what, refusal.fix) from None

    def op(self, defined: dict[str, Value]) -> Op:
        """Read an op and define its results."""
        self.split()
        results = [self.result()]
        while self.accept(","):
            results.append(self.result())
        self.take("=")
        name, args = self.take("word"), self.uses(defined)
        pairs = self.listed("}", self.pair) if self.accept("{") else []
        self.take("end")
        if len(dict(pairs)) < len(pairs):
            raise self.error("an attribute is given twice", "keep one of them")
        defined.update((r.name, r) for r in results)
        return Op(name, args, complete(name, dict(pairs)), tuple(results), self.loc)

    def outputs(self, defined: dict[str, Value]) -> tuple[Value, ...]:
        """Read a return line."""
        self.split()
        self.take("word")
        found = self.uses(defined)
        self.take("end")
        return found

    def uses(self, defined: dict[str, Value]) -> tuple[Value, ...]:
        found: list[Value] = []
        while self.tokens[self.at][0] == "value":
            name = self.take("value")[1:]
            if name not in defined:
                fix = f"define it on an earlier line; {nearest(name, defined)}"
                raise self.error(f"%{name} is not defined before this line", fix)
            found.append(defined[name])
        return tuple(found)

    def result(self) -> Value:
        name = self.take("value")[1:]
        self.take(":")
        dtype = self.take("word")
        self.take("[")
        if dtype != "cache":
            return Value(name, self.checked(TensorType, dtype, tuple(self.listed("]", self.size))))
        role = CacheType(self.take("word"))
        self.take("]")
        return Value(name, role)

    def size(self) -> Dim:
        token = self.take("number", "word")
        while self.accept("+"):
            token += "+" + self.take("number", "word")
        return int(token) if token.isdigit() else token

    def pair(self) -> tuple[str, AttrValue]:
        key = self.take("word")
        self.take("=")
        return key, self.attr()

    def attr(self) -> AttrValue:
        """Read an attribute."""
        kind = self.tokens[self.at][0]
        token = self.take("number", "string", "word", "(")
        if kind == "mark":
            return tuple(self.listed(")", self.attr))
        if kind == "word":
            return self.record(token) if self.accept("(") else _WORDS.get(token, token)
        try:
            whole = re.fullmatch(r"-?\d+", token)
            return int(token) if whole else json.loads(token) if kind == "string" else float(token)
        except ValueError:
            raise self.error(f"cannot read {token}", "escape as in JSON") from None

    def record(self, tag: str) -> Record:
        """Read the rest of a record, after its tag and the opening bracket."""
        if tag not in ATTRS:
            raise self.error(f"no attribute {tag}(...); {nearest(tag, ATTRS)}")
        given: dict[str, AttrValue] = {}
        self.listed(")", lambda: self.field(tag, given))
        known = fields(ATTRS[tag])
        lacking = [f.name for f in known if f.default is MISSING and f.name not in given]
        if lacking:
            raise self.error(f"{tag} lacks {' '.join(lacking)}", "give each a value")
        return self.checked(cast(Callable[..., Record], ATTRS[tag]), **given)

    def field(self, tag: str, given: dict[str, AttrValue]) -> None:
        """Read one field of a record; `sink 4: f32` gives two."""
        known = {f.name: f for f in fields(ATTRS[tag])}
        key = next(iter(known)) if len(known) == 1 else self.take("word")
        if key not in known or key in given:
            raise self.error(f"no field {key} here; {nearest(key, known)}", "give each field once")
        colon = tag == "tokens" and key != "flush"
        count = self.attr() if colon and key != "rest" else None
        if len(known) > 1:
            self.take(":" if colon else "=")
        value = self.attr()
        if colon and value in [*STORED]:
            value = Raw(cast(Any, value))
        if count is not None and given.setdefault("raw", value) != value:
            raise self.error("sink and recent have two formats", "store both in one")
        word = "none" if value is None and _says_none(known[key]) else value
        given[key] = word if count is None else count
