import numpy as np
import pytest

from kvant.ir.errors import KvantError
from kvant.ir.evaluate import evaluate
from kvant.ir.rewrite import rewrite
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
