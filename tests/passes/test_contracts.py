"""Every pass keeps its promise on random graphs; an exact one changes nothing that can be seen."""

from dataclasses import replace

import numpy as np
import pytest

from kvant.ir.encodings import Int, Raw, Tokens
from kvant.ir.rewrite import Builder, rewrite
from kvant.ir.verify import verify
from kvant.passes import PASSES

SEEDS = range(24)
TOLERANCE = 1e-9
EXACT = [name for name, definition in PASSES.items() if definition.exact]
OPTIONS = {
    "smooth-k": [{}, {"alpha": 1.0}],
    "sort-k": [{}, {"key": "rms"}, {"key": "range"}, {"key": "fisher"}],
    "sort-v": [{}, {"key": "rms"}, {"key": "range"}, {"key": "fisher"}],
    "threshold-k": [{}, {"share": 0.05}],
    "threshold-v": [{}, {"share": 0.05}],
}
RECIPES = [
    ("smooth-k", "sort-k", "hadamard-v", "dead-code"),
    ("hadamard-v", "hadamard-qk", "dead-code"),
    ("sort-k", "smooth-k", "hadamard-qk"),
    ("sort-k", "hadamard-qk", "smooth-k"),
    ("sort-v", "hadamard-v", "sort-k"),
    ("hadamard-v", "sort-v", "smooth-k", "hadamard-qk"),
    ("smooth-k", "sort-k", "threshold-k", "sort-v", "threshold-v"),
    ("threshold-k", "hadamard-qk", "threshold-v", "hadamard-v"),
]


def _graph_with_dead_code(kit, case):
    """A captured graph has nothing dead, so give dead-code something to do."""

    def rule(b: Builder, op, args):
        if op.name == "attend":
            b.emit("hadamard", args[0])
        return None

    return kit.Case(case.config, rewrite(case.graph, rule), case.params, case.steps)


# What the random ones may miss: a single head, a norm on v, an output without projection.
AWKWARD = [
    {"heads": 1, "group": 4, "norm": "head", "offset": 1.0},
    {"heads": 1, "group": 1, "norm": "flat"},
    {"heads": 3, "group": 4, "norm": "head", "offset": 1.0, "window": 3, "softcap": 2.0},
    {"fused": True, "bias": True},
    {"style": "adjacent", "passed": 8, "norm": "layer", "bias": False},
    {"style": "adjacent", "passed": 4, "sinks": True, "softcap": 4.0},
    {"style": "half", "passed": 6, "norm": "flat", "window": 2, "sinks": True},
    {"rope": False, "norm": "layer", "group": 3},
]
AWKWARD_VALUES = [
    {"value_norm": True},
    {"out_projected": False},
    {"value_norm": True, "out_projected": False},
]


def _check(kit, name, config, seed, options):
    """Check one pass on one graph; return whether it changed the graph."""
    case = kit.draw(config, seed)
    if name == "dead-code":
        case = _graph_with_dead_code(kit, case)
    want, _ = kit.run(case, case.graph, case.params)
    graph, params = kit.apply_passes(case, [name], {name: options})
    got, _ = kit.run(case, graph, params)
    assert kit.relative(got, want) < TOLERANCE, (config, options)
    return graph != case.graph


@pytest.mark.usefixtures("lossless")
@pytest.mark.parametrize("name", EXACT)
def test_exact_pass_changes_nothing_that_can_be_seen(kit, name):
    configs = [kit.random_config(seed) for seed in SEEDS]
    configs += [kit.Config(**awkward) for awkward in AWKWARD]
    configs += [kit.Config(**awkward) for awkward in AWKWARD_VALUES if name != "sort-v"]
    changed = 0
    for seed, config in enumerate(configs):
        options = OPTIONS.get(name, [{}])
        changed += _check(kit, name, config, seed, options[seed % len(options)])
    assert changed == len(configs), f"{name} left graphs as they were: they prove nothing"


@pytest.mark.usefixtures("lossless")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("hadamard-v", {}),
        ("hadamard-qk", {}),
        ("smooth-k", {}),
        ("sort-k", {"key": "rms"}),
        ("sort-k", {"key": "fisher"}),
        ("threshold-k", {}),
        ("threshold-v", {}),
        ("dead-code", {}),
    ],
)
def test_exact_pass_on_kernels_without_a_model(kit, name, options):
    """Without projections every map stays online."""
    for seed in range(8):
        config = kit.Config(heads=1 + seed % 3, group=1 + seed % 4, projected=False)
        assert _check(kit, name, config, seed, options)


