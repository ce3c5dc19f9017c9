"""What a recipe may not say, and the whole text of why not."""

from pathlib import Path

import pytest

from kvant.compiler import recipe as recipes
from kvant.ir.errors import KvantError

from .test_recipe import BASE, refusal


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(KvantError) as caught:
        recipes.load("kivi-3bit")
    error = caught.value
    assert error.code == "unknown-recipe"
    assert str(error) == (
        "there is no recipe 'kivi-3bit'\n"
        "  where: the recipe argument\n"
        "  fix: did you mean: kivi-4bit, kivi-2bit, split-2bit? `kvant show recipes` lists all; "
        "a path must end in .toml  [unknown-recipe]"
    )


def test_missing_file() -> None:
    with pytest.raises(KvantError) as caught:
        recipes.load("nowhere.toml")
    assert caught.value.code == "recipe-unreadable"
    assert caught.value.what == "the recipe file cannot be read: FileNotFoundError"


def test_not_toml(tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text("k = = 3")
    with pytest.raises(KvantError) as caught:
        recipes.load(file)
    assert caught.value.code == "recipe-syntax"


def test_unknown_key_at_the_top() -> None:
    error = refusal(BASE | {"rewrites": []})
    assert error.code == "unknown-key"
    assert error.what == "unknown key 'rewrites'"
    assert error.where == "mine.toml: rewrites"
    assert error.fix == (
        "did you mean rewrite? known keys: "
        "name, summary, source, compute, window, rewrite, k, v, rule"
    )


def test_unknown_key_in_a_stream() -> None:
    error = refusal(BASE | {"k": BASE["k"] | {"gruop": 32}})
    assert error.what == "unknown key 'gruop'"
    assert error.where == "mine.toml: k.gruop"
    assert error.fix.startswith("did you mean group? known keys: sink, recent, flush, format")


def test_a_key_misspelt_is_said_before_the_key_that_is_missed() -> None:
    stream = {k: v for k, v in BASE["k"].items() if k != "bits"} | {"bit": 4}
    error = refusal(BASE | {"k": stream})
    assert (error.code, error.what) == ("unknown-key", "unknown key 'bit'")
    assert error.where == "mine.toml: k.bit"
    assert error.fix.startswith("did you mean bits? known keys: ")


def test_an_unknown_key_of_another_table_does_not_hide_what_is_missing() -> None:
    stream = {k: v for k, v in BASE["k"].items() if k != "bits"}
    error = refusal(BASE | {"k": stream, "v": BASE["v"] | {"bit": 4}})
    assert str(error) == (
        "k.bits: field required\n"
        "  where: mine.toml\n"
        "  fix: docs/recipes.md lists every key  [recipe-value]"
    )


def test_a_file_may_not_call_another_recipe_by_the_name_of_ours(tmp_path: Path) -> None:
    ours, text = recipes.load("kivi-4bit")
    file = tmp_path / "mine.toml"
    file.write_text("# the same\n" + text)
    assert recipes.load(file)[0] == ours
    file.write_text(text.replace("bits = 4", "bits = 8"))
    with pytest.raises(KvantError) as caught:
        recipes.load(file)
    assert str(caught.value) == (
        "the name 'kivi-4bit' belongs to a recipe of kvant with other content\n"
        f"  where: {file}\n"
        "  fix: give your recipe a name of its own  [recipe-name]"
    )


def test_errors_name_the_file_of_a_recipe(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    recipe, _ = recipes.load("kivi-4bit")
    assert recipes.place(file, recipe) == recipes.place(str(file), recipe) == str(file)
    assert recipes.place("kivi-4bit", recipe) == "recipe kivi-4bit"
    assert recipes.place(recipe, recipe) == "recipe kivi-4bit"


def test_unknown_option_of_a_pass() -> None:
    error = refusal(BASE | {"rewrite": [{"pass": "smooth-k", "alpah": 0.5}]})
    assert str(error) == (
        "unknown key 'alpah'\n"
        "  where: mine.toml: rewrite 1, pass smooth-k\n"
        "  fix: did you mean alpha? known keys: pass, alpha  [unknown-key]"
    )


@pytest.mark.parametrize("name", ["store", "dead-code"])
def test_what_every_recipe_ends_with_cannot_be_asked_for(name: str) -> None:
    assert refusal(BASE | {"rewrite": [{"pass": name}]}).code == "unknown-pass"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("bits", "4", "k.bits: input should be a valid integer, got '4'"),
        ("bits", 4.0, "k.bits: input should be a valid integer, got 4.0"),
        ("bits", True, "k.bits: input should be a valid integer, got True"),
        ("sink", -1, "k.sink: input should be greater than or equal to 0, got -1"),
        ("format", "int3", "k: input tag 'int3' found"),
    ],
)
def test_values_are_never_repaired(key: str, value: object, message: str) -> None:
    error = refusal(BASE | {"k": BASE["k"] | {key: value}})
    assert error.code == "recipe-value"
    assert error.what.startswith(message)


def test_a_missing_key() -> None:
    assert refusal({k: v for k, v in BASE.items() if k != "v"}).what == "v: field required"


@pytest.mark.parametrize("name", ["../up", "a/b", "", "-x", "x" * 65])
def test_a_name_is_fit_for_a_file(name: str) -> None:
    assert refusal(BASE | {"name": name}).what.startswith("name: string should ")


def test_what_is_no_recipe() -> None:
    with pytest.raises(KvantError) as caught:
        recipes.load(4)  # type: ignore[arg-type]
    assert str(caught.value) == (
        "int is not a recipe\n"
        "  where: the recipe argument\n"
        "  fix: give the name of a recipe, the path of a .toml file, or a Recipe  [unknown-recipe]"
    )


def test_value_out_of_range() -> None:
    error = refusal(BASE | {"k": BASE["k"] | {"bits": 9}})
    assert error.code == "recipe-value"
    assert error.what == "k.bits: input should be less than or equal to 8, got 9"


def test_unknown_pass() -> None:
    error = refusal(BASE | {"rewrite": [{"pass": "chanel-reorder"}]})
    assert error.code == "unknown-pass"
    assert error.what == "there is no pass 'chanel-reorder'"
    assert error.where == "mine.toml: rewrite 1"
    assert error.fix == (
        "known passes: hadamard-qk, hadamard-v, smooth-k, sort-k, sort-v, threshold-k, threshold-v"
    )


def test_group_must_divide() -> None:
    recipe = recipes.parse(BASE | {"k": BASE["k"] | {"group": 48}}, "mine.toml")
    with pytest.raises(KvantError) as caught:
        recipes.tokens(recipe.k, 64, "mine.toml: k")
    assert str(caught.value) == (
        "groups of 48 do not divide 64 channels\n"
        "  where: mine.toml: k\n"
        "  fix: use one of: 1, 2, 4, 8, 16, 32, 64  [group-does-not-divide]"
    )


def test_selector_syntax() -> None:
    with pytest.raises(KvantError) as caught:
        recipes.matching_layers("first", 10, "r")
    assert caught.value.what == "'first' is not a layer or a range of layers"


def test_rule_that_matches_nothing() -> None:
    recipe = recipes.parse(BASE | {"rule": [{"layers": "30-40", "k": {"format": "f16"}}]}, "m")
    with pytest.raises(KvantError) as caught:
        recipes.streams_of(recipe, 30, "m")
    assert caught.value.code == "rule-matches-nothing"
    assert caught.value.what == "layers '30-40' match none of the model's 30 layers"
