"""What the papers promise of their own pass: K-sort (E2) and SmoothAttention (E6)."""

import numpy as np
import pytest

from kvant.ir.encodings import Bfp, Int, Tokens
from kvant.ir.errors import KvantError
from kvant.passes import PASSES
from kvant.passes.constants import row_norms
from kvant.passes.sites import find_site

BFP12_BLOCKS = (4, 8, 16, 32)
WIDTH = 32
OUTLIERS = (1, 9, 18, 28)


def _sorted_case(kit, seed):
    """Keys whose channels are alike but for some outliers, 8 times as large, far apart.

    Absolute error is not lower for every set of scales: a channel of middle size may land in the
    block of the largest. It is where outliers spoil blocks of small channels, as the paper has it.
    """
    config = kit.Config(width=WIDTH, value_width=8, rope=False, bias=False)
    case = kit.draw(config, seed, batch=16)
    weights = dict(case.params)
    rows = weights["k_proj.weight"] / np.linalg.norm(weights["k_proj.weight"], axis=1)[:, None]
    for head in range(config.heads):
        rows[head * WIDTH + np.array(OUTLIERS)] *= 8.0
    weights["k_proj.weight"] = rows
    case = kit.Case(config, case.graph, weights, case.steps)
    graph, params = kit.apply_passes(case, ["sort-k"], {"sort-k": {"key": "rms"}})
    return case, graph, params


def _stored_keys(kit, case, graph, params):
    """Return the keys as appended, [B, H, S, D]."""
    return kit.run(case, graph, params)[1]["k"]


def _block_error(keys, block):
    return float(((Bfp(4, block).roundtrip(keys) - keys) ** 2).mean())


