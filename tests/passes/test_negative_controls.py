"""Deliberately wrong rewrites. The contract check must catch every one of them by its numbers.

Where the verifier or `check_constants` can see the mistake too, it must refuse it with the reason.
"""

import numpy as np
import pytest

from kvant.ir.errors import KvantError
from kvant.ir.graph import Graph
from kvant.ir.maps import Gather, Hadamard
from kvant.ir.rewrite import rewrite
from kvant.ir.rope import partner
from kvant.ir.types import TensorType
from kvant.ir.verify import verify
from kvant.passes import PASSES
from kvant.passes.sites import emit_write, find_site, fold_points

TOLERANCE, CAUGHT = 1e-9, 1e-3
pytestmark = pytest.mark.usefixtures("lossless")


def _error(kit, case, graph, params):
    want, _ = kit.run(case, case.graph, case.params)
    got, _ = kit.run(case, graph, params)
    return kit.relative(got, want)


def _is_refused(graph: Graph, reason: str) -> bool:
    with pytest.raises(KvantError) as refusal:
        verify(graph, after="the wrong pass")
    return refusal.value.code == "ill-formed-graph" and reason in str(refusal.value)


def _fold_rows(graph: Graph, name: str, new, order: str | None = None) -> Graph:
    """Edit the rows of W_q and W_k and their biases, whatever stands between them and the cache."""
    site = find_site(graph)
    linears = {op: path for path in (site.q, site.k) for op in path.ops if op.name == "linear"}

    def rule(b, op, args):
        if op in linears:
            path = linears[op]
            attrs = {"heads": path.heads} | ({"repeat": path.repeat} if order else {})
            shape = TensorType("i64", (site.heads, site.k.width))
            constant = (b.param(order, shape),) if order else ()
            edited = [b.emit(name, w, *constant, **attrs) for w in args[1:]]
            return b.copy(op, (args[0], *edited))[0]
        return emit_write(b, op, args[0], (new,)) if op == site.k_write else None

    return rewrite(graph, rule)


def test_unpaired_smoothing(kit):
    case = kit.draw(kit.Config(), 3)
    graph, params = kit.apply_passes(case, ["smooth-k"])
    assert _error(kit, case, graph, params) < TOLERANCE
    untied = params["kvant.k_smooth"].copy()
    untied[1, 2] *= 1.5
    wrong = params | {"kvant.k_smooth": untied}
    assert _error(kit, case, graph, wrong) > CAUGHT
    with pytest.raises(KvantError) as refusal:
        PASSES["smooth-k"].check_constants(graph, wrong)
    assert refusal.value.code == "bad-constant"
    assert "head 1 scales channel 2 by" in refusal.value.what
    assert "differs inside a RoPE pair does not commute with RoPE" in refusal.value.what


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        ({}, ("adjacent", 16)),
        ({"style": "adjacent"}, ("half", 16)),
        ({"passed": 8}, ("half", 16)),
        ({"passed": 8}, ("adjacent", 8)),
        ({"style": "adjacent", "passed": 8}, ("half", 8)),
        ({"style": "adjacent", "passed": 8, "norm": "layer"}, ("half", 16)),
    ],
)
def test_smoothing_of_another_models_pairs(kit, config, wrong):
    """Pairs of another style, or of more channels than RoPE turns: exact at position 0 only."""
    case = kit.draw(kit.Config(**config), 3)
    graph, params = kit.apply_passes(case, ["smooth-k"])
    assert _error(kit, case, graph, params) < TOLERANCE
    size = np.abs(kit.stats_of(case).k_absmax)
    tied = np.sqrt(np.maximum(size, size[:, partner(*wrong, 16)]))
    untrue = params | {"kvant.k_smooth": tied}
    assert _error(kit, case, graph, untrue) > CAUGHT
    with pytest.raises(KvantError, match="RoPE pair"):
        PASSES["smooth-k"].check_constants(graph, untrue)


def test_channels_that_pass_through_need_no_partner(kit):
    case = kit.draw(kit.Config(style="adjacent", passed=8), 3)
    graph, params = kit.apply_passes(case, ["smooth-k"])
    free = params["kvant.k_smooth"].copy()
    free[:, 8:] *= np.arange(1.0, 9.0)
    moved = params | {"kvant.k_smooth": free}
    PASSES["smooth-k"].check_constants(graph, moved)
    assert _error(kit, case, graph, moved) < TOLERANCE


