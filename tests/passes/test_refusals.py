"""What the passes refuse, with the whole text of the refusal; and what they leave alone."""

import numpy as np
import pytest

from kvant.ir.encodings import Bfp, Int, Raw, Tokens
from kvant.ir.errors import KvantError
from kvant.passes import PASSES
from kvant.passes.sites import find_site
from kvant.passes.store import check_quantizes

INT4 = Int(4, "token", 8)
TOKENS = Tokens(rest=INT4)


def _refusal(call, *args, **options):
    with pytest.raises(KvantError) as refusal:
        call(*args, **options)
    return refusal.value


@pytest.mark.parametrize("name", ["hadamard-v", "hadamard-qk"])
def test_head_size_without_a_hadamard_matrix(kit, name):
    graph = kit.build(kit.Config(width=12, value_width=12))
    refused = _refusal(PASSES[name].run, graph)
    assert refused.code == "unsupported-head-size"
    assert str(refused) == (
        "a head of 12 channels has no Walsh-Hadamard matrix here\n"
        "  where: graph @attention\n"
        "  fix: leave the rotation out; legal head sizes are the powers of two"
        "  [unsupported-head-size]"
    )


ONCE = ["hadamard-v", "hadamard-qk", "smooth-k", "sort-k", "sort-v", "threshold-k", "threshold-v"]


@pytest.mark.parametrize("name", ONCE)
def test_a_pass_runs_once(kit, name):
    graph = PASSES[name].run(kit.build(kit.Config()))
    refused = _refusal(PASSES[name].run, graph)
    assert refused.code == "already-applied"
    assert refused.fix == "name the pass once in the recipe"


@pytest.mark.parametrize(
    ("name", "options", "what"),
    [
        ("smooth-k", {"alpha": 1.5}, "alpha is 1.5"),
        ("smooth-k", {"alpha": "half"}, "alpha is 'half'"),
        ("smooth-k", {"alpha": float("nan")}, "alpha is nan"),
        ("sort-k", {"key": "norm"}, "key is 'norm'"),
        ("sort-v", {"key": "norm"}, "key is 'norm'"),
        ("store", {"k": TOKENS, "v": TOKENS, "window": "drop"}, "window is 'drop'"),
    ],
)
def test_bad_options(kit, name, options, what):
    refused = _refusal(PASSES[name].run, kit.build(kit.Config()), **options)
    assert (refused.code, refused.what, refused.where) == ("bad-option", what, f"pass {name}")


def test_values_from_outside_cannot_be_sorted(kit):
    refused = _refusal(PASSES["sort-v"].run, kit.build(kit.Config(projected=False)))
    assert refused.code == "illegal-fold"
    assert "there is no projection" in refused.what


@pytest.mark.parametrize(("name", "options"), [("smooth-k", {}), ("sort-k", {"key": "rms"})])
def test_calibrated_passes_need_statistics(kit, name, options):
    case = kit.draw(kit.Config(), 0)
    assert PASSES[name].needs_stats(options)
    refused = _refusal(PASSES[name].constants, case.graph, case.params, None, **options)
    assert refused.code == "needs-stats"


def test_a_sort_by_weights_needs_no_statistics():
    assert not PASSES["sort-k"].needs_stats({"key": "weight"})
    assert not PASSES["sort-k"].needs_stats({})
    assert not PASSES["hadamard-v"].needs_stats({})


def test_a_sort_by_weights_needs_weights(kit):
    case = kit.draw(kit.Config(), 0)
    refused = _refusal(PASSES["sort-k"].constants, case.graph, {}, None)
    assert refused.code == "needs-weights"
    assert "k_proj.weight" in refused.what
    kernel = kit.build(kit.Config(projected=False))
    assert _refusal(PASSES["sort-k"].constants, kernel, {}, None).code == "no-projection"


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda order: order[:, :-1], "its shape is (2, 15)"),
        (lambda order: order.astype(float), "its type is float64"),
        (lambda order: np.where(order == 3, 4, order), "the row of head 0 is no permutation"),
    ],
)
def test_an_order_that_is_no_permutation(kit, spoil, what):
    case = kit.draw(kit.Config(), 0)
    made = PASSES["sort-k"].constants(case.graph, case.params, None)
    spoilt = {"kvant.k_order": spoil(made["kvant.k_order"])}
    refused = _refusal(PASSES["sort-k"].check_constants, case.graph, spoilt)
    assert refused.code == "bad-constant"
    assert what in refused.what
    assert _refusal(PASSES["sort-k"].check_constants, case.graph, {}).code == "bad-constant"


