"""Thresholds of channels are the calibration values' own, and what is beyond them is known."""

from dataclasses import replace
from math import floor

import numpy as np
import pytest

from kvant.ir.errors import KvantError
from kvant.ir.maps import Scale
from kvant.ir.verify import verify
from kvant.passes import PASSES
from kvant.passes.sites import basis_of, find_site

BATCH = 40  # 440 values of a channel
COUNTS = {0.001: 0, 0.01: 4, 0.02: 8, 0.05: 22}
NAMES = {"k": "kvant.k_threshold", "v": "kvant.v_threshold"}


def _case(kit, seed=0, **config):
    sizes = {"heads": 2, "group": 3, "width": 8, "value_width": 4}
    return kit.draw(kit.Config(**sizes, **config), seed, batch=BATCH)


def _pass(role):
    return PASSES[f"threshold-{role}"]


def _with(kit, case, before, role, share=0.02):
    """Run passes and then thresholds of `role`; return the graph and the parameters."""
    name = f"threshold-{role}"
    return kit.apply_passes(case, [*before, name], {name: {"share": share}})


def _stored(kit, case, graph, params, role):
    """Return |x| of every token as it is appended, [H, N, D]."""
    x = kit.run(case, graph, params)[1][role]
    return np.abs(x).transpose(1, 0, 2, 3).reshape(x.shape[1], -1, x.shape[3])


def _basis(graph, role):
    site = find_site(graph)
    return basis_of(site.k_write if role == "k" else site.v_write)


def _refusal(call, *args, **options):
    with pytest.raises(KvantError) as refusal:
        call(*args, **options)
    return refusal.value


@pytest.mark.parametrize("role", ["k", "v"])
@pytest.mark.parametrize("share", COUNTS)
def test_a_threshold_is_the_largest_value_but_n(kit, role, share):
    """From other statistics than those of a model: random values, sorted with NumPy."""
    case, rng = _case(kit), np.random.default_rng(7)
    values = rng.standard_t(3, size=(440, 2, 8 if role == "k" else 4))
    descending = -np.sort(-np.abs(values), axis=0)
    stats = replace(kit.stats_of(case), tokens=440, **{f"{role}_largest": descending[:64]})
    made = _pass(role).constants(case.graph, {}, stats, share=share)
    (got,) = made.values()
    assert list(made) == [NAMES[role]]
    assert got.dtype == np.float64
    assert floor(share * 440) == COUNTS[share]
    assert np.array_equal(got, descending[COUNTS[share]])
    assert ((np.abs(values) > got).sum(axis=0) == COUNTS[share]).all()


@pytest.mark.parametrize("role", ["k", "v"])
@pytest.mark.parametrize("before", [(), ("sort",), ("smooth", "sort"), ("sort", "smooth")], ids=str)
@pytest.mark.parametrize("share", [0.01, 0.05])
def test_that_share_of_what_is_stored_is_above_one(kit, role, before, share):
    """Whatever came before: n values of every channel are above 1, and the next one is 1."""
    names = [f"{name}-{role}" for name in before if (name, role) != ("smooth", "v")]
    case = _case(kit, 3)
    graph, params = _with(kit, case, names, role, share)
    stored = -np.sort(-_stored(kit, case, graph, params, role), axis=1)
    count = COUNTS[share]
    assert (stored[:, count - 1] > 1.0).all()
    assert stored[:, count] == pytest.approx(np.ones(stored[:, 0].shape), rel=1e-6)
    unscaled = kit.apply_passes(case, names)
    largest = _stored(kit, case, *unscaled, role).max(axis=1)
    assert largest.max() / largest.min() > 3, "the channels were alike already"


def test_thresholds_come_in_the_order_of_storage(kit):
    case = _case(kit, 3)
    plain = _with(kit, case, [], "k")[1]["kvant.k_threshold"]
    params = _with(kit, case, ["sort-k"], "k")[1]
    order = params["kvant.k_order"]
    assert np.array_equal(params["kvant.k_threshold"], np.take_along_axis(plain, order, axis=1))
    assert not np.array_equal(params["kvant.k_threshold"], plain)


