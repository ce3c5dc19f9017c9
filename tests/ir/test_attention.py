"""attend: against a loop over every query and key; masks, poison, and rounded queries."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvant.ir.attention import attend, round_queries
from kvant.ir.errors import KvantError


def by_loops(q, k, v, lengths, scale, causal, softcap, window, sinks):
    batch, q_heads, queries, _ = q.shape
    heads = k.shape[1]
    out = np.zeros((batch, q_heads, queries, v.shape[3]))
    lse = np.full((batch, q_heads, queries), -math.inf)
    for b in range(batch):
        for h in range(q_heads):
            for i in range(queries):
                position = int(lengths[b]) - queries + i
                scores, values = [], []
                for j in range(int(lengths[b])):
                    hidden = position < 0 or (causal and j > position)
                    if hidden or (window is not None and j <= position - window):
                        continue
                    g = h // (q_heads // heads)
                    s = scale * sum(a * c for a, c in zip(q[b, h, i], k[b, g, j], strict=True))
                    scores.append(softcap * math.tanh(s / softcap) if softcap else s)
                    values.append(v[b, g, j])
                if scores:
                    sink = [] if sinks is None else [sinks[h]]
                    total = math.fsum(math.exp(s) for s in [*scores, *sink])
                    lse[b, h, i] = math.log(total)
                    out[b, h, i] = sum(
                        math.exp(s) / total * x for s, x in zip(scores, values, strict=True)
                    )
    return out, lse


def random_case(seed, batch=2, q_heads=4, heads=2, queries=3, keys=7, width=5, v_width=6):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((batch, q_heads, queries, width))
    k = rng.standard_normal((batch, heads, keys, width))
    v = rng.standard_normal((batch, heads, keys, v_width))
    return q, k, v


@settings(max_examples=120, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 3)]),
    st.integers(1, 4),
    st.lists(st.integers(0, 7), min_size=1, max_size=3),
    st.booleans(),
    st.sampled_from([None, 1.5, 30.0]),
    st.sampled_from([None, 1, 2, 5, 50]),
    st.sampled_from([None, 0.0, 3.0]),
)
def test_attend_is_the_loop_over_queries_and_keys(
    seed, head_counts, queries, lengths, causal, softcap, window, sink
):
    q, k, v = random_case(seed, len(lengths), *head_counts, queries)
    sinks = None if sink is None else sink + np.random.default_rng(seed).normal(size=q.shape[1])
    options = {"scale": 0.7, "causal": causal, "softcap": softcap, "window": window}
    options["sinks"] = sinks
    got = attend(q, k, v, lengths=np.array(lengths), **options)
    expected = by_loops(q, k, v, lengths, **options)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == np.float64
        assert np.allclose(a, b, rtol=1e-12, atol=1e-12)


def test_query_head_h_reads_kv_head_h_over_g():
    q, k, v = random_case(0, q_heads=6, heads=3)
    v = np.broadcast_to(np.arange(3.0)[None, :, None, None], v.shape)
    out, _ = attend(q, k, v, lengths=np.array([7, 7]), scale=1.0)
    assert np.allclose(out[0, :, 0, 0], [0, 0, 1, 1, 2, 2])


def test_queries_before_the_first_token_give_zeros_and_minus_infinity():
    q, k, v = random_case(1)
    for causal, sinks in ((True, None), (False, None), (True, np.ones(4))):
        options = {"causal": causal, "sinks": sinks}
        out, lse = attend(q, k, v, lengths=np.array([0, 2]), scale=1.0, **options)
        assert not out[0].any()
        assert np.isneginf(lse[0]).all()
        assert not out[1, :, 0].any()
        assert np.isneginf(lse[1, :, 0]).all()
        assert np.isfinite(lse[1, :, 1:]).all()


def test_no_keys_at_all():
    out, lse = attend(*random_case(1, keys=0), lengths=np.array([0, 0]), scale=1.0)
    assert out.shape == (2, 4, 3, 6)
    assert not out.any()
    assert np.isneginf(lse).all()


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e300])
def test_what_lies_past_the_length_changes_no_bit(poison):
    q, k, v = random_case(2)
    lengths = np.array([4, 0])
    clean = attend(q, k, v, lengths=lengths, scale=0.5, softcap=20.0)
    for b, length in enumerate(lengths):
        k[b, :, length:] = poison
        v[b, :, length:] = poison
    with np.errstate(all="raise"):
        dirty = attend(q, k, v, lengths=lengths, scale=0.5, softcap=20.0)
    for a, b in zip(clean, dirty, strict=True):
        assert a.tobytes() == b.tobytes()


def test_sinks_far_from_the_scores_do_not_overflow():
    q, k, v = random_case(3)
    with np.errstate(over="raise", invalid="raise"):
        high = attend(q, k, v, lengths=np.array([7, 7]), scale=1.0, sinks=np.full(4, 1e4))
        low = attend(q, k, v, lengths=np.array([7, 7]), scale=1.0, sinks=np.full(4, -1e4))
    assert not high[0].any()
    assert (high[1] == 1e4).all()
    plain = attend(q, k, v, lengths=np.array([7, 7]), scale=1.0)
    for a, b in zip(low, plain, strict=True):
        assert np.array_equal(a, b)


def test_sinks_of_another_number_of_heads_are_refused():
    with pytest.raises(KvantError) as caught:
        attend(*random_case(0), lengths=np.array([7, 7]), scale=1.0, sinks=np.zeros(2))
    assert str(caught.value) == (
        "sinks (2,) with 4 query heads\n  where: attend\n"
        "  fix: pass one sink for each query head  [attend-shape]"
    )


def test_large_scores_do_not_overflow():
    q, k, v = random_case(3)
    out, lse = attend(q * 1e3, k * 1e3, v, lengths=np.array([7, 7]), scale=1.0)
    assert np.isfinite(out).all()
    assert np.isfinite(lse).all()


def test_parts_are_merged_by_their_lse():
    q, k, v = random_case(4, queries=1)
    whole, lse = attend(q, k, v, lengths=np.array([7, 7]), scale=1.0)
    parts = [(k[:, :, s], v[:, :, s]) for s in (slice(0, 3), slice(3, 7))]
    done = [
        attend(q, *p, lengths=np.full(2, p[0].shape[2]), scale=1.0, causal=False) for p in parts
    ]
    weights = [np.exp(part_lse - lse)[..., None] for _, part_lse in done]
    merged = sum(w * out for w, (out, _) in zip(weights, done, strict=True))
    assert np.allclose(merged, whole, rtol=1e-12)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"q": np.zeros((2, 3, 3, 5))}, "q (2, 3, 3, 5)"),
        ({"k": np.zeros((2, 2, 6, 5))}, "k (2, 2, 6, 5)"),
        ({"k": np.zeros((2, 2, 7, 4))}, "k (2, 2, 7, 4)"),
        ({"lengths": np.array([7])}, "lengths (1,)"),
        ({"lengths": np.array([7, 8])}, "lengths [7, 8] with 7 keys"),
        ({"lengths": np.array([-1, 7])}, "lengths [-1, 7] with 7 keys"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, what):
    q, k, v = random_case(5)
    case = {"q": q, "k": k, "v": v, "lengths": np.array([7, 7])} | change
    with pytest.raises(KvantError) as caught:
        attend(case["q"], case["k"], case["v"], lengths=case["lengths"], scale=1.0)
    assert caught.value.code == "attend-shape"
    assert what in caught.value.what


def test_queries_are_rounded_to_multiples_of_their_own_step():
    q = np.array([[[[1.0, -2.0, 0.5]], [[0.0, 0.0, 0.0]], [[3e-30, 1e-30, -7e-30]]]])
    got = round_queries(q, 8)
    assert got[0, 0, 0].tolist() == [2.0 / 127 * 64, -2.0 / 127 * 127, 2.0 / 127 * 32]
    assert not got[0, 1].any()
    step = 7e-30 / 127
    assert np.allclose(got[0, 2, 0] / step, [54, 18, -127], rtol=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([8, 16]))
def test_rounding_queries_costs_at_most_half_a_step(seed, bits):
    q = np.random.default_rng(seed).standard_normal((2, 3, 4, 8))
    step = np.abs(q).max(-1, keepdims=True) / {8: 127, 16: 32_639}[bits]
    error = np.abs(round_queries(q, bits) - q)
    assert (error <= 0.5 * step * (1 + 1e-9)).all()
    assert error.max() > 0.1 * step.min()
