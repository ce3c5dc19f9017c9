import functools

import numpy as np
import pytest

from kvant.ir.errors import KvantError
from kvant.ir.evaluate import evaluate
from kvant.ir.text import parse, print_graph
from kvant.ir.verify import verify


@pytest.mark.parametrize("seed", range(40))
def test_random_layers_verify_print_and_run(random_attention_graph, seed):
    graph, inputs, params, dims = random_attention_graph(np.random.default_rng(seed))
    verify(graph)
    assert parse(print_graph(graph)) == graph
    (y,), state = evaluate(graph, inputs, params)
    assert y.shape == (dims["batch"], dims["tokens"], dims["hidden"])
    assert np.isfinite(y).all()
    assert state["k"].shape == (dims["batch"], dims["kv_heads"], dims["tokens"], dims["head_dim"])


@pytest.mark.parametrize("seed", range(10))
def test_tokens_one_by_one_give_what_all_at_once_give(random_attention_graph, seed):
    rng = np.random.default_rng(seed)
    graph, inputs, params, _ = random_attention_graph(rng, tokens=7)
    (whole,), state = evaluate(graph, inputs, params)
    steps, step_state = [], None
    for t in range(7):
        now = {name: x[:, t : t + 1] for name, x in inputs.items()}
        (y,), step_state = evaluate(graph, now, params, step_state)
        steps.append(y)
    np.testing.assert_allclose(np.concatenate(steps, 1), whole, atol=2e-6)
    np.testing.assert_allclose(step_state["k"], state["k"], atol=1e-12)


def test_arrays_that_do_not_fit_are_refused(random_attention_graph):
    rng = np.random.default_rng(3)
    graph, inputs, params, _ = random_attention_graph(rng, hidden=8, batch=2, rope=True, tokens=3)
    cases = {
        "no array is given for x; did you mean xx? known: cos sin xx": (
            {**{k: v for k, v in inputs.items() if k != "x"}, "xx": inputs["x"]},
            params,
        ),
        "x does not fit: 9 is not 8": ({**inputs, "x": np.zeros((2, 3, 9))}, params),
        "cos does not fit: T is 3 and 4": ({**inputs, "cos": np.zeros((2, 4, 1))}, params),
        "x does not fit: it holds int64": ({**inputs, "x": np.zeros((2, 3, 8), int)}, params),
        "x does not fit: f32[2, 3] is not [B, T, 8]": ({**inputs, "x": np.zeros((2, 3))}, params),
    }
    for what, (given, weights) in cases.items():
        with pytest.raises(KvantError) as error:
            evaluate(graph, given, weights)
        assert error.value.what == what
    assert error.value.code == "wrong-array"
    with pytest.raises(KvantError) as error:
        evaluate(graph, inputs, {})
    assert error.value.code == "missing-array"
    assert str(error.value) == (
        "no array is given for q_proj.weight; known: none\n"
        "  where: the array q_proj.weight\n"
        f"  fix: pass an array of type {graph.params()['q_proj.weight']}  [missing-array]"
    )


def test_the_dtype_is_the_callers(random_attention_graph):
    graph, inputs, params, _ = random_attention_graph(np.random.default_rng(5), position=0)
    (exact,), _ = evaluate(graph, inputs, params)
    (single,), state = evaluate(graph, inputs, params, dtype=np.float32)
    assert exact.dtype == np.float64
    assert single.dtype == np.float32
    assert state["k"].dtype == np.float32
    error = np.abs(single - exact).max() / np.abs(exact).max()
    assert 0 < error < 1e-5


def test_a_wrong_position_is_seen_by_rope(random_attention_graph):
    rng = np.random.default_rng(7)
    graph, inputs, params, _ = random_attention_graph(rng, rope=True, tokens=6, window=None)
    (want,), _ = evaluate(graph, inputs, params)
    other = {**inputs, "cos": inputs["cos"][:, ::-1], "sin": inputs["sin"][:, ::-1]}
    assert np.abs(evaluate(graph, other, params)[0][0] - want).max() > 1e-3


@pytest.mark.usefixtures("lossless")
@pytest.mark.parametrize(("style", "passed"), [("half", 0), ("adjacent", 0), ("adjacent", 2)])
def test_only_relative_positions_count_under_rope(random_attention_graph, style, passed):
    rng = np.random.default_rng(11)
    options = {"rope": True, "tokens": 4, "head_dim": 8, "hidden": 8, "batch": 1}
    make = functools.partial(
        random_attention_graph, rng, **options, rope_style=style, passed=passed
    )
    graph, near, params, _ = make(position=0)
    far = make(position=1_000_003)[1]
    far["x"] = near["x"]
    assert np.abs(far["cos"] - near["cos"]).max() > 0.1
    want, got = evaluate(graph, near, params)[0][0], evaluate(graph, far, params)[0][0]
    np.testing.assert_allclose(got, want, atol=1e-8)


def test_every_variation_is_drawn(random_attention_graph):
    drawn = [random_attention_graph(np.random.default_rng(s))[3] for s in range(60)]
    for name in ("bias", "qk_norm", "rope", "out_bias", "sinks"):
        assert {d[name] for d in drawn} == {True, False}, name
    assert {d["group"] for d in drawn} == {1, 2, 3, 4}
    assert {(d["rope_style"], d["passed"]) for d in drawn} >= {("half", 0), ("adjacent", 2)}
    for name in ("softcap", "window"):
        assert {d[name] is None for d in drawn} == {True, False}, name
    with pytest.raises(ValueError, match="no such variation"):
        random_attention_graph(np.random.default_rng(0), head_width=4)