@pytest.mark.parametrize(("role", "dual"), [("k", "q"), ("v", "out")])
def test_query_heads_of_a_group_share_a_row(kit, role, dual):
    """Heads 0 to 2 read key/value head 0, heads 3 to 5 head 1: seen on queries and on W_o."""
    case = _case(kit)
    graph, params = _with(kit, case, [], role)
    t = np.repeat(params[NAMES[role]], 3, axis=0)
    if dual == "q":
        scaled, plain = (kit.queries_of(case, g, params) for g in (graph, case.graph))
        assert scaled == pytest.approx(plain * t[None, :, None, :])
    else:
        folded = kit.fold_weights(graph, params)[1]["o_proj.weight"]
        assert folded == pytest.approx(case.params["o_proj.weight"] * t.reshape(-1))
    assert not np.allclose(t[0], t[3])


@pytest.mark.usefixtures("lossless")
def test_folded_thresholds_of_values_are_those_online(kit):
    """Rows and bias of v_proj give v / t; without a projection the graph divides by itself."""
    case = _case(kit)
    graph, params = _with(kit, case, [], "v")
    assert _basis(graph, "v") == (Scale(NAMES["v"], inverse=True),)
    assert not graph.find("scale")
    t = params[NAMES["v"]][:, None, :]
    want = kit.run(case, case.graph, case.params)[1]["v"] / t
    assert kit.run(case, graph, params)[1]["v"] == pytest.approx(want)
    folded = kit.fold_weights(graph, params)
    assert kit.run(case, *folded)[1]["v"] == pytest.approx(want)
    kernel = _case(kit, projected=False)
    graph, params = _with(kit, kernel, [], "v")
    assert len(graph.find("scale")) == 2
    t = params[NAMES["v"]][:, None, :]
    want = kit.run(kernel, kernel.graph, {})[1]["v"] / t
    assert kit.run(kernel, graph, params)[1]["v"] == pytest.approx(want)


@pytest.mark.parametrize(
    ("config", "online", "columns"),
    [
        ({}, 0, 1),
        ({"value_norm": True}, 1, 1),
        ({"out_projected": False}, 1, 0),
        ({"value_norm": True, "out_projected": False}, 2, 0),
    ],
)
def test_each_side_of_the_values_folds_by_itself(kit, config, online, columns):
    case = _case(kit, **config)
    graph, params = _with(kit, case, [], "v")
    assert (len(graph.find("scale")), len(graph.find("scale_cols"))) == (online, columns)
    stored = -np.sort(-_stored(kit, case, graph, params, "v"), axis=1)
    assert stored[:, COUNTS[0.02]] == pytest.approx(np.ones((2, 4)), rel=1e-6)


@pytest.mark.parametrize("rope", [True, False])
def test_thresholds_of_keys_touch_no_weight(kit, rope):
    graph, _ = _with(kit, _case(kit, rope=rope, norm="head"), [], "k")
    assert len(graph.find("scale")) == 2
    assert not graph.find("scale_rows")
    verify(graph)


def test_thresholds_differ_within_a_rotary_pair(kit):
    """The reason to stay online: nothing here is tied over pairs, and the check accepts it."""
    case = _case(kit)
    graph, params = _with(kit, case, [], "k")
    t = params[NAMES["k"]]
    assert (t[:, :4] != t[:, 4:]).all()
    _pass("k").check_constants(graph, params)


@pytest.mark.parametrize("size", [0.0, 1e-39])
def test_a_channel_of_zeros_is_left_as_it_is(kit, size):
    """A threshold below the normal numbers of float32 would be 0 there."""
    case = _case(kit, bias=False)
    weights = dict(case.params)
    weights["v_proj.weight"] = weights["v_proj.weight"].copy()
    weights["v_proj.weight"][4 + 1] *= size
    case = kit.Case(case.config, case.graph, weights, case.steps)
    graph, params = _with(kit, case, [], "v")
    t = params[NAMES["v"]]
    assert t[1, 1] == 1.0
    assert (np.delete(t.reshape(-1), 5) != 1.0).all()
    assert np.isfinite(kit.run(case, graph, params)[0]).all()