@pytest.mark.parametrize("value", [0.0, -1.0, np.inf, np.nan])
def test_a_scale_that_is_no_positive_number(kit, value):
    case = kit.draw(kit.Config(), 0)
    scales = np.ones((2, 16))
    scales[0, 0] = scales[0, 8] = value
    check = PASSES["smooth-k"].check_constants
    refused = _refusal(check, case.graph, {"kvant.k_smooth": scales})
    assert "not a positive number" in refused.what


@pytest.mark.parametrize(
    ("tokens", "limit"),
    [
        (Tokens(rest=INT4, sink=4, recent=28), 32),
        (Tokens(rest=INT4, sink=32), 32),
        (Tokens(rest=INT4, sink=32, recent=8, flush="block"), 32),
        (Tokens(rest=Raw("f32"), recent=8), None),
    ],
)
def test_an_encoding_that_quantizes_nothing(tokens, limit):
    refused = _refusal(check_quantizes, "k", tokens, limit)
    assert (refused.code, refused.where) == ("quantizes-nothing", "stream k")


@pytest.mark.parametrize(
    ("tokens", "limit"),
    [
        (Tokens(rest=INT4, sink=4, recent=27), 32),
        (Tokens(rest=INT4, recent=32, flush="block"), 32),
        (Tokens(rest=Raw("f32")), 32),
        (Tokens(rest=Raw("bf16"), recent=8), None),
    ],
)
def test_an_encoding_that_quantizes_something(tokens, limit):
    check_quantizes("k", tokens, limit)


def test_store_and_windows(kit):
    graph = kit.build(kit.Config(window=32))
    run = PASSES["store"].run
    assert run(graph, k=TOKENS, v=TOKENS) is graph  # it is in f32 already
    ring = run(graph, k=TOKENS, v=TOKENS, dtype="bf16")
    stores = [op.attr("store") for op in ring.ops if op.name == "cache_write"]
    assert stores == [Tokens(rest=Raw("bf16"), raw=Raw("bf16"))] * 2
    assert run(graph, k=TOKENS, v=TOKENS, window="quantize") != graph
    wide = Tokens(rest=INT4, recent=32)
    assert run(graph, k=wide, v=TOKENS) is graph
    refused = _refusal(run, graph, k=wide, v=TOKENS, window="quantize")
    assert refused.code == "quantizes-nothing"
    assert refused.what == "attention sees 32 tokens, and sink + recent = 32 of them stay raw"
    plain = kit.build(kit.Config())
    assert run(plain, k=wide, v=wide) != plain
    assert _refusal(run, plain, k=wide, v=wide, context=32).code == "quantizes-nothing"


def test_store_checks_the_head_size_of_each_stream(kit):
    graph = kit.build(kit.Config(width=16, value_width=8))
    sixteen, run = Tokens(rest=Bfp(4, 16)), PASSES["store"].run
    assert run(graph, k=sixteen, v=TOKENS) != graph
    refused = _refusal(run, graph, k=sixteen, v=sixteen)
    assert (refused.code, refused.where) == ("group-does-not-divide", "stream v")


def test_store_of_what_is_stored_changes_nothing(kit):
    graph = PASSES["store"].run(kit.build(kit.Config()), k=TOKENS, v=TOKENS)
    assert PASSES["store"].run(graph, k=TOKENS, v=TOKENS) is graph


def test_two_attention_sites_are_refused(kit):
    from kvant.ir.rewrite import rewrite

    def rule(b, op, args):
        return b.emit("attend", *args, **dict(op.attrs)) if op.name == "attend" else None

    graph = kit.build(kit.Config())
    twice = rewrite(graph, lambda b, op, args: (rule(b, op, args), None)[1])
    assert _refusal(find_site, twice).code == "several-attention-sites"