@pytest.mark.parametrize("seed", range(4))
def test_k_sort_does_nothing_to_one_block_per_head(kit, seed):
    """E2: with block == D a permutation changes no quantized output at all."""
    case, graph, params = _sorted_case(kit, seed)
    encoding = {"k": Tokens(rest=Bfp(4, WIDTH)), "v": Tokens(rest=Bfp(8, 8))}
    plain = PASSES["store"].run(case.graph, **encoding)
    kept, _ = kit.run(case, plain, case.params)
    moved, _ = kit.run(case, PASSES["store"].run(graph, **encoding), params)
    assert kit.relative(moved, kept) < 1e-12
    exact, _ = kit.run(case, case.graph, case.params)
    assert kit.relative(kept, exact) > 1e-4, "nothing was quantized: the test proves nothing"
    # With two blocks per head the same sort does change it.
    halves = encoding | {"k": Tokens(rest=Bfp(4, WIDTH // 2))}
    kept, _ = kit.run(case, PASSES["store"].run(case.graph, **halves), case.params)
    moved, _ = kit.run(case, PASSES["store"].run(graph, **halves), params)
    assert kit.relative(moved, kept) > 1e-6


@pytest.mark.parametrize("block", BFP12_BLOCKS)
def test_k_sort_is_not_worse_on_channel_scaled_keys(kit, block):
    """E2: blocks of alike channels lose less; equal where a block is a whole head."""
    for seed in range(8):
        case, graph, params = _sorted_case(kit, seed)
        before = _block_error(_stored_keys(kit, case, case.graph, case.params), block)
        after = _block_error(_stored_keys(kit, case, graph, params), block)
        assert after <= before * (1 + 1e-12)
        if block == WIDTH:
            assert after == pytest.approx(before, rel=1e-12)
        else:
            assert after < 0.9 * before


@pytest.mark.parametrize("block", BFP12_BLOCKS)
def test_k_sort_does_not_depend_on_its_direction(kit, block):
    case, graph, params = _sorted_case(kit, 1)
    down = params | {"kvant.k_order": params["kvant.k_order"][:, ::-1]}
    up = _block_error(_stored_keys(kit, case, graph, params), block)
    assert _block_error(_stored_keys(kit, case, graph, down), block) == pytest.approx(up, rel=1e-12)


def test_k_order_is_that_of_row_norms_with_bias_and_norm_weight(kit):
    case = kit.draw(kit.Config(norm="head", offset=1.0, bias=True), 2)
    order = PASSES["sort-k"].constants(case.graph, case.params, None)["kvant.k_order"]
    w, b = case.params["k_proj.weight"], case.params["k_proj.bias"]
    gamma = np.abs(1.0 + case.params["k_norm.weight"])
    size = np.sqrt((w**2).sum(1) + b**2).reshape(2, 16) * gamma
    assert order.dtype == np.int64
    assert (np.diff(np.take_along_axis(size, order, 1), axis=1) >= 0).all()
    assert not np.array_equal(order, np.argsort(np.sqrt((w**2).sum(1)).reshape(2, 16), axis=1))
    site = find_site(case.graph)
    assert row_norms(case.graph, site.k, case.params) == pytest.approx(size)


def test_k_order_after_smoothing_sees_smoothed_weights(kit):
    case = kit.draw(kit.Config(), 4)
    graph, params = kit.apply_passes(case, ["smooth-k"])
    after = PASSES["sort-k"].constants(graph, params, None)["kvant.k_order"]
    before = PASSES["sort-k"].constants(case.graph, case.params, None)["kvant.k_order"]
    assert not np.array_equal(after, before)
    rows = case.params["k_proj.weight"] / params["kvant.k_smooth"].reshape(-1, 1)
    bias = case.params["k_proj.bias"] / params["kvant.k_smooth"].reshape(-1)
    size = np.sqrt((rows**2).sum(1) + bias**2).reshape(2, 16)
    assert np.array_equal(after, np.argsort(size, axis=-1, kind="stable"))
    by_rms = PASSES["sort-k"].constants(graph, params, kit.stats_of(case), key="rms")
    rms = np.sqrt(kit.stats_of(case).k_second_moment) / params["kvant.k_smooth"]
    assert np.array_equal(by_rms["kvant.k_order"], np.argsort(rms, axis=-1, kind="stable"))


@pytest.mark.parametrize("norm", ["none", "head", "flat"])
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_smoothing_flattens_the_pairs(kit, norm, alpha):
    """E6: after the pass the largest |k| of a pair is its old one to the power 1 - alpha."""
    case = kit.draw(kit.Config(norm=norm), 6)
    graph, params = kit.apply_passes(case, ["smooth-k"], {"smooth-k": {"alpha": alpha}})
    keys = _stored_keys(kit, case, graph, params)
    before = np.abs(_stored_keys(kit, case, case.graph, case.params)).max(axis=(0, 2))
    after = np.abs(keys).max(axis=(0, 2))
    pair_before, pair_after = (x.reshape(2, 2, 8).max(1) for x in (before, after))
    assert pair_after == pytest.approx(pair_before ** (1.0 - alpha))
    assert pair_before.max() / pair_before.min() > 3, "the channels were alike already"
    if alpha == 1.0:
        assert pair_after == pytest.approx(np.ones((2, 8)))


def test_smoothing_with_alpha_zero_is_the_identity(kit):
    case = kit.draw(kit.Config(), 6)
    graph, params = kit.apply_passes(case, ["smooth-k"], {"smooth-k": {"alpha": 0.0}})
    assert (params["kvant.k_smooth"] == 1.0).all()
    got, want = (kit.run(case, g, params)[0] for g in (graph, case.graph))
    assert np.array_equal(got, want)


def test_smoothing_ties_the_query_heads_of_a_group(kit):
    case = kit.draw(kit.Config(heads=2, group=3, bias=False), 6)
    graph, params = kit.apply_passes(case, ["smooth-k"])
    _, folded = kit.fold_weights(graph, params)
    factor = (folded["q_proj.weight"] / case.params["q_proj.weight"])[:, 0].reshape(2, 3, 16)
    assert factor == pytest.approx(np.repeat(params["kvant.k_smooth"][:, None], 3, axis=1))
    assert not np.allclose(factor[0], factor[1])


def test_a_channel_that_is_always_zero_is_not_scaled(kit):
    case = kit.draw(kit.Config(bias=False), 6)
    weights = dict(case.params)
    weights["k_proj.weight"] = weights["k_proj.weight"].copy()
    weights["k_proj.weight"][[16 + 3, 16 + 3 + 8]] = 0.0
    case = kit.Case(case.config, case.graph, weights, case.steps)
    graph, params = kit.apply_passes(case, ["smooth-k"])
    assert params["kvant.k_smooth"][1, [3, 11]].tolist() == [1.0, 1.0]
    assert np.isfinite(kit.run(case, graph, params)[0]).all()


def test_smoothing_without_rope_needs_no_pairs(kit):
    case = kit.draw(kit.Config(rope=False), 6)
    _, params = kit.apply_passes(case, ["smooth-k"], {"smooth-k": {"alpha": 1.0}})
    assert params["kvant.k_smooth"] == pytest.approx(kit.stats_of(case).k_absmax)


def test_smoothing_before_an_online_sort_uses_the_order_of_the_weights(kit):
    """A map that is folded acts before those that are online, whatever ran first."""
    case = kit.draw(kit.Config(), 8)
    _, alone = kit.apply_passes(case, ["smooth-k"])
    _, after = kit.apply_passes(case, ["sort-k", "smooth-k"])
    assert np.array_equal(alone["kvant.k_smooth"], after["kvant.k_smooth"])


def test_rotation_lowers_the_error_of_values_with_outliers(kit):
    """The reason for hadamard-v: an outlier channel no longer sets the step of the others."""
    case = kit.draw(kit.Config(value_width=16), 9)
    weights = dict(case.params)
    weights["v_proj.weight"] = weights["v_proj.weight"].copy()
    weights["v_proj.weight"][[3, 19]] *= 30.0
    case = kit.Case(case.config, case.graph, weights, case.steps)
    graph, params = kit.apply_passes(case, ["hadamard-v"])
    encoding = Int(4, "token", 16, params="f32")
    errors = []
    for g in (case.graph, graph):
        values = kit.run(case, g, params)[1]["v"]
        errors.append(float(((encoding.roundtrip(values) - values) ** 2).mean()))
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("name", ["smooth-k", "sort-k"])
def test_sizes_of_rotated_channels_are_refused(kit, name):
    case = kit.draw(kit.Config(projected=False), 6)
    graph, params = kit.apply_passes(case, ["hadamard-qk"])
    options = {"key": "rms"} if name == "sort-k" else {}
    with pytest.raises(KvantError) as refusal:
        PASSES[name].constants(graph, params, kit.stats_of(case), **options)
    assert refusal.value.code == "rotated-basis"
    assert "before the rotation" in refusal.value.fix


def test_a_sort_by_weights_after_a_rotation_is_refused(kit):
    case = kit.draw(kit.Config(), 6)
    graph, params = kit.apply_passes(case, ["hadamard-qk"])
    with pytest.raises(KvantError) as refusal:
        PASSES["sort-k"].constants(graph, params, None)
    assert refusal.value.code == "rotated-basis"


def test_v_order_is_that_of_rows_or_of_second_moments(kit):
    case = kit.draw(kit.Config(value_width=16), 2)
    make, stats = PASSES["sort-v"].constants, kit.stats_of(case)
    by_rows = make(case.graph, case.params, None)["kvant.v_order"]
    w, b = case.params["v_proj.weight"], case.params["v_proj.bias"]
    size = np.sqrt((w**2).sum(1) + b**2).reshape(2, 16)
    assert np.array_equal(by_rows, np.argsort(size, axis=-1, kind="stable"))
    by_rms = make(case.graph, case.params, stats, key="rms")["kvant.v_order"]
    assert np.array_equal(by_rms, np.argsort(stats.v_second_moment, axis=-1, kind="stable"))
    assert not np.array_equal(by_rows, by_rms)
