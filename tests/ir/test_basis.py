"""Maps of a cached stream: legal ones pass and change nothing, illegal ones are refused."""

import numpy as np
import pytest

from kvant.ir.basis import applied, undone
from kvant.ir.errors import KvantError
from kvant.ir.evaluate import evaluate
from kvant.ir.maps import Gather, Hadamard, Scale
from kvant.ir.rewrite import rewrite
from kvant.ir.text import parse
from kvant.ir.types import TensorType
from kvant.ir.verify import verify

pytestmark = pytest.mark.usefixtures("lossless")
STORE = "store = tokens(sink 0: f32, recent 0: f32, flush = group, rest: f32)"


def attention(
    weights="", kw="%kw", qw="%qw", vw="%vw", ow="%ow", kb="%kb", k="%k3", q="%q3", v="%v1",
    out="%o1", before="", after="", k_basis="()", v_basis="()", norms=False, kn="%kn", qn="%qn",
):  # fmt: skip
    """Return the text of a layer: 2 query heads on 1 KV head of 4 channels.

    Lines may be added to the weights, before the caches and after attend; the other arguments say
    which value stands for a weight, for what is stored, for the queries and for the output.
    """
    k2 = f"rms_norm %k1 {kn} {{eps = 1.0}}" if norms else "rope %k1 %t %t"
    q2 = f"rms_norm %q1 {qn} {{eps = 1.0}}" if norms else "rope %q1 %t %t"
    return f"""kvant 1
graph @g
  %x : f32[B, T, 8] = input {{name = x}}
  %t : f32[B, T, 4] = input {{name = t}}
  %qw : f32[8, 8] = param {{name = q_proj.weight}}
  %kw : f32[4, 8] = param {{name = k_proj.weight}}
  %kb : f32[4] = param {{name = k_proj.bias}}
  %vw : f32[4, 8] = param {{name = v_proj.weight}}
  %ow : f32[8, 8] = param {{name = o_proj.weight}}
  %qn : f32[4] = param {{name = q_norm.weight}}
  %kn : f32[4] = param {{name = k_norm.weight}}
  %s : f32[1, 4] = param {{name = kvant.s}}
  %i : i64[1, 4] = param {{name = kvant.i}}
  %zero : f32[4] = param {{name = kvant.zero}}
{weights}  %q0 : f32[B, T, 8] = linear %x {qw}
  %k0 : f32[B, T, 4] = linear %x {kw} {kb}
  %v0 : f32[B, T, 4] = linear %x {vw}
  %q1 : f32[B, 2, T, 4] = split_heads %q0 {{heads = 2}}
  %k1 : f32[B, 1, T, 4] = split_heads %k0 {{heads = 1}}
  %v1 : f32[B, 1, T, 4] = split_heads %v0 {{heads = 1}}
  %q2 : f32[B, 2, T, 4] = {q2}
  %k2 : f32[B, 1, T, 4] = {k2}
  %q3 : f32[B, 2, T, 4] = rope %q2 %t %t
  %k3 : f32[B, 1, T, 4] = rope %k2 %t %t
{before}  %kc : cache[k] = cache_write {k} {{basis = {k_basis}, role = k, {STORE}}}
  %vc : cache[v] = cache_write {v} {{basis = {v_basis}, role = v, {STORE}}}
  %kr : f32[B, 1, S+T, 4] = cache_read %kc
  %vr : f32[B, 1, S+T, 4] = cache_read %vc
  %o1 : f32[B, 2, T, 4] = attend {q} %kr %vr {{scale = 0.5}}
{after}  %o3 : f32[B, T, 8] = merge_heads {out}
  %y : f32[B, T, 8] = linear %o3 {ow}
  return %y
"""


K_TURNED = "  %k4 : f32[B, 1, T, 4] = hadamard %k3\n"
Q_TURNED = "  %q4 : f32[B, 2, T, 4] = hadamard %q3\n"
K_SORTED = "  %k5 : f32[B, 1, T, 4] = gather %k4 %i\n"
Q_SORTED = "  %q5 : f32[B, 2, T, 4] = gather %q4 %i {repeat = 2}\n"
K_SCALED = "  %k4 : f32[B, 1, T, 4] = scale %k3 %s\n"
Q_SCALED = "  %q4 : f32[B, 2, T, 4] = scale %q3 %s {inverse = true, repeat = 2}\n"
FOLDED_K = """  %kws : f32[4, 8] = scale_rows %kw %s {heads = 1, inverse = true}
  %kbs : f32[4] = scale_rows %kb %s {heads = 1, inverse = true}
"""
FOLDED_Q = "  %qws : f32[8, 8] = scale_rows %qw %s {heads = 2, repeat = 2}\n"

