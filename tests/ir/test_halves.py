"""What matrix products of float16 round: by hand, against plain loops, and within their budget."""

from dataclasses import replace

import numpy as np
import pytest

from kvant.ir.attention import EXACT, attend
from kvant.ir.encodings import Bfp, Int, Lut
from kvant.ir.encodings.lut import LLOYD, NF4
from kvant.ir.halves import (
    DIGITS,
    NORMAL,
    TILE,
    Halves,
    middle,
    round_half,
    units_of,
    whole_tiles,
)

FORMATS = {
    "int4": Int(4, "token", 64),
    "int4-int": Int(4, "token", 16, zero="int"),
    "int2": Int(2, "token", 32),
    "int2-none": Int(2, "token", 64, zero="none"),
    "int8": Int(8, "token", 64),
    "int8-int": Int(8, "token", 32, zero="int"),
    "int3": Int(3, "token", 32),
    "int4-channel": Int(4, "channel", 64),
    "int4-channel-none": Int(4, "channel", 128, zero="none"),
    "int2-channel-int": Int(2, "channel", 64, zero="int"),
    "int3-channel": Int(3, "channel", 64),
    "int8-channel": Int(8, "channel", 64),
    "bfp4": Bfp(4, 16),
    "bfp8": Bfp(8, 32),
    "nf4": Lut(4, 32, NF4),
    "lloyd2": Lut(2, 64, *LLOYD[2]),
}
CHANNELS = {name: fmt for name, fmt in FORMATS.items() if "channel" in name}
LOG_ONE = np.zeros((1, 1, 1, 1))  # weights are then what the exponentials are


def stored(fmt, x, first=0, channels=None):
    """x [1, H, N, C] as stored, and its units."""
    fields = fmt.encode(x[0])
    channels = channels or slice(0, x.shape[-1])
    return fmt.decode(fields)[None], units_of(fmt, fields, first, channels)


def test_weights_round_as_normal_float16_does():
    w = np.exp2(np.random.default_rng(0).uniform(-NORMAL, 15, 20_000))
    rounded, tied = round_half(w)
    assert np.array_equal(rounded, w.astype(np.float16).astype(np.float64))
    assert not tied.any()
    assert np.abs(rounded / w - 1).max() > 0.99 * 2.0**-DIGITS, "nothing was rounded"
    assert round_half(np.zeros(3))[0].tolist() == [0.0, 0.0, 0.0]


def test_powers_of_two_change_nothing_in_weights():
    w = np.random.default_rng(1).random(5_000)
    for power in (-300, -24, -14, -1, 3, 60):
        assert np.array_equal(round_half(np.ldexp(w, power))[0], np.ldexp(round_half(w)[0], power))


def test_ties_go_to_even_and_are_flagged():
    step = 2.0**-10  # of float16 in [1, 2)
    w = np.array([1 + 0.5 * step, 1 + 1.5 * step, 1 + 0.49 * step, 1 + 0.25 * step, 1.0, 0.0])
    rounded, tied = round_half(w)
    assert rounded.tolist() == [1.0, 1 + 2 * step, 1.0, 1.0, 1.0, 0.0]
    assert tied.tolist() == [step, step, 0.0, 0.0, 0.0, 0.0]
    assert round_half(w, 1.01e-2 * step)[1].tolist() == [step, step, step, 0.0, 0.0, 0.0]
    assert round_half(w, 0.98e-2 * step)[1].tolist() == [step, step, 0.0, 0.0, 0.0, 0.0]
    assert round_half(64 * w)[1].tolist() == [64 * step, 64 * step, 0.0, 0.0, 0.0, 0.0]


