"""The table of operations: each row's type rule, meaning and attributes agree."""

import numpy as np
import pytest

from kvant.ir import ops, rope
from kvant.ir.encodings.affine import Int
from kvant.ir.encodings.raw import Raw
from kvant.ir.encodings.tokens import Tokens
from kvant.ir.errors import KvantError
from kvant.ir.evaluate import evaluate
from kvant.ir.ops import OPS
from kvant.ir.rewrite import Builder
from kvant.ir.types import TensorType
from kvant.ir.verify import verify

RNG = np.random.default_rng(0)
ORDER = np.array([[2, 0, 3, 1], [1, 0, 2, 3]])
SCALES = RNG.uniform(0.5, 2, size=(2, 4))
STORE = Tokens(rest=Raw("f32"))


def run(name, *arrays, state=None, **attrs):
    """Return what the op gives, after the verifier and the shapes of the type rule have agreed."""
    b = Builder("g")
    kinds = ["i64" if np.issubdtype(x.dtype, np.integer) else "f32" for x in arrays]
    values = [
        b.input(f"x{i}", TensorType(kind, x.shape))
        for i, (kind, x) in enumerate(zip(kinds, arrays, strict=True))
    ]
    made = b.emit_all(name, *values, **attrs)
    if name == "cache_write":
        made = b.emit_all("cache_read", *made)
    graph = b.finish(made)
    verify(graph)
    given = {f"x{i}": x for i, x in enumerate(arrays)}
    out, after = evaluate(graph, given, {}, state)
    for value, x in zip(made, out, strict=True):
        stored = 0 if state is None else state["k"].shape[2]
        sizes = [n if isinstance(n, int) else stored + int(n[2:]) for n in value.tensor.shape]
        assert list(x.shape) == sizes
        assert x.dtype == np.float64
    return (out[0] if len(out) == 1 else out), after


def draw(*shape):
    return RNG.normal(size=shape)


def test_each_row_says_its_numbers_of_operands_once():
    for name, row in OPS.items():
        arity = row.arity if isinstance(row.arity, tuple) else (row.arity,)
        if isinstance(row.rule, str):
            assert sorted({len(o) for o, _ in ops._cases(row.rule)}) == sorted(arity), name
        assert row.equation
        assert {kind for kind, *_ in row.attrs.values()} <= ops.KINDS.keys(), name


