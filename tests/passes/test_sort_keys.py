"""The keys by which channels are sorted, and what the order is good for: outliers in one slice."""

from dataclasses import replace

import numpy as np
import pytest

from kvant.ir.encodings import Int, Slice, Slices
from kvant.ir.errors import KvantError
from kvant.ir.stats import LayerStats
from kvant.passes import PASSES
from kvant.passes.constants import SORT_KEYS


def k_order(case, stats, key, graph=None, params=None):
    made = PASSES["sort-k"].constants(graph or case.graph, params or case.params, stats, key=key)
    return made["kvant.k_order"]


def by_hand():
    """Statistics of one key head of four channels that two query heads read."""
    return LayerStats(
        k_absmax=np.array([[4.0, 1.0, 2.0, 3.0]]),
        k_second_moment=np.array([[1.0, 9.0, 4.0, 0.5]]),
        q_absmax=np.ones((2, 4)),
        q_second_moment=np.array([[1.0, 64.0, 3.0, 1.0], [0.0, 64.0, 5.0, 3.0]]),
        v_absmax=np.array([[1.0, 4.0, 2.0, 3.0]]),
        v_second_moment=np.array([[1.0, 2.0, 4.0, 3.0]]),
        tokens=9,
    )


@pytest.mark.parametrize(
    ("key", "want"),
    [
        ("rms", [3, 0, 2, 1]),
        ("range", [1, 2, 3, 0]),
        # 16 * 0.5, 1 * 64, 4 * 4, 9 * 2: the queries look at the least channel most of all.
        ("fisher", [0, 2, 3, 1]),
    ],
)
def test_the_order_of_keys_by_hand(kit, key, want):
    case = kit.draw(kit.Config(heads=1, group=2, width=4, value_width=4), 0)
    assert k_order(case, by_hand(), key).tolist() == [want]


@pytest.mark.parametrize(
    ("key", "want"), [("rms", [0, 1, 3, 2]), ("range", [0, 2, 3, 1]), ("fisher", [1, 3, 2, 0])]
)
def test_the_order_of_values_by_hand(kit, key, want):
    case = kit.draw(kit.Config(heads=1, group=2, width=4, value_width=4), 0)
    norms = np.array([[5.0, 0.25, 1.0, 0.5], [5.0, 0.25, 2.0, 0.5]]).reshape(-1)
    rows = case.params["o_proj.weight"].shape[0]
    params = case.params | {"o_proj.weight": np.tile(norms, (rows, 1)) / np.sqrt(rows)}
    # fisher: 1 * 50, 16 * 0.125, 4 * 5, 9 * 0.5
    made = PASSES["sort-v"].constants(case.graph, params, by_hand(), key=key)
    assert made["kvant.v_order"].tolist() == [want]


@pytest.mark.parametrize("key", [key for key in SORT_KEYS if key != "weight"])
def test_equal_channels_stay_in_order_and_runs_agree(kit, key):
    case = kit.draw(kit.Config(width=64), 1)
    stats = kit.stats_of(case)
    ones = replace(
        stats,
        k_absmax=np.ones_like(stats.k_absmax),
        k_second_moment=np.ones_like(stats.k_second_moment),
        q_second_moment=np.ones_like(stats.q_second_moment),
    )
    heads, width = stats.k_absmax.shape
    assert k_order(case, ones, key).tolist() == [list(range(width))] * heads
    first, second = (k_order(case, stats, key) for _ in range(2))
    assert first.tobytes() == second.tobytes()
    # Not the order of the machine's sort: ties alone decide here.
    tied = replace(ones, k_absmax=np.where(np.arange(width) % 2, 1.0, 2.0) + 0 * ones.k_absmax)
    if key in ("range", "fisher"):
        want = [*range(1, width, 2), *range(0, width, 2)]
        assert k_order(case, tied, key).tolist() == [want] * heads


@pytest.mark.parametrize("before", [[], ["smooth-k"]], ids=str)
def test_a_key_is_that_of_what_is_stored_and_asked(kit, before):
    """Measured on keys in the cache and on the queries that meet them, after earlier passes."""
    for seed in range(4):
        config = kit.Config(heads=2, group=3, bias=True)
        case = kit.draw(config, seed)
        graph, params = kit.apply_passes(case, before)
        keys = kit.run(case, graph, params)[1]["k"]
        moment = (kit.queries_of(case, graph, params) ** 2).mean(axis=(0, 2))
        largest = np.abs(keys).max(axis=(0, 2))
        size = {
            "rms": (keys**2).mean(axis=(0, 2)),
            "range": largest,
            "fisher": largest**2 * moment.reshape(2, 3, -1).mean(axis=1),
        }
        orders = {key: k_order(case, kit.stats_of(case), key, graph, params) for key in size}
        for key, order in orders.items():
            assert np.array_equal(order, np.argsort(size[key], axis=-1, kind="stable")), key
        assert not np.array_equal(orders["fisher"], orders["range"])


def test_values_after_a_sort_are_seen_in_their_new_order(kit):
    """The columns of W_o move with the values, so a second sort by the same key changes nothing."""
    case = kit.draw(kit.Config(value_width=16), 3)
    graph, params = kit.apply_passes(case, ["sort-v"], {"sort-v": {"key": "fisher"}})
    stats = kit.stats_of(case)
    again = PASSES["sort-v"].constants(graph, params, stats, key="fisher")["kvant.v_order"]
    heads, width = stats.v_absmax.shape
    assert again.tolist() == [list(range(width))] * heads
    first = params["kvant.v_order"]
    assert first.tolist() != again.tolist()


@pytest.mark.parametrize("key", ["range", "fisher"])
def test_a_calibrated_sort_of_rotated_values_is_refused(kit, key):
    case = kit.draw(kit.Config(value_width=16), 3)
    graph, params = kit.apply_passes(case, ["hadamard-v"])
    with pytest.raises(KvantError) as refused:
        PASSES["sort-v"].constants(graph, params, kit.stats_of(case), key=key)
    assert refused.value.code == "rotated-basis"


def test_the_outliers_are_the_last_slice(kit):
    """Two large channels of a head land in the slice of 8 bits, wherever they were."""
    config = kit.Config(heads=2, width=32, rope=False, bias=False, value_width=8)
    case = kit.draw(config, 5, batch=16)
    rows = case.params["k_proj.weight"]
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    outliers = {0: (3, 17), 1: (0, 30)}
    for head, some in outliers.items():
        rows[[head * 32 + c for c in some]] *= 30.0
    case = replace(case, params=case.params | {"k_proj.weight": rows})
    fmt = Slices((Slice(16, Int(2, "token", 16)), Slice(16, Int(8, "token", 16))))
    errors = {}
    for key in (None, "range"):
        names = [] if key is None else ["sort-k"]
        graph, params = kit.apply_passes(case, names, {"sort-k": {"key": key}})
        if key:
            for head, some in outliers.items():
                assert set(params["kvant.k_order"][head, -2:]) == set(some)
        keys = kit.run(case, graph, params)[1]["k"]
        errors[key] = ((fmt.roundtrip(keys) - keys) ** 2).mean()
    assert errors["range"] < 0.2 * errors[None]