def test_codes_are_counted_from_the_middle():
    x = np.array([[[-7.0, 3.5, 7.0, 0.0], [14.0, 0.0, -2.0, 6.0]]])
    _, none = stored(Int(4, "token", 4, zero="none"), x[None])
    assert none.units[0].tolist() == [[-7.0, 4.0, 7.0, 0.0], [7.0, 0.0, -1.0, 3.0]]
    assert none.scale[0].tolist() == [[1.0] * 4, [2.0] * 4]
    x = np.array([[[0.0, 15.0, 5.0, 7.0], [-8.0, 22.0, 2.0, 4.0]]])
    _, floats = stored(Int(4, "token", 4), x[None])
    assert floats.units[0].tolist() == [[0.0, 15.0, 5.0, 7.0], [0.0, 15.0, 5.0, 6.0]]
    assert floats.scale[0].tolist() == [[1.0] * 4, [2.0] * 4]
    _, integers = stored(Int(4, "token", 2, zero="int"), x[None])
    assert integers.units[0, 1].tolist() == [0.0, 15.0] + integers.units[0, 1, 2:].tolist()
    assert integers.scale[0, 1, :2].tolist() == [2.0, 2.0]
    _, bytes_ = stored(Int(8, "token", 4), np.array([[[[0.0, 255.0, 100.0, 128.0]]]]))
    assert bytes_.units[0, 0].tolist() == [-128.0, 127.0, -28.0, 0.0]
    assert not bytes_.per_channel


def test_units_of_blocks_and_tables():
    _, block = stored(Bfp(4, 4), np.array([[[[4.0, -7.0, 1.0, 0.0]]]]))
    assert block.units[0, 0].tolist() == [4.0, -7.0, 1.0, 0.0]
    assert block.scale[0, 0].tolist() == [1.0] * 4
    table = Lut(2, 4, (-63, -3, 5, 40))
    x = np.array([[[[-63.0, -3.0, 40.0, 5.0]]]])
    decoded, entries = stored(table, x)
    assert np.array_equal(entries.units * entries.scale, decoded[0])
    assert entries.units[0, 0].tolist() == [-63.0, -3.0, 40.0, 5.0]


def test_scales_of_channels_and_the_lift_of_a_plane():
    fmt = Int(4, "channel", 2)
    x = np.array([[[[0.0, 1.0, 2.0, 3.0], [15.0, 31.0, 2.0, -12.0]] * 2]])
    _, units = stored(fmt, x, first=3)
    assert units.per_channel
    assert units.first == 3
    assert units.scale[0, 0].tolist() == [1.0, 2.0, 1.0, 1.0]  # one of no width is one
    assert units.units[0, 1].tolist() == [15.0, 15.0, 0.0, 0.0]
    assert units.lift.tolist() == [1.0, 1.0, 16.0, 16.0]
    two = Int(2, "channel", 2)
    for fmt in (two, Int(3, "channel", 2)):  # three bits: planes of the low two
        lift = stored(fmt, np.tile(x, (1, 1, 1, 2)))[1].lift
        assert lift.tolist() == [1, 1, 4, 4, 16, 16, 64, 64]


@pytest.mark.parametrize("name", FORMATS)
def test_scale_times_units_and_the_middle_is_what_is_stored(name):
    """What is left is the same for all channels that share a scale: z, what the middle is."""
    fmt, rng = FORMATS[name], np.random.default_rng(2)
    decoded, units = stored(fmt, rng.standard_normal((1, 2, 128, 64)))
    left = decoded[0] - units.units * units.scale
    if units.per_channel:
        assert np.abs(left - units.zero).max() < 1e-12
        assert units.zero.any() == (fmt.zero == "float")
        return
    groups = left.reshape(2, 128, -1, fmt.group_channels)
    assert np.ptp(groups, axis=-1).max() < 1e-12 * np.abs(decoded).max()
    symmetric = not isinstance(fmt, Int) or fmt.zero == "none"
    assert (np.abs(left).max() < 1e-12) == symmetric


def test_middles():
    assert [middle(Int(bits, "token", 4, zero="none")) for bits in (2, 4, 8)] == [2, 8, 128]
    for zero in ("int", "float"):
        assert [middle(Int(bits, "token", 4, zero=zero)) for bits in (2, 3, 4, 8)] == [0, 0, 0, 128]
        assert middle(Int(4, "channel", 64, zero=zero)) == 0
    assert [middle(Int(bits, "channel", 64)) for bits in (4, 8)] == [0, 0]
    assert [middle(Int(bits, "channel", 64, zero="none")) for bits in (4, 8)] == [8, 128]
    assert [middle(Bfp(bits, 4)) for bits in (4, 8)] == [8, 128]