@pytest.mark.parametrize("role", ["k", "v"])
@pytest.mark.parametrize("share", [0.0, -0.01, 0.051, float("nan"), "few", True, None])
def test_a_share_that_makes_no_sense(kit, role, share):
    case = _case(kit)
    for call in (
        lambda: _pass(role).run(case.graph, share=share),
        lambda: _pass(role).constants(case.graph, {}, kit.stats_of(case), share=share),
    ):
        assert str(_refusal(call)) == (
            f"share is {share!r}\n  where: pass threshold-{role}\n"
            "  fix: use a number above 0, up to 0.05; the paper uses 0.01  [bad-option]"
        )


@pytest.mark.parametrize("role", ["k", "v"])
def test_a_share_of_more_values_than_the_statistics_hold(kit, role):
    case = _case(kit)
    stats = kit.stats_of(case)
    few = replace(stats, **{f"{role}_largest": getattr(stats, f"{role}_largest")[:8]})
    make = _pass(role).constants
    assert str(_refusal(make, case.graph, {}, few, share=0.02)) == (
        "share is 0.02: 8 of 440 values of a channel, and the statistics hold its 8 largest\n"
        f"  where: pass threshold-{role}\n  fix: use at most 0.01591  [bad-option]"
    )
    (made,) = make(case.graph, {}, few, share=0.01591).values()
    assert np.array_equal(made, getattr(stats, f"{role}_largest")[7])


@pytest.mark.parametrize("role", ["k", "v"])
def test_statistics_are_needed_with_their_largest_values(kit, role):
    case = _case(kit)
    assert _pass(role).needs_stats({})
    make, without = _pass(role).constants, {"k_largest": None, "v_largest": None}
    assert _refusal(make, case.graph, {}, None).code == "needs-stats"
    refused = _refusal(make, case.graph, {}, replace(kit.stats_of(case), **without))
    assert str(refused) == (
        f"threshold-{role} needs the largest values of each channel, "
        "which these statistics leave out\n"
        f"  where: pass threshold-{role}\n"
        "  fix: record them: LayerStats.k_largest and v_largest  [needs-stats]"
    )


@pytest.mark.parametrize(
    ("role", "rotation", "config"),
    [
        ("k", "hadamard-qk", {}),
        ("v", "hadamard-v", {}),
        ("v", "hadamard-v", {"projected": False}),  # the rotation is online: it comes first too
        ("v", "hadamard-v", {"value_norm": True}),
    ],
)
def test_thresholds_of_rotated_channels_are_refused(kit, role, rotation, config):
    case = _case(kit, **config)
    graph, params = kit.apply_passes(case, [rotation])
    refused = _refusal(_pass(role).constants, graph, params, kit.stats_of(case))
    assert (refused.code, refused.where) == ("rotated-basis", f"the {role} path")


@pytest.mark.parametrize("role", ["k", "v"])
@pytest.mark.parametrize("value", [0.0, -1.0, np.inf, np.nan])
def test_a_threshold_that_is_no_positive_number(kit, role, value):
    graph, params = _with(kit, _case(kit), [], role)
    t = params[NAMES[role]].copy()
    t[1, 2] = value
    check = _pass(role).check_constants
    refused = _refusal(check, graph, {NAMES[role]: t})
    assert refused.code == "bad-constant"
    assert refused.what == f"constant {NAMES[role]}: a scale is not a positive number"
    narrow = _refusal(check, graph, {NAMES[role]: params[NAMES[role]][:, :-1]})
    assert "its shape is (2, " in narrow.what
    assert _refusal(check, graph, {}).code == "bad-constant"