def test_rotation_folded_before_a_centered_norm(kit):
    case = kit.draw(kit.Config(norm="layer", rope=False), 11)
    wrong = _fold_rows(case.graph, "hadamard_rows", Hadamard(16))
    assert _error(kit, case, wrong, case.params) > CAUGHT
    assert _is_refused(wrong, "a rotation does not commute with center")


@pytest.mark.parametrize(
    ("name", "constant"),
    [("smooth-k", "k_smooth"), ("sort-k", "k_order"), ("threshold-k", "k_threshold")],
)
def test_wrong_head_map(kit, name, constant):
    """Query head h reads key head h // group; here it takes the map of h % heads."""
    case = kit.draw(kit.Config(heads=2, group=3), 5)
    graph, params = kit.apply_passes(case, [name])
    key = f"kvant.{constant}"
    heads = np.arange(6) % 2
    wrong = params | {"kvant.wrong": params[key][heads]}

    def rule(b, op, args):
        if op.name in ("scale_rows", "gather", "scale") and op.attr("repeat") == 3:
            table = TensorType(op.args[1].tensor.dtype, wrong["kvant.wrong"].shape)
            given = dict(op.attrs) | {"repeat": 1}
            return b.emit(op.name, args[0], b.param("kvant.wrong", table), **given)
        return None

    mapped = rewrite(graph, rule)
    assert mapped != graph
    assert _error(kit, case, mapped, wrong) > CAUGHT
    assert _is_refused(mapped, "the queries are in")


def test_wrong_head_map_on_the_output(kit):
    case = kit.draw(kit.Config(heads=2, group=3), 5)
    graph, params = kit.apply_passes(case, ["sort-v"])
    wrong = params | {"kvant.wrong": params["kvant.v_order"][np.arange(6) % 2]}

    def rule(b, op, args):
        if op.name == "gather_cols":
            order = b.param("kvant.wrong", TensorType("i64", wrong["kvant.wrong"].shape))
            return b.emit("gather_cols", args[0], order, heads=6, repeat=1)
        return None

    assert _error(kit, case, rewrite(graph, rule), wrong) > CAUGHT
    assert _is_refused(rewrite(graph, rule), "mapped back from")


def test_sort_folded_through_rope(kit):
    case = kit.draw(kit.Config(), 7)
    order = PASSES["sort-k"].constants(case.graph, case.params, None)
    wrong = _fold_rows(case.graph, "gather_rows", Gather("kvant.k_order"), "kvant.k_order")
    assert _error(kit, case, wrong, {**case.params, **order}) > CAUGHT
    assert _is_refused(wrong, "rope turns each channel pair at its own frequency")
    # Without RoPE the same fold is right, so it is RoPE that the check has caught.
    nope = kit.draw(kit.Config(rope=False), 7)
    right = _fold_rows(nope.graph, "gather_rows", Gather("kvant.k_order"), "kvant.k_order")
    assert _error(kit, nope, right, {**nope.params, **order}) < TOLERANCE


def test_rotation_folded_across_qk_norm(kit):
    case = kit.draw(kit.Config(norm="head", rope=False), 11)
    wrong = _fold_rows(case.graph, "hadamard_rows", Hadamard(16))
    assert _error(kit, case, wrong, case.params) > CAUGHT
    assert _is_refused(wrong, "a rotation does not commute with rms_norm")
    plain = kit.draw(kit.Config(rope=False), 11)
    right = _fold_rows(plain.graph, "hadamard_rows", Hadamard(16))
    assert _error(kit, plain, right, plain.params) < TOLERANCE


def test_rotation_folded_through_rope(kit):
    case = kit.draw(kit.Config(), 11)
    wrong = _fold_rows(case.graph, "hadamard_rows", Hadamard(16))
    assert _error(kit, case, wrong, case.params) > CAUGHT
    assert _is_refused(wrong, "a rotation does not commute with rope")


