"""Recipes are data, and silence is a bug."""

import inspect
import re
import tomllib
from pathlib import Path

import pytest

from kvant.compiler import recipe as recipes
from kvant.ir.encodings import Bfp, Drop, Int, Lut, Slice, Slices, Sparse, Tokens
from kvant.ir.encodings.lut import LLOYD, NF4
from kvant.ir.errors import KvantError
from kvant.passes import PASSES

DOCS = Path(recipes.__file__).parents[1] / "docs" / "recipes.md"

BASE = {
    "name": "mine",
    "k": {"format": "int", "bits": 4, "axis": "token", "group": "head"},
    "v": {"format": "bf16"},
}


def refusal(data: dict) -> KvantError:
    with pytest.raises(KvantError) as caught:
        recipes.parse(data, "mine.toml")
    return caught.value


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_of_ours_binds_to_heads_of_64_and_128(name: str) -> None:
    recipe, text = recipes.load(name)
    assert recipe.name == name
    assert recipe.summary
    assert recipe.source
    assert f'name = "{name}"' in text
    for channels in (64, 128):
        assert isinstance(recipes.tokens(recipe.k, channels, "k"), Tokens)
        assert isinstance(recipes.tokens(recipe.v, channels, "v"), Tokens)


def test_the_names_of_the_contract() -> None:
    expected = (
        "dense-sparse-4bit int4-token int8-token kivi-2bit kivi-4bit ksort-bfp qserve-kv4 "
        "quarot-kv2 quarot-kv4 split-2bit nf4 turboquant-4bit"
    )
    assert set(expected.split()) <= set(recipes.names())
    assert recipes.DEFAULT == "kivi-4bit"


def test_kivi_is_what_the_paper_says() -> None:
    recipe, _ = recipes.load("kivi-2bit")
    k, v = (recipes.tokens(s, 64, "t") for s in (recipe.k, recipe.v))
    assert k == Tokens(rest=Int(2, "channel", 32, "float"), recent=128, flush="block")
    assert v == Tokens(rest=Int(2, "token", 32, "float"), recent=128, flush="group")


def per_head(bits: int, zero: str) -> Tokens:
    return Tokens(rest=Int(bits, "token", 64, zero))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "rewrites", "both"),
    [
        ("int8-token", [], per_head(8, "none")),
        ("int4-token", [], per_head(4, "float")),
        ("quarot-kv4", ["hadamard-v", "hadamard-qk"], per_head(4, "float")),
        ("quarot-kv2", ["hadamard-v", "hadamard-qk"], per_head(2, "float")),
        ("qserve-kv4", ["smooth-k"], per_head(4, "float")),
        ("nf4", [], Tokens(Lut(4, 64, NF4))),
        ("turboquant-4bit", ["hadamard-v", "hadamard-qk"], Tokens(Lut(4, 64, *LLOYD[4]))),
    ],
)
def test_token_recipes_are_what_they_say(name: str, rewrites: list[str], both: Tokens) -> None:
    recipe, _ = recipes.load(name)
    assert [r.name for r in recipe.rewrite] == rewrites
    assert [recipes.tokens(s, 64, "t") for s in (recipe.k, recipe.v)] == [both, both]
    assert recipe.compute == "int"


def test_smoothing_takes_the_square_root_as_qserve_does() -> None:
    assert recipes.load("qserve-kv4")[0].rewrite[0].options == {"alpha": 0.5}


def test_ksort_is_what_the_paper_says() -> None:
    recipe, _ = recipes.load("ksort-bfp")
    assert [r.name for r in recipe.rewrite] == ["sort-k"]
    assert recipes.tokens(recipe.k, 64, "t").rest == Bfp(4, 32)


def test_split_keeps_the_outliers_of_keys_at_8_bits_and_the_rest_at_2() -> None:
    recipe, _ = recipes.load("split-2bit")
    assert [(r.name, r.options) for r in recipe.rewrite] == [
        ("sort-k", {"key": "fisher"}),
        ("hadamard-v", {}),
    ]
    for channels in (64, 128):
        k, v = (recipes.tokens(s, channels, "t") for s in (recipe.k, recipe.v))
        outliers, rest = Int(8, "channel", 64), Int(2, "channel", 64)
        parts = ((16, Drop()), (channels - 32, rest), (16, outliers))
        assert k == Tokens(Slices(tuple(Slice(*part) for part in parts)), sink=4)
        assert v == Tokens(Int(2, "token", 64), sink=4, recent=16)