@pytest.mark.usefixtures("lossless")
def test_an_output_that_is_used_elsewhere_is_not_folded(kit):
    """The heads of the output are returned too: they must come back in the model's own basis."""
    case = kit.draw(kit.Config(), 3)
    heads = next(op.result for op in case.graph.ops if op.name == "attend")
    both = replace(case.graph, outputs=(*case.graph.outputs, heads))
    only = replace(case.graph, outputs=(heads,))
    graph = PASSES["hadamard-v"].run(both)
    verify(graph)
    for wanted, output in zip((case.graph, only), graph.outputs, strict=True):
        want, _ = kit.run(case, wanted, case.params)
        got, _ = kit.run(case, replace(graph, outputs=(output,)), case.params)
        assert kit.relative(got, want) < TOLERANCE


@pytest.mark.usefixtures("lossless")
@pytest.mark.parametrize("names", RECIPES)
def test_passes_compose_and_fold_into_weights(kit, names):
    for seed in SEEDS:
        case = kit.draw(kit.random_config(seed), seed)
        want, _ = kit.run(case, case.graph, case.params)
        graph, params = kit.apply_passes(case, names)
        got, _ = kit.run(case, graph, params)
        assert kit.relative(got, want) < TOLERANCE, case.config
        folded_graph, folded = kit.fold_weights(graph, params)
        assert len(folded_graph.ops) < len(graph.ops)
        got, _ = kit.run(case, folded_graph, folded)
        assert kit.relative(got, want) < TOLERANCE, case.config


def test_the_second_call_reads_history(kit):
    """The contract would miss a wrong cache if the second call did not read it."""
    case = kit.draw(kit.Config(), 0)
    _, state = kit.run(case, case.graph, case.params)
    alone = kit.Case(case.config, case.graph, case.params, case.steps[1:])
    both, _ = kit.run(case, case.graph, case.params)
    second, _ = kit.run(alone, case.graph, case.params)
    assert kit.relative(both[:, -second.shape[1] :], second) > 1e-3
    assert state["k"].shape[2] == both.shape[1]


def test_every_pass_has_a_promise():
    unproven = {name for name, definition in PASSES.items() if definition.unproven}
    assert unproven == set()
    for name, definition in PASSES.items():
        assert definition.exact or definition.bound is not None, name


INT4 = Tokens(rest=Int(4, "token", 4, params="f32"), sink=1)
NEARLY = Tokens(rest=Raw("f32"))


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(("k", "v"), [(INT4, INT4), (INT4, NEARLY), (NEARLY, INT4)])
def test_store_stays_within_its_bound(kit, softcap, k, v):
    """Each stream alone too, so that each term of the bound is needed."""
    moved = 0.0
    for seed in range(8):
        sizes = {"heads": 2, "group": 2, "width": 8, "value_width": 8}
        case = kit.draw(kit.Config(**sizes, projected=False, softcap=softcap), seed)
        graph = PASSES["store"].run(case.graph, k=k, v=v)
        assert graph != case.graph
        want, _ = kit.run(case, case.graph, {})
        got, state = kit.run(case, graph, {})
        new = case.steps[1]["q"].shape[2]
        bound = _bound(case, state, {"k": k, "v": v}, new)
        difference = np.abs(got - want)[:, :, -new:]
        assert (difference <= bound + 1e-6).all()
        moved = max(moved, float((difference / bound).max()))
    assert moved > 0.01, "the bound is so wide that it proves nothing"


def _bound(case, state, encodings, new):
    """Return the bound for the second call: its own tokens are read as given."""
    group = case.config.group
    given, read = [], []
    for role, encoding in encodings.items():
        x = np.repeat(state[role], group, axis=1)
        given.append(x)
        read.append(np.concatenate((encoding.simulate(x[:, :, :-new]), x[:, :, -new:]), axis=2))
    scale = case.graph.find("attend")[0].attr("scale")
    return PASSES["store"].bound(case.steps[1]["q"], *given, *read, scale)