LEGAL = {
    "nothing": {},
    "rotation online": dict(before=K_TURNED + Q_TURNED, k="%k4", q="%q4", k_basis="(hadamard(4),)"),
    "rotation, then order": dict(
        before=K_TURNED + Q_TURNED + K_SORTED + Q_SORTED,
        k="%k5",
        q="%q5",
        k_basis="(hadamard(4), gather(kvant.i))",
    ),
    "scale online": dict(
        before=K_SCALED + Q_SCALED,
        k="%k4",
        q="%q4",
        k_basis="(scale(values = kvant.s, inverse = false),)",
    ),
    "scale folded into projections": dict(
        weights=FOLDED_K + FOLDED_Q,
        kw="%kws",
        kb="%kbs",
        qw="%qws",
        k_basis="(scale(values = kvant.s, inverse = true),)",
    ),
    "scale folded into norm weights": dict(
        weights="  %kns : f32[4] = scale_rows %kn %s {heads = 1}\n"
        "  %qns : f32[2, 4] = scale_rows %qn %s {heads = 2, inverse = true, repeat = 2}\n",
        norms=True,
        kn="%kns",
        qn="%qns",
        k_basis="(scale(values = kvant.s, inverse = false),)",
    ),
    "folded, then online": dict(
        weights=FOLDED_K + FOLDED_Q,
        kw="%kws",
        kb="%kbs",
        qw="%qws",
        before=K_TURNED + Q_TURNED,
        k="%k4",
        q="%q4",
        k_basis="(scale(values = kvant.s, inverse = true), hadamard(4))",
    ),
    "values rotated in the weights": dict(
        weights="  %vwh : f32[4, 8] = hadamard_rows %vw {heads = 1}\n"
        "  %owh : f32[8, 8] = hadamard_cols %ow {heads = 2}\n",
        vw="%vwh",
        ow="%owh",
        v_basis="(hadamard(4),)",
    ),
    "values rotated online": dict(
        before="  %v4 : f32[B, 1, T, 4] = hadamard %v1\n",
        after="  %o2 : f32[B, 2, T, 4] = hadamard %o1\n",
        v="%v4",
        out="%o2",
        v_basis="(hadamard(4),)",
    ),
    "values sorted, then scaled, in the weights": dict(
        weights="  %vwi : f32[4, 8] = gather_rows %vw %i {heads = 1}\n"
        "  %vws : f32[4, 8] = scale_rows %vwi %s {heads = 1}\n"
        "  %owi : f32[8, 8] = gather_cols %ow %i {heads = 2, repeat = 2}\n"
        "  %ows : f32[8, 8] = scale_cols %owi %s {heads = 2, inverse = true, repeat = 2}\n",
        vw="%vws",
        ow="%ows",
        v_basis="(gather(kvant.i), scale(values = kvant.s, inverse = false))",
    ),
    "values scaled online": dict(
        before="  %v4 : f32[B, 1, T, 4] = scale %v1 %s\n",
        after="  %o2 : f32[B, 2, T, 4] = scale %o1 %s {inverse = true, repeat = 2}\n",
        v="%v4",
        out="%o2",
        v_basis="(scale(values = kvant.s, inverse = false),)",
    ),
    "values scaled in the weights, then rotated online": dict(
        weights="  %vws : f32[4, 8] = scale_rows %vw %s {heads = 1}\n"
        "  %ows : f32[8, 8] = scale_cols %ow %s {heads = 2, inverse = true, repeat = 2}\n",
        before="  %v4 : f32[B, 1, T, 4] = hadamard %v1\n",
        after="  %o2 : f32[B, 2, T, 4] = hadamard %o1\n",
        vw="%vws",
        ow="%ows",
        v="%v4",
        out="%o2",
        v_basis="(scale(values = kvant.s, inverse = false), hadamard(4))",
    ),
    "scale folded below and above a shift of the norm weight": dict(
        weights="  %k1s : f32[4] = scale_rows %kn %s {heads = 1}\n"
        "  %k1t : f32[4] = add %k1s %zero\n"
        "  %kns : f32[4] = scale_rows %k1t %s {heads = 1}\n"
        "  %q1s : f32[2, 4] = scale_rows %qn %s {heads = 2, inverse = true, repeat = 2}\n"
        "  %qns : f32[2, 4] = scale_rows %q1s %s {heads = 2, inverse = true, repeat = 2}\n",
        norms=True,
        kn="%kns",
        qn="%qns",
        k_basis="(scale(values = kvant.s, inverse = false),"
        " scale(values = kvant.s, inverse = false))",
    ),
}


