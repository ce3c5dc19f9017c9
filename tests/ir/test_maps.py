"""Maps: the Hadamard matrix by its definition; duals keep every dot product; inverses undo."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvant.ir.errors import KvantError
from kvant.ir.maps import (
    Gather,
    Hadamard,
    Scale,
    apply,
    apply_inverse,
    constant_problem,
    dual,
    hadamard_transform,
)

H, G, D = 2, 3, 8
ORDER = np.stack([np.random.default_rng(h).permutation(D) for h in range(H)])
SCALES = np.random.default_rng(9).uniform(0.25, 4.0, (H, D))
CONSTANTS = {"order": ORDER, "scales": SCALES}
maps = st.lists(
    st.sampled_from([Hadamard(D), Gather("order"), Scale("scales"), Scale("scales", True)]),
    max_size=4,
)


@pytest.mark.parametrize("size", [1, 2, 4, 64, 128])
def test_hadamard_is_sylvesters_matrix(size):
    matrix = [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    got = hadamard_transform(np.eye(size))
    assert np.allclose(got, np.array(matrix) / np.sqrt(size), rtol=0, atol=1e-15)


def test_hadamard_keeps_norms_and_is_its_own_inverse():
    x = np.random.default_rng(0).standard_normal((3, 5, 64))
    y = hadamard_transform(x)
    assert np.allclose(np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-13)
    assert np.allclose(hadamard_transform(y), x, atol=1e-13)


def test_gather_takes_from_order_and_scale_multiplies_or_divides():
    x = np.random.default_rng(1).standard_normal((1, H, 2, D))
    for h in range(H):
        for c in range(D):
            at = (0, h, 1, c)
            assert apply([Gather("order")], x, CONSTANTS)[at] == x[0, h, 1, ORDER[h, c]]
            assert apply([Scale("scales")], x, CONSTANTS)[at] == x[at] * SCALES[h, c]
            assert apply([Scale("scales", True)], x, CONSTANTS)[at] == x[at] / SCALES[h, c]


@settings(max_examples=60, deadline=None)
@given(maps, st.integers(0, 99))
def test_the_dual_keeps_every_dot_product_of_grouped_heads(chain, seed):
    rng = np.random.default_rng(seed)
    k, q = rng.standard_normal((2, H, 4, D)), rng.standard_normal((2, H * G, 3, D))

    def dots(q, k):
        return q @ np.repeat(k, G, axis=1).swapaxes(-1, -2)

    duals = [dual(m) for m in chain]
    mapped = dots(apply(duals, q, CONSTANTS, G), apply(chain, k, CONSTANTS))
    assert np.allclose(mapped, dots(q, k), rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(maps, st.integers(0, 99))
def test_the_inverse_undoes_the_maps(chain, seed):
    x = np.random.default_rng(seed).standard_normal((2, H * G, 3, D))
    y = apply_inverse(chain, apply(chain, x, CONSTANTS, G), CONSTANTS, G)
    assert np.allclose(y, x, rtol=1e-9, atol=1e-9)


def test_the_wrong_head_of_a_group_is_another_result():
    x = np.random.default_rng(2).standard_normal((1, H * G, 1, D))
    tiled = apply([Scale("scales")], x, {"scales": np.tile(SCALES, (G, 1))})
    assert not np.allclose(apply([Scale("scales")], x, CONSTANTS, G), tiled)


def test_the_dual_of_an_orthogonal_map_is_itself():
    assert dual(Hadamard(8)) == Hadamard(8)
    assert dual(Gather("order")) == Gather("order")
    assert dual(Scale("s")) == Scale("s", inverse=True)


@pytest.mark.parametrize("size", [0, 3, 96, -4, 8.0, True])
def test_a_size_that_is_no_power_of_two_is_refused(size):
    with pytest.raises(KvantError) as caught:
        Hadamard(size)
    assert caught.value.code == "hadamard-size"


def test_a_hadamard_of_another_width_is_refused():
    with pytest.raises(KvantError) as caught:
        Hadamard(64).check(128, "layer 0: k")
    assert str(caught.value) == (
        "hadamard(64) does not fit heads of 128 channels\n  where: layer 0: k\n"
        "  fix: use the head width as size (a power of two), or leave the rotation out"
        "  [hadamard-size]"
    )
    Hadamard(64).check(64, "k")


def test_a_missing_or_misshapen_constant_is_refused():
    x = np.zeros((1, H, 1, D))
    with pytest.raises(KvantError, match="no constant 'other'"):
        apply([Gather("other")], x, CONSTANTS)
    with pytest.raises(KvantError, match=r"'scales' has shape \(2, 8\) for 2 heads of 8 channels"):
        apply([Scale("scales")], x, CONSTANTS, repeat=2)
    with pytest.raises(KvantError, match="has shape"):
        apply([Scale("scales")], np.zeros((1, H, 1, 4)), CONSTANTS)


def test_an_order_is_a_permutation_in_every_row():
    assert constant_problem("gather", ORDER) is None
    assert constant_problem("gather", ORDER.astype(np.int32)) is None
    assert constant_problem("gather", ORDER.astype(float)) == "its type is float64"
    twice = np.where(ORDER == 3, 4, ORDER)
    twice[0] = ORDER[0]
    what = "the row of head 1 is no permutation of 0..7"
    assert constant_problem("gather", twice) == what
    assert constant_problem("gather", np.stack([ORDER[0], ORDER[1] + 1])) == what


@pytest.mark.parametrize("value", [0.0, -1.0, np.inf, np.nan])
def test_a_scale_is_finite_and_above_zero(value):
    assert constant_problem("scale", SCALES) is None
    spoilt = SCALES.copy()
    spoilt[1, 2] = value
    assert constant_problem("scale", spoilt) == "a scale is not a positive number"


@pytest.mark.parametrize("make", [lambda: Gather(""), lambda: Scale(""), lambda: Scale("s", 1)])
def test_a_map_without_a_constant_is_refused(make):
    with pytest.raises(KvantError) as caught:
        make()
    assert caught.value.code == "map-constant"