@pytest.mark.parametrize(
    ("length", "encoded", "sink", "window", "whole"),
    [
        (1_000, 1_000, 0, None, (0, 960)),
        (1_000, 640, 0, None, (0, 640)),
        (1_000, 639, 0, None, (0, 576)),
        (1_000, 644, 4, None, (4, 644)),
        (1_000, 643, 4, None, (4, 580)),
        (600, 644, 4, None, (4, 580)),  # truncated since
        (1_000, 1_000, 0, 1_000, (0, 960)),
        (1_000, 1_000, 0, 999, (64, 960)),
        (1_000, 1_000, 0, 936, (64, 960)),
        (1_000, 1_000, 4, 936, (68, 964)),
        (1_000, 1_000, 4, 932, (68, 964)),
        (1_000, 1_000, 4, 931, (132, 964)),
    ],
)
def test_whole_tiles_by_hand(length, encoded, sink, window, whole):
    assert whole_tiles(length, encoded, sink, window) == whole


@pytest.mark.parametrize(
    "case", [(63, 63, 0, None), (3, 0, 4, None), (67, 67, 4, None), (500, 500, 0, 60), (0, 0, 0, 9)]
)
def test_nothing_may_be_whole(case):
    begin, end = whole_tiles(*case)
    assert end <= begin


@pytest.mark.parametrize("length", [1, 64, 200, 333])
@pytest.mark.parametrize("sink", [0, 4])
@pytest.mark.parametrize("window", [None, 1, 64, 150])
def test_whole_tiles_are_those_all_of_whose_tokens_are_seen(length, sink, window):
    for encoded in (0, sink, 100, 192, 196, 333):
        fits = []
        for tile in range(sink, 400, TILE):
            oldest = 0 if window is None else length - window
            if tile >= oldest and tile + TILE <= min(length, encoded):
                fits.append(tile)
        begin, end = whole_tiles(length, encoded, sink, window)
        assert list(range(begin, end, TILE)) == fits


def test_outputs_round_weights_in_whole_tiles_alone():
    """Against loops, for each format, with tokens before and behind the whole tiles."""
    for name, fmt in FORMATS.items():
        if fmt.group_tokens > 1:
            continue
        rng, first, n = np.random.default_rng(3), 5, 150
        v, own = stored(fmt, rng.standard_normal((1, 2, n, 64)), first)
        v = np.concatenate([rng.standard_normal((1, 2, first, 64)), v], axis=2)
        p, log_total = rng.random((1, 2, 3, first + n)) ** 4, rng.normal(size=(1, 2, 3, 1))
        whole = (first + TILE, first + 2 * TILE)
        got = Halves([[]], [[own]], [whole]).outputs(p, log_total, v)
        want = np.zeros_like(got)
        for h, r, t in np.ndindex(2, 3, first + n):
            total = np.exp(log_total[0, h, r, 0])
            part = p[0, h, r, t] * v[0, h, t]
            if whole[0] <= t < whole[1]:
                w = p[0, h, r, t] * total * own.scale[h, t - first]
                # float16 of any exponent: brought to [1, 2) and back
                power = 2.0 ** np.floor(np.log2(w))
                rounded = (w / power).astype(np.float16).astype(np.float64) * power / total
                part = part + (rounded - w / total) * own.units[h, t - first]
            want[0, h, r] += part
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12, err_msg=name)
        assert np.abs(got - p @ v).max() > 1e-6, "nothing was rounded"


def test_the_exponentials_are_rounded_not_the_probabilities():
    fmt, rng = FORMATS["int4"], np.random.default_rng(4)
    v, own = stored(fmt, rng.standard_normal((1, 1, TILE, 64)))
    p = rng.random((1, 1, 1, TILE))
    halves = Halves([[]], [[own]], [(0, TILE)])
    one, two = (halves.outputs(p, np.full((1, 1, 1, 1), x), v) for x in (0.0, 5 * np.log(2.0)))
    assert np.allclose(one, two, rtol=1e-12, atol=1e-15)  # a power of two
    assert not np.allclose(one, halves.outputs(p, LOG_ONE + 0.3, v), rtol=1e-9)