def run(text):
    rng = np.random.default_rng(0)
    graph = parse(text)
    params = {n: rng.normal(size=t.shape) for n, t in graph.params().items()}
    params["kvant.s"] = np.array([[0.5, 4.0, 0.5, 4.0]])  # tied in pairs (c, c + 2)
    params["kvant.zero"] = np.zeros(4)
    params["kvant.i"] = np.array([[2, 0, 3, 1]])
    angle = rng.uniform(0, 6, size=(1, 5, 2))
    tables = np.concatenate((angle, angle), -1)
    inputs = {"x": rng.normal(size=(1, 5, 8)), "t": np.cos(tables)}
    return evaluate(graph, inputs, params)[0][0]


@pytest.mark.parametrize("case", LEGAL)
def test_legal_maps_pass_and_change_nothing(case):
    text = attention(**LEGAL[case])
    verify(parse(text))
    plain = attention(norms=LEGAL[case].get("norms", False))
    np.testing.assert_allclose(run(text), run(plain), rtol=1e-9, atol=1e-9)
    assert text != plain or case == "nothing"


ILLEGAL = {
    "keys rotated, queries not": (
        dict(before=K_TURNED, k="%k4", k_basis="(hadamard(4),)"),
        "attend",
        "the stored keys are in basis (hadamard(4),) but the queries are in (), the dual of theirs",
    ),
    "queries rotated, keys not": (
        dict(before=Q_TURNED, q="%q4"),
        "attend",
        "the stored keys are in basis () but the queries are in (hadamard(4),), the dual of theirs",
    ),
    "maps in another order": (
        dict(
            before=K_TURNED
            + K_SORTED
            + "  %q4 : f32[B, 2, T, 4] = gather %q3 %i {repeat = 2}\n"
            + "  %q5 : f32[B, 2, T, 4] = hadamard %q4\n",
            k="%k5",
            q="%q5",
            k_basis="(hadamard(4), gather(kvant.i))",
        ),
        "attend",
        "the stored keys are in basis (hadamard(4), gather(kvant.i)) but the queries are in"
        " (gather(kvant.i), hadamard(4)), the dual of theirs",
    ),
    "scale on both in the same direction": (
        dict(
            before=K_SCALED + Q_SCALED.replace("inverse = true, ", ""),
            k="%k4",
            q="%q4",
            k_basis="(scale(values = kvant.s, inverse = false),)",
        ),
        "attend",
        "the stored keys are in basis (scale(values = kvant.s, inverse = false),) but the queries"
        " are in (scale(values = kvant.s, inverse = true),), the dual of theirs",
    ),
    "folded on one side": (
        dict(
            weights=FOLDED_K,
            kw="%kws",
            kb="%kbs",
            k_basis="(scale(values = kvant.s, inverse = true),)",
        ),
        "attend",
        "the stored keys are in basis (scale(values = kvant.s, inverse = true),) but the queries"
        " are in (), the dual of theirs",
    ),
    "basis not recorded": (
        dict(before=K_TURNED + Q_TURNED, k="%k4", q="%q4"),
        "cache_write",
        "the basis is (), but what is applied is (hadamard(4),)",
    ),
    "bias forgotten": (
        dict(
            weights=FOLDED_K + FOLDED_Q,
            kw="%kws",
            qw="%qws",
            k_basis="(scale(values = kvant.s, inverse = true),)",
        ),
        "linear",
        "the weight is in basis (scale(values = kvant.s, inverse = true),) but the bias in ()",
    ),
    "values rotated, output not": (
        dict(
            weights="  %vwh : f32[4, 8] = hadamard_rows %vw {heads = 1}\n",
            vw="%vwh",
            v_basis="(hadamard(4),)",
        ),
        "attend",
        "the stored values are in basis (hadamard(4),) but the output is mapped back from ()",
    ),
    "rotation folded under rope": (
        dict(
            weights="  %kwh : f32[4, 8] = hadamard_rows %kw {heads = 1}\n"
            "  %kbh : f32[4] = hadamard_rows %kb {heads = 1}\n",
            kw="%kwh",
            kb="%kbh",
        ),
        "rope",
        "hadamard(4) is folded into the weight, but a rotation does not commute with rope; keep it"
        " online after rope, with its dual on q",
    ),
    "rotation folded under a norm": (
        dict(
            weights="  %kwh : f32[4, 8] = hadamard_rows %kw {heads = 1}\n"
            "  %kbh : f32[4] = hadamard_rows %kb {heads = 1}\n",
            kw="%kwh",
            kb="%kbh",
            norms=True,
        ),
        "rms_norm",
        "hadamard(4) is folded into the weight, but a rotation does not commute with rms_norm; keep"
        " it online after rope, with its dual on q",
    ),
    "rotation of a norm weight": (
        dict(weights="  %knh : f32[4] = hadamard_rows %kn {heads = 1}\n", kn="%knh", norms=True),
        "rms_norm",
        "hadamard(4) is folded into the weight, but a rotation does not commute with rms_norm; keep"
        " it online after rope, with its dual on q",
    ),
    "order folded under rope": (
        dict(
            weights="  %kwh : f32[4, 8] = gather_rows %kw %i {heads = 1}\n"
            "  %kbh : f32[4] = gather_rows %kb %i {heads = 1}\n",
            kw="%kwh",
            kb="%kbh",
        ),
        "rope",
        "gather(kvant.i) is folded into the weight, but rope turns each channel pair at its own"
        " frequency; keep it online after rope, with its dual on q",
    ),
    "scale folded under a norm": (
        dict(weights=FOLDED_K, kw="%kws", kb="%kbs", norms=True),
        "rms_norm",
        "scale(values = kvant.s, inverse = true) is folded into the weight, but rms_norm divides by"
        " the scaled norm; scale the norm weight instead",
    ),
}