EXAMPLES = {
    "add": ((draw(2, 3), draw(3)), {}),
    "mul": ((draw(3), draw(2, 1)), {}),
    "linear": ((draw(2, 5, 3), draw(4, 3), draw(4)), {}),
    "slice_rows": ((draw(6, 3),), {"start": 2, "stop": 5}),
    "transpose_w": ((draw(6, 3),), {}),
    "split_heads": ((draw(2, 5, 12),), {"heads": 3}),
    "merge_heads": ((draw(2, 3, 5, 4),), {}),
    "split_last": ((draw(2, 7),), {"sizes": (2, 1, 4)}),
    "rms_norm": ((draw(2, 3, 5, 4), draw(3, 4)), {"eps": 1e-6}),
    "rope": ((draw(2, 3, 5, 6), draw(1, 5, 4), draw(1, 5, 4)), {"style": "adjacent"}),
    "spread": ((draw(2, 5, 4),), {"width": 6, "style": "adjacent"}),
    "center": ((draw(2, 3, 5, 4),), {}),
    "hadamard": ((draw(2, 3, 5, 4),), {}),
    "gather": ((draw(1, 6, 5, 4), ORDER), {"repeat": 3}),
    "scale": ((draw(1, 6, 5, 4), SCALES), {"repeat": 3}),
    "cache_write": ((draw(1, 2, 5, 4),), {"role": "k", "store": STORE}),
    "attend": ((draw(2, 6, 3, 4), draw(2, 2, 5, 4), draw(2, 2, 5, 7), draw(6)), {"scale": 0.5}),
    "scale_rows": ((draw(24, 3), SCALES), {"heads": 6, "repeat": 3}),
    "gather_rows": ((draw(24), ORDER), {"heads": 6, "repeat": 3}),
    "hadamard_rows": ((draw(24, 3),), {"heads": 6}),
    "scale_cols": ((draw(3, 24), SCALES), {"heads": 6, "repeat": 3}),
    "gather_cols": ((draw(3, 24), ORDER), {"heads": 6, "repeat": 3}),
    "hadamard_cols": ((draw(3, 24),), {"heads": 6}),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_type_rule_and_the_meaning_agree_in_shape(name):
    arrays, attrs = EXAMPLES[name]
    run(name, *arrays, **attrs)


def test_every_row_has_an_example():
    assert OPS.keys() - EXAMPLES.keys() == {"input", "param", "cache_read"}


def test_small_values():
    x = np.arange(6.0).reshape(1, 2, 3)
    np.testing.assert_array_equal(run("linear", x, np.eye(3)[:2])[0], x[..., :2])
    np.testing.assert_array_equal(
        run("linear", x, np.eye(3), np.array([9.0, 0, 0]))[0][0, :, 0], [9, 12]
    )
    low, high = run("split_last", x, sizes=(1, 2))[0]
    np.testing.assert_array_equal(low, x[..., :1])
    np.testing.assert_array_equal(high, x[..., 1:])
    np.testing.assert_array_equal(run("slice_rows", np.eye(3), start=1, stop=2)[0], [[0, 1, 0]])
    np.testing.assert_array_equal(run("hadamard", np.array([[3.0, 1.0]]))[0] * 2**0.5, [[4, 2]])
    np.testing.assert_allclose(
        run("rms_norm", np.array([[3.0, 4.0]]), np.array([1.0, 2.0]), eps=0.0, offset=1)[0],
        np.array([[3.0 * 2, 4.0 * 3]]) / 12.5**0.5,
    )


def test_heads_are_split_in_order_and_merged_back():
    x = np.arange(24.0).reshape(1, 2, 12)
    heads = run("split_heads", x, heads=3)[0]
    np.testing.assert_array_equal(heads[0, 1, 0], [4, 5, 6, 7])
    np.testing.assert_array_equal(run("merge_heads", heads)[0], x)


def test_rope_turns_the_pair_of_channel_and_channel_plus_half():
    x = np.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    angle = np.array([np.pi / 2, 0.0, np.pi / 2, 0.0]).reshape(1, 1, 4)
    got = run("rope", x, np.cos(angle), np.sin(angle))[0]
    np.testing.assert_allclose(got[0, 0, 0], [-3, 2, 1, 4], atol=1e-15)


def test_rope_of_neighbours_turns_the_first_channels_and_leaves_the_rest():
    x = np.arange(1.0, 7.0).reshape(1, 1, 1, 6)
    angle = np.array([np.pi / 2, np.pi / 2, 0.0, 0.0]).reshape(1, 1, 4)
    got = run("rope", x, np.cos(angle), np.sin(angle), style="adjacent")[0]
    np.testing.assert_allclose(got[0, 0, 0], [-2, 1, 3, 4, 5, 6], atol=1e-15)


def test_spread_gives_each_channel_the_entry_of_its_pair():
    table = np.array([[[1.0, 2.0, 3.0, 9.0]]])
    half, adjacent = (run("spread", table, width=6, style=s)[0] for s in ("half", "adjacent"))
    np.testing.assert_array_equal(half[0, 0], [1, 2, 3, 1, 2, 3])
    np.testing.assert_array_equal(adjacent[0, 0], [1, 1, 2, 2, 3, 3])


@pytest.mark.parametrize("style", rope.STYLES)
@pytest.mark.parametrize("rotated", [2, 6, 8])
def test_the_partner_is_the_channel_that_a_turn_mixes_in(style, rotated):
    """`partner` and `pair_of` against the rotation itself, one channel at a time."""
    partner, pair = rope.partner(style, rotated, 8), rope.pair_of(style, rotated)
    angle = np.full((1, 1, rotated), np.pi / 2)
    for channel in range(8):
        x = np.zeros((1, 1, 1, 8))
        x[..., channel] = 1.0
        turned = rope.turn(x, np.cos(angle), np.sin(angle), style)
        assert np.flatnonzero(np.abs(turned) > 0.5).tolist() == [partner[channel]]
        if channel < rotated:
            assert pair[channel] == pair[partner[channel]]
    assert np.bincount(pair).tolist() == [2] * (rotated // 2)


def test_a_centered_norm_is_a_layer_norm():
    x, w = draw(2, 3, 5, 4), draw(3, 4)
    got = run("rms_norm", run("center", x)[0], w, eps=1e-5)[0]
    scale = np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    want = (x - x.mean(-1, keepdims=True)) / scale * w[:, None]
    np.testing.assert_allclose(got, want, atol=1e-12)


def test_a_sink_is_a_key_without_a_value():
    q, k, v, sinks = draw(1, 4, 3, 4), draw(1, 2, 5, 4), draw(1, 2, 5, 7), draw(4)
    got = run("attend", q, k, v, sinks, scale=0.5)[0]
    scores = 0.5 * np.einsum("hqd,hkd->hqk", q[0], np.repeat(k[0], 2, 0))
    scores[:, ~np.tri(3, 5, 2, dtype=bool)] = -np.inf
    weights = np.exp(scores)
    share = weights / (weights.sum(-1, keepdims=True) + np.exp(sinks)[:, None, None])
    np.testing.assert_allclose(got[0], share @ np.repeat(v[0], 2, 0), atol=1e-12)


def test_norm_weights_may_differ_by_head():
    x, w = draw(2, 3, 5, 4), draw(3, 4)
    got = run("rms_norm", x, w, eps=1e-6)[0]
    for head in range(3):
        one = run("rms_norm", x[:, head : head + 1], w[head], eps=1e-6)[0]
        np.testing.assert_array_equal(got[:, head : head + 1], one)


MAPS = {
    "scale": ((SCALES,), {"repeat": 3}),
    "scale back": ((SCALES,), {"repeat": 3, "inverse": True}),
    "gather": ((ORDER,), {"repeat": 3}),
    "hadamard": ((), {}),
}


@pytest.mark.parametrize("name", MAPS)
def test_a_map_of_rows_is_the_map_of_what_the_weight_gives(name):
    constants, attrs = MAPS[name]
    kind = name.split()[0]
    x, w, bias = draw(2, 5, 3), draw(24, 3), draw(24)
    plain = run("split_heads", run("linear", x, w, bias)[0], heads=6)[0]
    want = run(kind, plain, *constants, **attrs)[0]
    rows = [run(f"{kind}_rows", part, *constants, heads=6, **attrs)[0] for part in (w, bias)]
    got = run("split_heads", run("linear", x, *rows)[0], heads=6)[0]
    np.testing.assert_allclose(got, want, atol=1e-12)
    assert np.abs(want - plain).max() > 0.1


@pytest.mark.parametrize("name", MAPS)
def test_a_map_of_columns_undoes_the_map_it_is_dual_to(name):
    constants, attrs = MAPS[name]
    kind = name.split()[0]
    x, w = draw(2, 6, 5, 4), draw(3, 24)
    want = run("linear", run("merge_heads", x)[0], w)[0]
    mapped = run("merge_heads", run(kind, x, *constants, **attrs)[0])[0]
    back = attrs | ({"inverse": not attrs.get("inverse", False)} if kind == "scale" else {})
    cols = run(f"{kind}_cols", w, *constants, heads=6, **back)[0]
    np.testing.assert_allclose(run("linear", mapped, cols)[0], want, atol=1e-12)
    assert np.abs(run("linear", mapped, w)[0] - want).max() > 0.1


@pytest.mark.parametrize("kind", ["scale", "gather"])
def test_norm_weights_take_the_maps_of_heads(kind):
    constant = SCALES if kind == "scale" else ORDER
    shared, each = draw(4), draw(6, 4)
    got = run(f"{kind}_rows", shared, constant, heads=6, repeat=3)[0]
    flat = run(f"{kind}_rows", np.tile(shared, 6), constant, heads=6, repeat=3)[0]
    np.testing.assert_array_equal(got, flat.reshape(6, 4))
    got = run(f"{kind}_rows", each, constant, heads=6, repeat=3)[0]
    flat = run(f"{kind}_rows", each.reshape(24), constant, heads=6, repeat=3)[0]
    np.testing.assert_array_equal(got, flat.reshape(6, 4))


def test_the_query_head_map_is_by_groups_and_not_interleaved():
    x = np.ones((1, 6, 1, 4))
    got = run("scale", x, np.array([[2.0] * 4, [5.0] * 4]), repeat=3)[0]
    np.testing.assert_array_equal(got[0, :, 0, 0], [2, 2, 2, 5, 5, 5])


def test_a_cache_keeps_full_precision_and_is_read_as_stored():
    store = Tokens(rest=Int(2, "token", 4, "float"), sink=1, recent=2)
    x = draw(1, 2, 5, 4)
    first, state = run("cache_write", x, role="k", store=store)
    single = x.astype(np.float32)
    np.testing.assert_array_equal(first, single)  # new tokens are read as they are kept
    new = draw(1, 2, 3, 4)
    second, after = run("cache_write", new, role="k", store=store, state=state)
    np.testing.assert_array_equal(after["k"], np.concatenate((x, new), 2))
    np.testing.assert_array_equal(second[:, :, :5], store.simulate(x))
    np.testing.assert_array_equal(second[:, :, 5:], new.astype(np.float32))
    assert np.abs(second[:, :, 1:3] - x[:, :, 1:3]).max() > 0.01
    np.testing.assert_allclose(second[:, :, [0, 3, 4]], x[:, :, [0, 3, 4]], rtol=1e-6)
    np.testing.assert_array_equal(state["k"], x)  # the state that was given is not changed


def test_attend_reads_groups_of_query_heads_and_the_last_positions():
    q, k, v = draw(1, 4, 2, 4), draw(1, 2, 5, 4), draw(1, 2, 5, 4)
    got = run("attend", q, k, v, scale=1.0)[0]
    logits = q[0, 3, 0] @ k[0, 1, :4].T  # query 0 of 2 sees four of five keys
    weights = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(got[0, 3, 0], weights @ v[0, 1, :4])
    np.testing.assert_allclose(run("attend", q, k, v, scale=1.0, window=1)[0][0, 0, 1], v[0, 0, 4])


def test_defaults_are_filled_in_and_numbers_become_floats():
    assert ops.complete("attend", {"scale": 1}) == (
        ("causal", True),
        ("scale", 1.0),
        ("softcap", None),
        ("window", None),
    )
    assert type(dict(ops.complete("attend", {"scale": 1}))["scale"]) is float
    assert ops.complete("unknown", {"b": 1, "a": 2}) == (("a", 2), ("b", 1))


REFUSED = {
    "bias": (("linear", (2, 3), (4, 3), (3,)), "O is 4 and 3"),
    "weight": (("linear", (2, 3), (4, 5)), "C is 3 and 5"),
    "softly grouped": (
        ("attend", (1, 3, 1, 4), (1, 2, 1, 4), (1, 2, 1, 4)),
        "G*H is 3, not a multiple of 2",
    ),
    "values shorter": (("attend", (1, 2, 1, 4), (1, 2, 3, 4), (1, 2, 1, 4)), "N is 3 and 1"),
    "turns of other width": (("rope", (1, 2, 3, 4), (1, 3, 4), (1, 3, 2)), "even is 4 and 2"),
    "turns wider than heads": (
        ("rope", (1, 2, 3, 4), (1, 3, 6), (1, 3, 6)),
        "6 is not even, or more than 4",
    ),
    "sinks of kv heads": (
        ("attend", (1, 4, 1, 4), (1, 2, 1, 4), (1, 2, 1, 4), (2,)),
        "G*H is 2, not 4",
    ),
    "norm of another width": (("rms_norm", (2, 3), (4,)), "D is 3 and 4"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_type_rules_refuse(case):
    (name, *shapes), reason = REFUSED[case]
    attrs = {"attend": {"scale": 1.0}, "rms_norm": {"eps": 1.0}}.get(name, {})
    with pytest.raises(KvantError) as error:
        run(name, *(draw(*shape) for shape in shapes), **attrs)
    assert error.value.code == "ill-typed-op"
    assert error.value.what.split(": ", 1)[1].startswith(reason)