def test_smoothing_folded_before_qk_norm(kit):
    """A scale of W_k is normalised away: it must go in the norm's weight."""
    case = kit.draw(kit.Config(norm="head", rope=False), 13)
    graph, params = kit.apply_passes(case, ["smooth-k"])
    assert _error(kit, case, graph, params) < TOLERANCE
    shape = TensorType("f64", (2, 16))

    def rule(b, op, args):
        if op.name == "linear" and op.result.tensor.shape[-1] == 32:
            table = b.param("kvant.k_smooth", shape)
            edited = [b.emit("scale_rows", w, table, heads=2, inverse=True) for w in args[1:]]
            return b.copy(op, (args[0], *edited))[0]
        if op.name == "scale_rows" and op.attr("inverse"):
            return args[0]
        return None

    wrong = rewrite(graph, rule)
    assert _error(kit, case, wrong, params) > CAUGHT
    assert _is_refused(wrong, "rms_norm divides by the scaled norm")


@pytest.mark.parametrize("name", ["smooth-k", "hadamard-v", "sort-v", "threshold-v"])
def test_forgotten_bias(kit, name):
    case = kit.draw(kit.Config(width=16, value_width=16, bias=True), 17)
    graph, params = kit.apply_passes(case, [name])

    def rule(b, op, args):
        is_bias = op.name.endswith("_rows") and len(op.result.tensor.shape) == 1
        return args[0] if is_bias else None

    wrong = rewrite(graph, rule)
    assert wrong != graph
    assert _error(kit, case, wrong, params) > CAUGHT
    assert _is_refused(wrong, "but the bias in ()")


@pytest.mark.parametrize(
    ("name", "forgotten", "reason"),
    [
        ("hadamard-qk", "hadamard", "the queries are in"),
        ("hadamard-v", "hadamard_cols", "mapped back from"),
        ("sort-v", "gather_cols", "mapped back from"),
        ("threshold-k", "scale", "the queries are in"),
        ("threshold-v", "scale_cols", "mapped back from"),
    ],
)
def test_forgotten_side(kit, name, forgotten, reason):
    """The map without its dual on the queries or its inverse on the output."""
    case = kit.draw(kit.Config(), 19)
    graph, params = kit.apply_passes(case, [name])

    def rule(b, op, args):
        is_online = op.name in ("hadamard", "scale")
        is_query = not is_online or op.result.tensor.shape[1] == case.config.q_heads
        return args[0] if op.name == forgotten and is_query else None

    wrong = rewrite(graph, rule)
    assert wrong != graph
    assert _error(kit, case, wrong, params) > CAUGHT
    assert _is_refused(wrong, reason)


def test_forgotten_norm_offset(kit):
    """Gemma's norms multiply by 1 + w: scaling w alone is wrong."""
    case = kit.draw(kit.Config(norm="head", offset=1.0), 23)
    graph, params = kit.apply_passes(case, ["smooth-k"])
    assert _error(kit, case, graph, params) < TOLERANCE
    shifts = ("kvant.q_norm_shift", "kvant.k_norm_shift")
    wrong = params | {name: np.zeros_like(params[name]) for name in shifts}
    assert _error(kit, case, graph, wrong) > CAUGHT


@pytest.mark.parametrize(
    ("config", "role", "kind", "reason"),
    [
        ({}, "k", "scale", "differs inside a RoPE pair"),
        ({}, "k", "rotation", "a rotation does not commute with rope"),
        ({}, "k", "permutation", "rope turns each channel pair at its own frequency"),
        ({}, "k", "shift", "depend on the position"),
        ({"norm": "head", "rope": False}, "k", "rotation", "does not commute with rms_norm"),
        ({"norm": "flat", "rope": False}, "q", "permutation", "would have to move"),
        ({"rope": False, "softcap": 30.0}, "k", "shift", "under a softcap"),
        ({"rope": False}, "k", "shift", "is not built"),
        ({"projected": False}, "v", "rotation", "there is no projection"),
        ({"projected": False}, "out", "rotation", "does not go straight into a projection"),
    ],
)
def test_illegal_fold_is_refused_with_the_reason(kit, config, role, kind, reason):
    site = find_site(kit.build(kit.Config(**config)))
    with pytest.raises(KvantError) as refusal:
        fold_points(getattr(site, role), kind)
    assert refusal.value.code == "illegal-fold"
    assert reason in refusal.value.what
