"""Recipes: TOML that becomes frozen records. An unknown key is an error, never a default.

A recipe says which exact rewrites to apply, how keys and values are stored, and which layers
differ. Shapes are not known here; `tokens(stream, channels, where)` binds a stream to a head width.
"""

import difflib
import inspect
import json
import tomllib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from ..ir.arrays import STORED
from ..ir.encodings import Format, Tokens
from ..ir.errors import KvantError
from ..passes import PASSES
from .extras import need
from .recipe_formats import (
    SLICES,
    AnySlice,
    BfpTable,
    IntTable,
    LutTable,
    RawTable,
    SparseTable,
    Table,
    bind_slices,
)

try:
    from pydantic import BaseModel, ConfigDict, Field, ValidationError
except ModuleNotFoundError:
    need("pydantic")
    raise

DEFAULT = "kivi-4bit"
# Every recipe ends with these two: [k] and [v] are what `store` is given.
ADDED_BY_KVANT = {"store", "dead-code"}


class _Window(Table):
    sink: int = Field(default=0, ge=0)
    recent: int = Field(default=0, ge=0)
    flush: Literal["group", "block"] = "group"


class RawStream(RawTable, _Window):
    """Tokens kept in a floating-point dtype."""


class IntStream(IntTable, _Window):
    """Affine integers; `group = "head"` means one group over the whole head."""

    group: int | Literal["head"]


class BfpStream(BfpTable, _Window):
    """Block floating point; `block = "head"` means one block over the whole head."""

    block: int | Literal["head"]


class LutStream(LutTable, _Window):
    """Codes into a table; `group = "head"` means one group over the whole head."""

    group: int | Literal["head"]


class SlicesStream(_Window):
    """Channels in storage order, cut in slices that are stored each in its own way."""

    format: Literal["slices"]
    slice: tuple[AnySlice, ...] = Field(min_length=1)

    def bind(self, channels: int, where: str) -> Format:
        """Return the format for heads of `channels` channels."""
        return bind_slices(self.slice, channels, where)


AnyStream = RawStream | IntStream | BfpStream | LutStream | SlicesStream
Stream = Annotated[AnyStream, Field(discriminator="format")]


class Rewrite(BaseModel):
    """One pass with its options; the pass itself checks them."""

    model_config = ConfigDict(frozen=True, extra="allow", populate_by_name=True)
    name: str = Field(alias="pass")

    @property
    def options(self) -> dict[str, Any]:
        """Keyword options of the pass."""
        return dict(self.model_extra or {})


class Rule(Table):
    """Layers that differ. The first rule that names a layer wins."""

    layers: str
    k: Stream | None = None
    v: Stream | None = None