def test_dense_sparse_keeps_the_largest_of_each_token_beside_4_bits() -> None:
    recipe, _ = recipes.load("dense-sparse-4bit")
    assert recipe.rewrite == ()
    k, v = (recipes.tokens(s, 128, "t") for s in (recipe.k, recipe.v))
    assert k == Tokens(Sparse(Int(4, "channel", 64), 1), sink=4)
    assert v == Tokens(Sparse(Int(4, "token", 128), 1), sink=4)


def test_sparse_entries_of_a_stream_and_of_a_slice() -> None:
    sparse = {"count": 3, "limit": 2, "values": "bf16"}
    int_k = {"format": "int", "bits": 4, "axis": "token", "group": 16, "sparse": sparse}
    bfp = {"format": "bfp", "mantissa": 4, "block": "slice", "channels": "rest", "sparse": sparse}
    drop = {"format": "drop", "channels": 16}
    data = {"name": "mine", "k": int_k, "v": {"format": "slices", "slice": [drop, bfp]}}
    recipe = recipes.parse(data, "mine.toml")
    k, v = (recipes.tokens(s, 64, "t").rest for s in (recipe.k, recipe.v))
    assert k == Sparse(Int(4, "token", 16), 3, 2.0, "bf16")
    assert v == Slices((Slice(16, Drop()), Slice(48, Sparse(Bfp(4, 48), 3, 2.0, "bf16"))))
    assert recipes.parse(tomllib.loads(recipes.load(recipe)[1]), "m") == recipe


def test_an_unknown_key_of_sparse_entries() -> None:
    k = {"format": "int", "bits": 4, "axis": "token", "group": 16, "sparse": {"cuont": 1}}
    with pytest.raises(KvantError) as caught:
        recipes.parse(BASE | {"k": k}, "mine.toml")
    assert str(caught.value) == (
        "unknown key 'cuont'\n"
        "  where: mine.toml: k.sparse.cuont\n"
        "  fix: did you mean count? known keys: count, limit, values  [unknown-key]"
    )


LUT = {"format": "lut", "bits": 2, "group": "head", "table": [-9, -2, 2, 9]}


def lut_of(channels: int = 64, **changes: object) -> object:
    recipe = recipes.parse(BASE | {"k": LUT | changes}, "mine.toml")
    assert recipes.parse(tomllib.loads(recipes.load(recipe)[1]), "m") == recipe
    return recipes.tokens(recipe.k, channels, "t").rest


def test_tables_of_codes_by_name_and_by_list() -> None:
    assert lut_of() == Lut(2, 64, (-9, -2, 2, 9))
    assert lut_of(sigmas=2, params="bf16") == Lut(2, 64, (-9, -2, 2, 9), 2.0, "bf16")
    assert lut_of(bits=4, table="nf4", group=16) == Lut(4, 16, NF4)
    assert lut_of(bits=4, table="nf4", group=16, sigmas=2.5) == Lut(4, 16, NF4, 2.5)
    assert lut_of(bits=3, table="lloyd") == Lut(3, 64, *LLOYD[3])
    assert lut_of(bits=3, table="lloyd", sigmas=2.0) == Lut(3, 64, LLOYD[3][0], 2.0)
    assert lut_of(sparse={"count": 1}) == Sparse(Lut(2, 64, (-9, -2, 2, 9)), 1)
    slices = [LUT | {"group": "slice", "channels": 16}, {"format": "bf16", "channels": "rest"}]
    recipe = recipes.parse(BASE | {"k": {"format": "slices", "slice": slices}}, "mine.toml")
    assert recipes.tokens(recipe.k, 64, "t").rest.slices[0].format == Lut(2, 16, (-9, -2, 2, 9))