def singles(rng, heads, rows, channels):
    """Queries [1, H, R, C] that float32 holds."""
    q = rng.standard_normal((1, heads, rows, channels))
    return q.astype(np.float32).astype(np.float64)


def loops_of_scores(q, k, owns, scale, whole):
    """Scores, token by token and channel by channel; q [1, H, R, C], k [1, H, N, C]."""
    want = scale * q @ k.swapaxes(-1, -2)
    for h, r, t in np.ndindex(q.shape[1], q.shape[2], k.shape[2]):
        if not whole[0] <= t < whole[1]:
            continue
        row = (q[0, h, r] * scale).astype(np.float32)
        power = np.float32(2.0 ** (np.floor(np.log2(np.abs(row).max())) + 1))
        score = float(row.astype(np.float64) @ k[0, h, t])
        for own in owns:
            for i, c in enumerate(range(own.channels.start, own.channels.stop)):
                s, u, z = (x[h, t - own.first, i] for x in (own.scale, own.units, own.zero))
                y = np.float16(row[c] / power / np.float32(own.lift[i])) * np.float16(s)
                score += (float(y) * own.lift[i] * float(power) - float(row[c]) * s) * u
                score += (float(np.float16(row[c] / power)) * float(power) - float(row[c])) * z
        want[0, h, r, t] = score
    return want


@pytest.mark.parametrize("name", CHANNELS)
def test_scores_of_scaled_channels_are_those_of_rounded_products(name):
    fmt, rng, first = CHANNELS[name], np.random.default_rng(5), 3
    k, own = stored(fmt, rng.standard_normal((1, 2, 128, 16)), first)
    k = np.concatenate([rng.standard_normal((1, 2, first, 16)), k], axis=2)
    q, whole = singles(rng, 2, 2, 16), (first + TILE, first + 2 * TILE)
    got = Halves([[own]], [[]], [whole]).scores(q, k, 0.25)
    np.testing.assert_allclose(got, loops_of_scores(q, k, [own], 0.25, whole), atol=1e-13)
    exact = EXACT.scores(q, k, 0.25)
    assert np.array_equal(got[..., : whole[0]], exact[..., : whole[0]])
    assert np.abs(got - exact)[..., whole[0] :].max() > 1e-4


def test_scores_of_slices_share_the_power_of_the_row():
    """Subnormals of float16 show it: the queries of the second slice are small."""
    rng, fmt, owns = np.random.default_rng(6), FORMATS["int4-channel"], []
    k = np.zeros((1, 1, TILE, 32))
    for channels in (slice(0, 16), slice(16, 32)):
        x = rng.standard_normal((1, 1, TILE, 16))
        k[..., channels], own = stored(fmt, x, 0, channels)
        owns.append(own)
    q = singles(rng, 1, 2, 32) * np.where(np.arange(32) < 16, 1.0, 2.0**-17)
    got = Halves([owns], [[]], [(0, TILE)]).scores(q, k, 1.0)
    want = loops_of_scores(q, k, owns, 1.0, (0, TILE))
    np.testing.assert_allclose(got, want, atol=1e-13)
    moved = replace(owns[1], channels=slice(0, 16))
    alone = Halves([[moved]], [[]], [(0, TILE)]).scores(q[..., 16:], k[..., 16:], 1.0)
    small = Halves([owns[1:]], [[]], [(0, TILE)]).scores(q, k, 1.0) - EXACT.scores(q, k, 1.0)
    exact = EXACT.scores(q[..., 16:], k[..., 16:], 1.0)
    assert np.abs(small - (alone - exact)).max() > 1e-9


def test_scales_of_tokens_leave_scores_exact():
    rng = np.random.default_rng(7)
    k, own = stored(FORMATS["int8"], rng.standard_normal((1, 2, TILE, 64)))
    q = rng.standard_normal((1, 2, 3, 64))
    got = Halves([[own]], [[]], [(0, TILE)]).scores(q, k, 0.125)
    assert np.array_equal(got, EXACT.scores(q, k, 0.125))