@pytest.mark.parametrize("case", ILLEGAL)
def test_illegal_maps_are_refused_with_the_reason(case):
    changes, op, message = ILLEGAL[case]
    with pytest.raises(KvantError) as error:
        verify(parse(attention(**changes)), after="some-pass")
    assert error.value.code == "ill-formed-graph"
    lines = error.value.what.splitlines()
    assert lines[0] == "@g is not well formed after pass some-pass"
    at = lines.index(f"    ^ {message}")
    guilty = next(line for line in reversed(lines[:at]) if line.startswith("x   "))
    assert f" = {op} " in guilty


def test_a_models_own_rotation_before_rope_is_no_map():
    text = attention().replace("rope %k2 %t %t", "rope %kh %t %t")
    text = text.replace("  %q3 :", "  %kh : f32[B, 1, T, 4] = hadamard %k2\n  %q3 :")
    verify(parse(text))


def test_maps_are_read_off_in_the_order_they_act():
    graph = parse(attention(**LEGAL["folded, then online"]))
    write = graph.find("cache_write")[0]
    assert applied(graph, write.args[0]) == (Scale("kvant.s", True), Hadamard(4))
    graph = parse(attention(**LEGAL["values sorted, then scaled, in the weights"]))
    out = graph.find("attend")[0].result
    assert undone(graph, out) == (Gather("kvant.i"), Scale("kvant.s", False))


def test_an_inverse_order_on_the_output_is_another_constant_and_is_not_judged():
    graph = parse(
        attention(
            before="  %v4 : f32[B, 1, T, 4] = gather %v1 %i\n",
            after="  %o2 : f32[B, 2, T, 4] = gather %o1 %i {repeat = 2}\n",
            v="%v4",
            out="%o2",
            v_basis="(gather(kvant.i),)",
        )
    )
    assert undone(graph, graph.find("attend")[0].result) is None
    verify(graph)


@pytest.mark.parametrize("seed", range(12))
def test_rotation_of_random_layers_is_exact_only_with_its_dual(random_attention_graph, seed):
    rng = np.random.default_rng(seed)
    graph, inputs, params, dims = random_attention_graph(rng, tokens=5)
    turn = Hadamard(dims["head_dim"])

    def both(b, op, args, mirrored=True):
        if op.name == "cache_write" and op.attr("role") == "k":
            attrs = dict(op.attrs) | {"basis": (turn,)}
            return b.emit("cache_write", b.emit("hadamard", args[0]), **attrs)
        if op.name == "attend" and mirrored:
            return b.emit("attend", b.emit("hadamard", args[0]), *args[1:], **dict(op.attrs))
        return None

    after = rewrite(graph, both)
    verify(after, "hadamard")
    want = evaluate(graph, inputs, params)[0][0]
    np.testing.assert_allclose(evaluate(after, inputs, params)[0][0], want, atol=1e-9)
    wrong = rewrite(graph, lambda b, op, args: both(b, op, args, mirrored=False))
    with pytest.raises(KvantError, match="the queries are in"):
        verify(wrong, "hadamard")
    if dims["head_dim"] > 1:
        got = evaluate(wrong, inputs, params)[0][0]
        assert dims["window"] == 1 or np.abs(got - want).max() > 1e-6


def test_constants_of_another_head_count_are_refused(random_attention_graph):
    rng = np.random.default_rng(1)
    graph, *_ = random_attention_graph(rng, kv_heads=2, group=3, head_dim=8, bias=False)
    kind = TensorType("f32", (2, 8))

    def swapped(b, op, args):
        if op.name == "linear" and args[1].name.startswith("q_proj"):
            s = b.param("kvant.s", kind)
            w = b.emit("scale_rows", args[1], s, heads=6, repeat=2)  # the group is 3
            return b.emit("linear", args[0], w)
        return None

    with pytest.raises(KvantError) as error:
        rewrite(graph, swapped)
    assert error.value.code == "ill-typed-op"
    assert "kv is 3 and 2" in error.value.what