class Recipe(Table):
    """A method, as data. `window` says what becomes of layers that have a sliding window."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)
    summary: str = ""
    source: str = ""
    compute: Literal["int", "float"] = "float"
    window: Literal["keep", "quantize"] = "keep"
    rewrite: tuple[Rewrite, ...] = ()
    k: Stream
    v: Stream
    rule: tuple[Rule, ...] = ()


def tokens(stream: AnyStream, channels: int, where: str) -> Tokens:
    """Bind a stream of a recipe to heads of `channels` channels.

    Raises: KvantError if a group or block does not divide the head, or slices do not make it up.
    """
    bound = stream.bind(channels, where)
    bound.check(channels, where)
    return Tokens(rest=bound, sink=stream.sink, recent=stream.recent, flush=stream.flush)


def names() -> tuple[str, ...]:
    """Return the names of the recipes that come with kvant, sorted."""
    folder = resources.files("kvant.compiler") / "recipes"
    return tuple(sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".toml")))


def load(recipe: str | Path | Recipe) -> tuple[Recipe, str]:
    """Return a recipe and its TOML text.

    Args:
        recipe: the name of a recipe that comes with kvant, a path to a .toml file, or a record.

    Raises: KvantError for an unknown name, unreadable TOML, an unknown key or pass, or a file
        that calls another recipe by the name of one of ours.
    """
    if isinstance(recipe, Recipe):
        tomli_w = need("tomli_w")
        return recipe, str(tomli_w.dumps(recipe.model_dump(by_alias=True, exclude_none=True)))
    text, where = _read(recipe)
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise KvantError(
            "recipe-syntax", f"this is not TOML: {error}", where=where, fix="correct that line"
        ) from None
    loaded = parse(data, where)
    if Path(recipe).suffix == ".toml" and loaded.name in names() and loaded != load(loaded.name)[0]:
        raise KvantError(
            "recipe-name",
            f"the name {loaded.name!r} belongs to a recipe of kvant with other content",
            where=where,
            fix="give your recipe a name of its own",
        )
    return loaded, text


def place(given: str | Path | Recipe, recipe: Recipe) -> str:
    """Return how errors name a recipe: by its file if one was given, else by its name."""
    if isinstance(given, str | Path) and Path(given).suffix == ".toml":
        return str(given)
    return f"recipe {recipe.name}"


def parse(data: dict[str, Any], where: str) -> Recipe:
    """Return the record of a recipe given as a dictionary."""
    try:
        # From JSON, because strict mode then takes lists for tuples, and still no "4" for 4.
        recipe = Recipe.model_validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        raise _refusal(error, where) from None
    for index, rewrite in enumerate(recipe.rewrite, 1):
        _check_rewrite(rewrite, f"{where}: rewrite {index}")
    return recipe


def _check_rewrite(rewrite: Rewrite, where: str) -> None:
    """Refuse a pass or an option that does not exist. Values are checked by the pass itself."""
    known = sorted(PASSES.keys() - ADDED_BY_KVANT)
    if rewrite.name not in known:
        raise KvantError(
            "unknown-pass",
            f"there is no pass {rewrite.name!r}",
            where=where,
            fix=_nearest(rewrite.name, known, "passes"),
        )
    signature = inspect.signature(PASSES[rewrite.name].run).parameters.values()
    options = [p.name for p in signature if p.kind is inspect.Parameter.KEYWORD_ONLY]
    for key in rewrite.options:
        if key not in options:
            raise KvantError(
                "unknown-key",
                f"unknown key {key!r}",
                where=f"{where}, pass {rewrite.name}",
                fix=_nearest(key, ["pass", *options], "keys"),
            )


def _nearest(word: str, known: Sequence[str], kind: str) -> str:
    """Return "did you mean a or b? known kind: a, b, c"; the question only if something is near."""
    near = difflib.get_close_matches(word, known, n=2)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"{hint}known {kind}: {', '.join(known)}"


def _read(recipe: str | Path) -> tuple[str, str]:
    if not isinstance(recipe, str | Path):
        raise KvantError(
            "unknown-recipe",
            f"{type(recipe).__name__} is not a recipe",
            where="the recipe argument",
            fix="give the name of a recipe, the path of a .toml file, or a Recipe",
        )
    path = Path(recipe)
    if path.suffix == ".toml":
        try:
            return path.read_text(encoding="utf-8"), str(recipe)
        except (OSError, UnicodeDecodeError) as error:
            raise KvantError(
                "recipe-unreadable",
                f"the recipe file cannot be read: {error.__class__.__name__}",
                where=str(recipe),
                fix=f"give a readable .toml file, or one of: {', '.join(names())}",
            ) from None
    if str(recipe) in names():
        file = resources.files("kvant.compiler") / "recipes" / f"{recipe}.toml"
        return file.read_text(encoding="utf-8"), f"recipe {recipe}"
    near = difflib.get_close_matches(str(recipe), names(), n=3, cutoff=0.3) or names()
    raise KvantError(
        "unknown-recipe",
        f"there is no recipe {str(recipe)!r}",
        where="the recipe argument",
        fix=f"did you mean: {', '.join(near)}? `kvant show recipes` lists all; "
        "a path must end in .toml",
    )


def _refusal(error: ValidationError, where: str) -> KvantError:
    """Turn the first problem pydantic found into our own error.

    Where a table lacks a key and has one too many, the latter is likely the former, misspelt.
    """
    problems = error.errors()
    table = problems[0]["loc"][:-1]
    unknown = [p for p in problems if p["type"] == "extra_forbidden" and p["loc"][:-1] == table]
    problem = unknown[0] if unknown and problems[0]["type"] == "missing" else problems[0]
    tags = {"slices", *SLICES}
    place = ".".join(str(p) for p in problem["loc"] if p not in tags)
    if problem["type"] == "extra_forbidden":
        key = str(problem["loc"][-1])
        return KvantError(
            "unknown-key",
            f"unknown key {key!r}",
            where=f"{where}: {place}",
            fix=_nearest(key, _keys(problem["loc"]), "keys"),
        )
    if problem["type"] == "union_tag_not_found":
        place, problem = f"{place}.format", {**problem, "type": "missing", "msg": "Field required"}
    given = "" if problem["type"] == "missing" else f", got {problem.get('input')!r}"
    return KvantError(
        "recipe-value",
        f"{place}: {problem['msg'][0].lower()}{problem['msg'][1:]}{given}",
        where=where,
        fix="docs/recipes.md lists every key",
    )


def _keys(loc: tuple[int | str, ...]) -> list[str]:
    """Return the keys that are legal where `loc` points."""
    models: dict[str, type[BaseModel]] = {"rule": Rule, "slices": SlicesStream}
    models |= {"sparse": SparseTable, **dict.fromkeys(STORED, RawStream)}
    models |= {"int": IntStream, "bfp": BfpStream, "lut": LutStream}
    if "slice" in loc:
        models |= SLICES
    for part in reversed(loc[:-1]):
        if part in models:
            return list(models[str(part)].model_fields)
    return list(Recipe.model_fields)


def matching_layers(selector: str, layers: int, where: str) -> frozenset[int]:
    """Return the layers named by a selector such as "0-3, 7, -1".

    Raises: KvantError if the selector is malformed or matches no layer of the model.
    """
    chosen: set[int] = set()
    for part in selector.split(","):
        text = part.strip()
        # A leading minus counts from the end; it never begins a range.
        first, dash, last = (text, "", "") if text.startswith("-") else text.partition("-")
        try:
            low = int(first)
            high = int(last) if dash else low
        except ValueError:
            raise KvantError(
                "layer-selector",
                f"{text!r} is not a layer or a range of layers",
                where=where,
                fix='write layers like "0-3, 7, -1" (negative counts from the end)',
            ) from None
        low, high = (n + layers if n < 0 else n for n in (low, high))
        chosen.update(n for n in range(low, high + 1) if 0 <= n < layers)
    if not chosen:
        raise KvantError(
            "rule-matches-nothing",
            f"layers {selector!r} match none of the model's {layers} layers",
            where=where,
            fix=f"name layers from 0 to {layers - 1}, or remove the rule",
        )
    return frozenset(chosen)


def streams_of(recipe: Recipe, layers: int, where: str) -> list[tuple[AnyStream, AnyStream]]:
    """Return the (k, v) streams of every layer, after the rules.

    Raises: KvantError if a rule matches no layer or is hidden by earlier rules.
    """
    chosen = [(recipe.k, recipe.v)] * layers
    taken: set[int] = set()
    for index, rule in enumerate(recipe.rule, 1):
        place = f"{where}: rule {index}"
        new = matching_layers(rule.layers, layers, place) - taken
        if not new:
            raise KvantError(
                "rule-matches-nothing",
                f"every layer of {rule.layers!r} is taken by an earlier rule",
                where=place,
                fix="order the rules from special to general: the first match wins",
            )
        for layer in new:
            chosen[layer] = (rule.k or recipe.k, rule.v or recipe.v)
        taken |= new
    return chosen
