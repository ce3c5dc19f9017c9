"""The tables [[k.slice]] of a recipe: what they become, and every refusal."""

import tomllib
from typing import Any

import pytest

from kvant.compiler import recipe as recipes
from kvant.compiler.driver import compile
from kvant.ir.encodings import Bfp, Drop, Int, Raw, Slice, Slices, Tokens
from kvant.ir.errors import KvantError

INT: dict[str, Any] = {"format": "int", "bits": 2, "axis": "channel", "group": 32}


def parse(*slices: dict[str, Any], **stream: Any) -> recipes.Recipe:
    k = {"format": "slices", "slice": list(slices)} | stream
    return recipes.parse({"name": "mine", "k": k, "v": {"format": "bf16"}}, "mine.toml")


def bound(*slices: dict[str, Any], channels: int = 64) -> Tokens:
    return recipes.tokens(parse(*slices).k, channels, "mine.toml: k")


def refusal(*slices: dict[str, Any], **stream: Any) -> KvantError:
    with pytest.raises(KvantError) as caught:
        recipes.tokens(parse(*slices, **stream).k, 64, "mine.toml: k")
    return caught.value


def test_slices_of_every_format() -> None:
    text = """
        name = "mine"
        [k]
        format = "slices"
        sink = 4
        recent = 64
        flush = "block"
        [[k.slice]]
        channels = 16
        format = "drop"
        [[k.slice]]
        channels = "rest"
        format = "int"
        bits = 2
        axis = "token"
        group = "slice"
        zero = "int"
        params = "bf16"
        clip = 0.9
        [[k.slice]]
        channels = 32
        format = "bfp"
        mantissa = 4
        block = "slice"
        [[k.slice]]
        channels = 16
        format = "f16"
        [v]
        format = "bf16"
    """
    recipe = recipes.parse(tomllib.loads(text), "mine.toml")
    assert recipes.tokens(recipe.k, 128, "k") == Tokens(
        Slices(
            (
                Slice(16, Drop()),
                Slice(64, Int(2, "token", 64, "int", "bf16", 0.9)),
                Slice(32, Bfp(4, 32)),
                Slice(16, Raw("f16")),
            )
        ),
        sink=4,
        recent=64,
        flush="block",
    )
    assert recipes.parse(tomllib.loads(recipes.load(recipe)[1]), "m") == recipe


def test_the_rest_is_what_the_others_leave() -> None:
    for channels in (64, 128, 256):
        tables = INT | {"channels": "rest"}, INT | {"channels": 16, "bits": 8}
        fmt = bound(*tables, channels=channels).rest
        assert isinstance(fmt, Slices)
        assert [part.width for part in fmt.slices] == [channels - 16, 16]


@pytest.mark.parametrize(
    ("widths", "fix"),
    [
        ((40, 24), ""),
        ((32, 16), ""),
        ((80,), ""),
        ((8, "rest"), ""),
        (("rest", "rest"), '; one slice may take the "rest"'),
        ((64, "rest"), '; one slice may take the "rest"'),
        ((-16, "rest"), '; one slice may take the "rest"'),
        ((0, "rest"), '; one slice may take the "rest"'),
    ],
)
def test_slices_that_do_not_make_up_the_head(widths: tuple[int | str, ...], fix: str) -> None:
    error = refusal(*(INT | {"channels": width} for width in widths))
    shown = " + ".join(map(str, (8, 56) if widths == (8, "rest") else widths))
    assert str(error) == (
        f"slices of {shown} channels do not make up a head of 64\n"
        "  where: mine.toml: k\n"
        f"  fix: use multiples of 16 channels that sum to 64{fix}  [slices-do-not-fit]"
    )


def test_a_group_must_divide_its_slice() -> None:
    error = refusal(INT | {"channels": "rest", "axis": "token"}, {"channels": 16, "format": "drop"})
    assert str(error) == (
        "groups of 32 do not divide 48 channels\n"
        "  where: mine.toml: k: slice 0\n"
        "  fix: use one of: 1, 2, 3, 4, 6, 8, 12, 16, 24, 48  [group-does-not-divide]"
    )


@pytest.mark.parametrize(
    ("key", "place", "hint"),
    [
        ("gruop", "k.slice.0.gruop", "did you mean group? "),
        ("channel", "k.slice.0.channel", "did you mean channels? "),
        ("recent", "k.slice.0.recent", ""),
    ],
)
def test_an_unknown_key_of_a_slice(key: str, place: str, hint: str) -> None:
    error = refusal(INT | {"channels": 64, key: 3})
    assert str(error) == (
        f"unknown key '{key}'\n"
        f"  where: mine.toml: {place}\n"
        f"  fix: {hint}known keys: channels, format, bits, axis, group, zero, params, clip, sparse"
        "  [unknown-key]"
    )


def test_keys_of_another_format_and_of_the_stream() -> None:
    dropped = refusal({"channels": 16, "format": "drop", "bits": 2})
    assert dropped.fix == "known keys: channels, format"
    stream = refusal(INT | {"channels": 64}, slcie=1)
    assert stream.fix == "did you mean slice? known keys: sink, recent, flush, format, slice"
    assert refusal(INT | {"channels": 64}, bits=2).where == "mine.toml: k.bits"


@pytest.mark.parametrize(
    ("slices", "what"),
    [
        ((INT,), "k.slice.0.channels: field required"),
        (({"channels": 64},), "k.slice.0.format: field required"),
        ((INT | {"channels": "some"},), "k.slice.0.channels: input should be a valid integer"),
        ((INT | {"channels": 16.0},), "k.slice.0.channels: input should be a valid integer"),
        ((INT | {"channels": 64, "group": "head"},), "k.slice.0.group: input should be a valid"),
        ((), "k.slice: tuple should have at least 1 item"),
    ],
)
def test_values_of_a_slice(slices: tuple[dict[str, Any], ...], what: str) -> None:
    error = refusal(*slices)
    assert error.code == "recipe-value"
    assert error.what.startswith(what)


def test_a_stream_of_slices_needs_its_format() -> None:
    data = {"name": "mine", "k": {"slice": [INT | {"channels": 64}]}, "v": {"format": "bf16"}}
    with pytest.raises(KvantError) as caught:
        recipes.parse(data, "mine.toml")
    assert str(caught.value) == (
        "k.format: field required\n"
        "  where: mine.toml\n"
        "  fix: docs/recipes.md lists every key  [recipe-value]"
    )


def test_slices_that_are_all_dropped_or_all_raw_are_refused(make_model: Any, tmp_path: Any) -> None:
    assert refusal({"channels": "rest", "format": "drop"}).what == "every slice is dropped"
    recipe = parse({"channels": "rest", "format": "f32"}, {"channels": 16, "format": "bf16"})
    module = make_model("llama", head_dim=64)
    with pytest.raises(KvantError) as caught:
        compile(module, recipe, targets=("reference",), out=tmp_path / "x")
    assert caught.value.what == "every slice of the channels is raw"
    assert caught.value.fix == "use one raw format for all channels, or give a slice fewer bits"
    assert caught.value.code == "quantizes-nothing"