@pytest.mark.parametrize(
    ("changes", "what", "fix"),
    [
        ({"table": "nf4"}, "a table of 16 entries", "give 4 of them"),
        ({"table": [3, 2, 1, 0]}, "table is (3, 2, 1, 0)", "sort the entries, each one once"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(changes: dict, what: str, fix: str) -> None:
    with pytest.raises(KvantError) as caught:
        lut_of(**changes)
    assert str(caught.value) == f"{what}\n  where: lut\n  fix: {fix}  [bad-encoding]"


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"bits": 8}, "k.bits: input should be less than or equal to 4, got 8"),
        ({"table": "nf3"}, "k.table"),
        ({"table": [-9, -2, 2.5, 9]}, "k.table"),
        ({"sigmas": 0}, "k.sigmas: input should be greater than 0, got 0"),
    ],
)
def test_values_of_a_table_are_checked(changes: dict, what: str) -> None:
    error = refusal(BASE | {"k": LUT | changes})
    assert error.code == "recipe-value"
    assert error.what.startswith(what)


def test_an_unknown_key_of_a_table_of_codes() -> None:
    error = refusal(BASE | {"k": LUT | {"tabel": "nf4"}})
    assert error.fix == (
        "did you mean table? known keys: sink, recent, flush, format, bits, group, table, sigmas, "
        "params, sparse"
    )


def test_head_means_the_whole_head() -> None:
    recipe = recipes.parse(BASE, "mine.toml")
    assert recipes.tokens(recipe.k, 80, "t").rest == Int(4, "token", 80, "float")


def test_the_example_of_the_docs_does_what_its_heading_says() -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", DOCS.read_text(), re.DOTALL)
    recipe = recipes.parse(tomllib.loads(example), "docs/recipes.md")
    kivi, _ = recipes.load("kivi-2bit")
    first, *rest, last = recipes.streams_of(recipe, 30, "docs/recipes.md")
    assert set(rest) == {(kivi.k, kivi.v)}
    for stream in (*first, *last):
        assert recipes.tokens(stream, 64, "t") == Tokens(rest=Int(8, "token", 64, "none"))


def test_the_docs_name_every_key_and_pass() -> None:
    text = DOCS.read_text()
    tables = (recipes.Recipe, *recipes.SLICES.values(), recipes.IntStream, recipes.SlicesStream)
    tables = (*tables, recipes.RawStream, recipes.BfpStream, recipes.LutStream, recipes.Rule)
    for key in {key for table in tables for key in table.model_fields} - {"k", "v"}:
        assert re.search(rf"^\| `(\[\[)?{key}(\]\])?` ", text, re.MULTILINE), key
    for name in PASSES.keys() - recipes.ADDED_BY_KVANT:
        options = inspect.signature(PASSES[name].run).parameters.values()
        for option in [p.name for p in options if p.kind is inspect.Parameter.KEYWORD_ONLY]:
            assert f'| `"{name}"` | `{option}`' in text
        assert f'| `"{name}"` | ' in text


def test_a_record_goes_through_toml_unchanged() -> None:
    rules = [{"layers": "0, -1", "k": {"format": "bfp", "mantissa": 4, "block": 32}}]
    data = BASE | {"rule": rules, "rewrite": [{"pass": "smooth-k", "alpha": 0.25}]}
    recipe = recipes.parse(data, "m")
    same, text = recipes.load(recipe)
    assert same is recipe
    assert recipes.parse(tomllib.loads(text), "m") == recipe


@pytest.mark.parametrize(
    ("selector", "expected"),
    [("0", {0}), ("-1", {9}), ("0-2, 7, -1", {0, 1, 2, 7, 9}), ("8-20", {8, 9})],
)
def test_selectors(selector: str, expected: set[int]) -> None:
    assert recipes.matching_layers(selector, 10, "r") == expected


def test_first_rule_wins_and_a_hidden_rule_is_an_error() -> None:
    rules = [{"layers": "0", "k": {"format": "f16"}}, {"layers": "0-1", "v": {"format": "f16"}}]
    recipe = recipes.parse(BASE | {"rule": rules}, "m")
    chosen = recipes.streams_of(recipe, 3, "m")
    assert [(k.format, v.format) for k, v in chosen] == [
        ("f16", "bf16"),
        ("int", "f16"),
        ("int", "bf16"),
    ]
    hidden = recipes.parse(BASE | {"rule": [*rules, {"layers": "1", "k": {"format": "f32"}}]}, "m")
    with pytest.raises(KvantError) as caught:
        recipes.streams_of(hidden, 3, "m")
    assert caught.value.what == "every layer of '1' is taken by an earlier rule"
