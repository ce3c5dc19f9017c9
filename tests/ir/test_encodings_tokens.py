"""Tokens: what is in the window at which length, what reading gives, and the lints."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvant.ir.encodings import Bfp, Int, Raw, Tokens
from kvant.ir.errors import KvantError

R = 128
KIVI_K = Tokens(Int(2, "channel", 32), recent=R, flush="block")
KIVI_V = Tokens(Int(2, "token", 32), recent=R)


def raw_positions(tokens, length):
    end = tokens.encoded_end(length)
    return [*range(min(tokens.sink, length)), *range(end, length)]


@pytest.mark.parametrize(
    ("length", "first_raw"),
    [(0, 0), (1, 0), (R - 1, 0), (R, R), (R + 1, R), (2 * R - 1, R), (2 * R, 2 * R)],
)
def test_kivi_keys_are_encoded_as_a_block(length, first_raw):
    assert raw_positions(KIVI_K, length) == list(range(first_raw, length))


@pytest.mark.parametrize(
    ("length", "first_raw"),
    [(0, 0), (R - 1, 0), (R, 0), (R + 1, 1), (R + 2, 2), (2 * R, R)],
)
def test_kivi_values_leave_the_window_one_by_one(length, first_raw):
    assert raw_positions(KIVI_V, length) == list(range(first_raw, length))


@pytest.mark.parametrize(
    ("length", "end"),
    [(0, 4), (3, 4), (4, 4), (4 + 64 + 31, 4), (4 + 64 + 32, 36), (4 + 64 + 64, 68), (1000, 932)],
)
def test_groups_leave_the_window_whole_and_after_the_sinks(length, end):
    assert Tokens(Int(4, "channel", 32), sink=4, recent=64).encoded_end(length) == end


@pytest.mark.parametrize(("length", "end"), [(0, 4), (4 + 63, 4), (4 + 64, 68), (4 + 127, 68)])
def test_blocks_are_counted_after_the_sinks(length, end):
    tokens = Tokens(Int(4, "channel", 32), sink=4, recent=64, flush="block")
    assert tokens.encoded_end(length) == end


tokens_strategy = st.builds(
    lambda group, blocks, sink, block: Tokens(
        Int(4, "channel", group), sink, group * blocks, "block" if block and blocks else "group"
    ),
    st.integers(1, 5),
    st.integers(0, 4),
    st.integers(0, 3),
    st.booleans(),
)


def longest_tail(tokens):
    """Return the most tokens that stay in the tail after everything due is encoded."""
    return tokens.recent + (0 if tokens.flush == "block" else tokens.group_tokens) - 1


@given(tokens_strategy, st.integers(0, 60))
def test_the_encoded_end_only_grows_in_whole_groups_and_bounds_the_tail(tokens, length):
    end = tokens.encoded_end(length)
    assert tokens.encoded_end(length + 1) >= end
    assert (end - tokens.sink) % tokens.group_tokens == 0
    assert end <= max(length, tokens.sink)
    assert max(0, length - end) <= longest_tail(tokens)


@given(tokens_strategy)
def test_the_bound_of_the_tail_is_reached(tokens):
    tails = [n - tokens.encoded_end(n) for n in range(tokens.sink, 60)]
    assert max(tails) == longest_tail(tokens)


@pytest.mark.parametrize("flush", ["group", "block"])
def test_reading_gives_sinks_and_tail_as_they_are_and_the_rest_as_encoded(flush):
    x = np.random.default_rng(0).standard_normal((2, 3, 44, 8)).astype(np.float32)
    tokens = Tokens(Int(2, "channel", 4), sink=3, recent=8, flush=flush)
    end = tokens.encoded_end(44)
    assert 3 < end < 44
    got = tokens.simulate(x)
    assert np.array_equal(got[:, :, :3], x[:, :, :3])
    assert np.array_equal(got[:, :, end:], x[:, :, end:])
    assert np.array_equal(got[:, :, 3:end], tokens.rest.roundtrip(x[:, :, 3:end]))
    assert not np.array_equal(got[:, :, 3:end], x[:, :, 3:end])


def test_sinks_and_tail_are_rounded_to_the_raw_type():
    """All of them, also what is encoded: it waited in the tail."""
    x = np.full((1, 8, 2), 1.001)
    tokens = Tokens(Int(4, "token", 2), sink=2, recent=2, raw=Raw("bf16"))
    assert np.array_equal(tokens.simulate(x), np.ones_like(x))
    y = np.random.default_rng(0).normal(size=(1, 8, 2))
    assert np.array_equal(tokens.as_raw(y), Raw("bf16").roundtrip(y))
    assert np.array_equal(tokens.simulate(y), tokens.simulate(tokens.as_raw(y)))
    assert np.array_equal(
        tokens.simulate(y)[:, 2:6], tokens.rest.roundtrip(tokens.as_raw(y))[:, 2:6]
    )


def test_what_the_raw_type_cannot_hold_is_refused():
    for value, code in ((1e5, "scale-overflow"), (np.nan, "not-finite")):
        with pytest.raises(KvantError) as caught:
            Tokens(Bfp(8, 2), raw=Raw("f16")).simulate(np.full((1, 2, 2), value))
        assert caught.value.code == code


@given(tokens_strategy, st.integers(0, 40), st.integers(0, 20))
def test_a_token_once_encoded_never_changes(tokens, length, more):
    x = np.random.default_rng(length).standard_normal((length + more, 3))
    end = tokens.encoded_end(length)
    before, after = tokens.simulate(x[:length]), tokens.simulate(x)
    assert np.array_equal(before[:end], after[: min(end, length)])


def test_a_block_that_is_not_whole_groups_names_the_nearest_legal_ones():
    with pytest.raises(KvantError) as caught:
        Tokens(Int(2, "channel", 32), recent=100, flush="block")
    assert str(caught.value) == (
        "a window of 100 tokens is flushed as a block of groups of 32\n  where: tokens\n"
        "  fix: use recent = 96 or 128, or flush = group  [window-not-whole-groups]"
    )


@pytest.mark.parametrize(("recent", "fix"), [(0, "recent = 32,"), (20, "recent = 32,")])
def test_a_block_below_one_group_has_one_nearest_legal_value(recent, fix):
    with pytest.raises(KvantError) as caught:
        Tokens(Int(2, "channel", 32), recent=recent, flush="block")
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    "fields",
    [
        {"sink": -1},
        {"recent": -1},
        {"recent": 1.5},
        {"flush": "token"},
        {"rest": Tokens(Raw("f32"))},
        {"raw": Int(4, "token", 2)},
    ],
)
def test_a_field_out_of_range_is_refused(fields):
    with pytest.raises(KvantError) as caught:
        Tokens(**({"rest": Raw("f32")} | fields))
    assert caught.value.code == "bad-encoding"


def test_only_a_raw_rest_quantizes_nothing():
    assert not Tokens(Raw("f32")).quantizes
    assert not Tokens(Raw("bf16"), sink=4, recent=8).quantizes
    assert Tokens(Int(8, "token", 2)).quantizes
    assert Tokens(Bfp(8, 2)).quantizes


def test_check_reaches_the_rest():
    with pytest.raises(KvantError, match="groups of 48 do not divide 64 channels"):
        Tokens(Int(4, "token", 48)).check(64, "k")
