"""Shipped recipes through `new_cache`: bytes are what the plan says (E11), windows KIVI's (E3)."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvant.compiler import recipe as recipes
from kvant.compiler.driver import compile
from kvant.ir.arrays import Array
from kvant.runtime.artifact import Artifact
from kvant.runtime.launch_reference import read_stream

Compiled = Callable[[str], Artifact]
LENGTHS = [0, 1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257, 300]
R = 128  # KIVI's window


@pytest.fixture(scope="module")
def compiled(make_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """Return compiled(recipe): the artifact of a small random model with heads of 64 channels."""
    module = make_model("llama", head_dim=64, max_position_embeddings=1024)
    folder: Path = tmp_path_factory.mktemp("recipes")

    @functools.cache
    def made(recipe: str) -> Artifact:
        return compile(module, recipe, targets=("reference",), out=folder / recipe)

    return made


def tokens_for(artifact: Artifact, count: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(count)
    plan = artifact.plans[0]
    k, v = (
        rng.normal(size=(1, s.heads, count, s.channels)).astype(np.float32)
        for s in (plan.k, plan.v)
    )
    k[..., 3] *= 8
    return k, v


def filled(artifact: Artifact, k: Array, v: Array, *ends: int) -> Any:
    """A cache of one row, appended to up to each of `ends` in turn, then flushed."""
    cache = artifact.new_cache(max_tokens=512)
    for begin, end in zip((0, *ends), ends, strict=False):
        for layer in range(artifact.layer_count):
            cache.append(layer, k[:, :, begin:end], v[:, :, begin:end])
    cache.flush()
    return cache


@pytest.mark.parametrize("recipe", recipes.names())
def test_bytes_in_use_are_what_the_plan_says(
    recipe: str, compiled: Compiled, record_property: Callable[[str, object], None]
) -> None:
    artifact = compiled(recipe)
    streams = [stream for plan in artifact.plans for stream in (plan.k, plan.v)]
    k, v = tokens_for(artifact, 300)
    for length in LENGTHS:
        want = sum(stream.bytes(length) for stream in streams)
        assert filled(artifact, k, v, length).bytes() == want, length
        assert filled(artifact, k, v, length // 3, length // 2, length).bytes() == want, length
        bits = sum(s.bits_per_element(length) * length * s.heads * s.channels for s in streams)
        assert bits == pytest.approx(8 * want, rel=1e-12)
    record_property("cases of bytes of a recipe's cache, equal to the plan's", len(LENGTHS))


@pytest.mark.parametrize("recipe", ["kivi-2bit", "kivi-4bit"])
@pytest.mark.parametrize(
    ("length", "k_end", "v_end"),
    [(R - 1, 0, 0), (R, R, 0), (R + 1, R, 1), (2 * R - 1, R, R - 1), (2 * R, 2 * R, R)],
)
def test_kivi_windows(recipe: str, compiled: Compiled, length: int, k_end: int, v_end: int) -> None:
    """What is older than the window reads as encoded, the rest bit for bit as given."""
    artifact = compiled(recipe)
    given = tokens_for(artifact, length)
    for stream, x, end in zip(
        filled(artifact, *given, length).layers[1].streams, given, (k_end, v_end), strict=True
    ):
        rest, read = stream.plan.tokens.rest, read_stream(stream)
        assert stream.encoded.tolist() == [end]
        assert np.array_equal(read[:, :, :end], rest.roundtrip(x[:, :, :end].astype(np.float64)))
        assert np.array_equal(read[:, :, end:], x[:, :, end:])
        assert not end or not np.array_equal(read[:, :, :end], x[:, :, :end])


@pytest.mark.parametrize("recipe", ["kivi-2bit", "kivi-4bit"])
def test_kivi_keys_go_as_a_block_and_values_one_by_one(recipe: str, compiled: Compiled) -> None:
    artifact = compiled(recipe)
    k, v = tokens_for(artifact, 2 * R + 3)
    cache = artifact.new_cache(max_tokens=512)
    ends = []
    for at in range(2 * R + 3):
        cache.append(0, k[:, :, [at]], v[:, :, [at]])
        ends.append([int(stream.encoded[0]) for stream in cache.layers[0].streams])
    # An append encodes what was due before it.
    assert ends == [[at // R * R, max(0, at - R)] for at in range(2 * R + 3)]


@pytest.mark.parametrize("recipe", ["kivi-2bit", "kivi-4bit"])
def test_kivi_codes_are_packed_lowest_bits_first(recipe: str, compiled: Compiled) -> None:
    """Byte j has channel j in its lowest bits, then j + C / n, for n codes a byte."""
    artifact = compiled(recipe)
    given = tokens_for(artifact, 2 * R)
    cache = filled(artifact, *given, 2 * R)
    for stream, x in zip(cache.layers[0].streams, given, strict=True):
        rest, channels = stream.plan.tokens.rest, stream.plan.channels
        group = stream.plan.tokens.group_tokens
        want = rest.encode(x[:, 0, :group].astype(np.float64))["codes"][0, 0]
        (codes,) = (field for field in stream.layout.fields if field.name == "codes")
        first = stream.pages[stream.table[0, 0]][codes.offset :][: channels * rest.bits // 8]
        shifts = np.arange(0, 8, rest.bits)[:, None]
        assert np.array_equal((first >> shifts & (2**rest.bits - 1)).reshape(-1), want)