def test_slack_counts_near_ties_and_weights_that_are_no_normal_halves():
    fmt = Int(8, "token", 4, zero="none", params="f32")
    v, own = stored(fmt, np.ones((1, 1, TILE, 4)))
    scale, unit = own.scale[0, 0, 0], own.units[0, 0, 0]
    p = np.zeros((1, 1, 1, TILE))
    p[..., 0] = 1.0
    p[..., 1] = (1 + 0.4999 * 2.0**-10) * 2.0**-3 / scale
    slack = []
    for near in (0.0, 1e-6):
        halves = Halves([[]], [[own]], [(0, TILE)], near)
        halves.outputs(p, LOG_ONE, v)
        slack.append(halves.slack[0, 0, 0, 0])
    least = 4 * p.max() * scale * 2.0**-NORMAL
    zeros = (TILE - 2) * least * 2.0**-DIGITS * unit
    assert slack[0] == pytest.approx(zeros)
    assert slack[1] - slack[0] == pytest.approx(2.0**-13 * unit)
    p[..., 2:] = 1e-2
    halves = Halves([[]], [[own]], [(0, TILE)])
    halves.outputs(p, LOG_ONE, v)
    assert halves.slack.max() == 0.0


def test_slack_counts_what_float16_does_to_weights_of_entries():
    rng, fmt = np.random.default_rng(10), Int(4, "token", 4)
    v, own = stored(fmt, rng.standard_normal((1, 1, TILE, 4)))
    entries = np.zeros((1, TILE, 4))
    entries[0, 5, 2], entries[0, 9, 2] = -8.0, 100.0
    p = np.zeros((1, 1, 1, TILE))
    p[..., 5], p[..., 0] = 0.25, 0.75
    slack = []
    for own_entries in (None, entries):
        halves = Halves([[]], [[replace(own, entries=own_entries)]], [(0, TILE)])
        out = halves.outputs(p, LOG_ONE, v)
        slack.append((halves.slack.copy(), out))
    more = (slack[1][0] - slack[0][0])[0, 0, 0]
    assert np.array_equal(slack[0][1], slack[1][1]), "entries are in what is decoded already"
    rounding, subnormals = 0.25 * 8.0 * 2.0**-DIGITS, 0.75 * 108.0 * 2.0**-25
    np.testing.assert_allclose(more, [0.0, 0.0, rounding + subnormals, 0.0], rtol=1e-12)


def test_rows_of_a_batch_are_alone():
    rng, fmt = np.random.default_rng(8), FORMATS["int4-channel"]
    (k0, u0), (k1, u1) = (stored(fmt, rng.standard_normal((1, 1, 128, 16))) for _ in range(2))
    k, q = np.concatenate([k0, k1]), rng.standard_normal((2, 1, 2, 16))
    both = Halves([[u0], [u1]], [[], []], [(0, 128), (0, 64)], near=0.25)
    got = both.scores(q, k, 1.0)
    for b in range(2):
        one = both.row(b)
        assert one.near == 0.25
        assert np.array_equal(one.scores(q[b : b + 1], k[b : b + 1], 1.0), got[b : b + 1])
    assert np.array_equal(got[1, ..., 64:], EXACT.scores(q, k, 1.0)[1, ..., 64:])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("peaked", [0.3, 1.0, 3.0])
def test_rounding_costs_a_tenth_of_the_encoding(name, peaked):
    """Errors of outputs, root mean square, of spread and of peaked attention."""
    fmt, rng = FORMATS[name], np.random.default_rng(9)
    k, v = (rng.standard_normal((1, 2, 512, 64)) for _ in range(2))
    q = peaked * rng.standard_normal((1, 8, 1, 64))
    values = FORMATS["int8"] if name in CHANNELS else fmt  # keys alone have scales of channels
    (stored_k, own_k), (stored_v, own_v) = stored(fmt, k), stored(values, v)
    call = {"lengths": np.array([512]), "scale": 0.125}
    products = Halves([[own_k]], [[own_v]], [(0, 512)])
    exact = attend(q, k, v, **call)[0]
    encoded = attend(q, stored_k, stored_v, **call)[0]
    rounded = attend(q, stored_k, stored_v, products=products, **call)[0]
    rms = [np.sqrt(np.mean(np.square(x - y))) for x, y in ((encoded, exact), (rounded, encoded))]
    assert 0 < rms[1] <= 0.1 * rms[0], rms
