"""The cost model: examples computed by hand, and what must only grow or only fall."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest

from kvant.targets import cost
from kvant.targets.cost import Attend, Cost, decode
from kvant.targets.gpu_splits import split_facts
from kvant.targets.machines import DEVICES, GPUS, Device

from .cpu_cases import int_format, plan_of

INT4 = int_format(4, "token", 128)
PLAN = plan_of(INT4, INT4, heads=2, group=4, d=128)
SMALL = Device("small", "sm_90", 10, 1.0, 1000, 128, 1024, 1.0, 2.0)
KERNEL = Attend(
    per_element=2.0, rows=8, warps=4, resident=2, ahead=1e6, split_tokens=512, merged=16
)
H200 = DEVICES["sm_90"]


def total(
    device: Device = SMALL, kernel: Attend = KERNEL, batch: int = 1, tokens: int = 4096
) -> float:
    return decode(device, PLAN, kernel, batch, tokens)[0].total


def test_a_step_computed_by_hand() -> None:
    result, parts = decode(SMALL, PLAN, KERNEL, 1, 4096)
    assert parts == 8
    # 16 blocks on 10 multiprocessors: the busiest has two; each has 512 tokens of 256 numbers
    assert result.issue == pytest.approx(2 * 512 * 256 * 2.0 / (128 * 0.75 * 1e3))
    assert result.matrix == pytest.approx(2 * 512 * 256 * 8 / (1024 * 1e3))
    # 64 pages of 2 heads of 4,352 bytes and 8 of the table, of keys and of values
    assert result.read == pytest.approx(2 * 64 * (2 * 4352 + 8) / (1000 * 0.88 * 1e3))
    assert result.work == result.issue
    assert result.begin == 3.0
    assert result.merge == pytest.approx(0.7)  # one turn of 16 splits, twice
    assert result.launch == 6.0
    assert result.total == pytest.approx(5.461 + 3.0 + 0.7 + 6.0, abs=0.001)
    assert result.limit == "fixed"


def test_each_limit_can_hold_a_step_back() -> None:
    def limit(**fields: float) -> str:
        kernel = replace(KERNEL, per_element=fields.pop("per_element", 2.0))  # type: ignore[arg-type]
        return decode(SMALL, PLAN, replace(kernel, **fields), 8, 32768)[0].limit  # type: ignore[arg-type]

    assert limit() == "issue"
    assert limit(per_element=0.1) == "matrix"
    assert limit(per_element=0.1, rows=1, resident=8) == "read"
    assert limit(per_element=0.1, rows=1, merged=1, kernels=10**3) == "fixed"


def test_blocks_beyond_what_fits_run_in_a_second_wave() -> None:
    one, _ = decode(SMALL, PLAN, KERNEL, 1, 4096)
    two, _ = decode(SMALL, PLAN, KERNEL, 2, 4096)  # 32 blocks on 20 places
    assert two.begin == 1.5 * one.begin  # beside the other block of a multiprocessor
    assert two.issue == pytest.approx(2 * one.issue)  # 20 blocks, then 12: two each time
    assert two.read == pytest.approx(2 * one.read)
    # 48: 20, 20 and 8, which have four warps a multiprocessor: half of its slots, not 3 / 4
    three, _ = decode(SMALL, PLAN, KERNEL, 3, 4096)
    assert three.issue == pytest.approx((2 + 2 + 1.5) / 2 * one.issue)


def test_few_bytes_under_way_cannot_fill_the_memory() -> None:
    result, _ = decode(SMALL, PLAN, replace(KERNEL, ahead=1e3), 1, 4096)
    assert result.read == pytest.approx(2 * 64 * (2 * 4352 + 8) / (16 * 1e3))
    assert result.limit == "read"


def test_one_warp_does_not_fill_a_multiprocessor() -> None:
    # one block of one warp: half of what one of four schedulers issues
    alone, _ = decode(SMALL, PLAN, replace(KERNEL, warps=1, split_tokens=4096), 1, 4096)
    assert alone.issue == pytest.approx(4096 * 256 * 2.0 / (128 / 8 * 1e3))
    four, _ = decode(SMALL, PLAN, replace(KERNEL, split_tokens=4096), 1, 4096)
    assert alone.issue == pytest.approx(4 * four.issue)


def test_splits_and_windows_are_counted() -> None:
    assert decode(SMALL, PLAN, KERNEL, 1, 1)[1] == 1
    assert decode(SMALL, PLAN, KERNEL, 1, 512)[1] == 1
    assert decode(SMALL, PLAN, KERNEL, 1, 513)[1] == 2
    window = replace(PLAN, window=1024)
    seen, _ = decode(SMALL, window, KERNEL, 1, 8192)
    whole, _ = decode(SMALL, PLAN, KERNEL, 1, 8192)
    assert seen.issue == pytest.approx(whole.issue / 8)
    assert seen.read < whole.read / 4
    # Splits that are at most so many: not 8 of 512 tokens, but 4 of 1,024.
    few, parts = decode(SMALL, PLAN, replace(KERNEL, most_splits=4), 1, 4096)
    assert parts == 4
    # one block of four warps on a multiprocessor: each scheduler issues half of the time
    assert few.issue == pytest.approx(1024 * 256 * 2.0 / (128 * 0.5 * 1e3))


def test_more_work_takes_longer_and_a_better_device_less() -> None:
    tokens = [total(H200, tokens=n) for n in range(512, 200_000, 7_777)]
    assert tokens == sorted(tokens)
    batches = [total(H200, batch=b, tokens=8192) for b in range(1, 64)]
    assert batches == sorted(batches)
    counted = [total(kernel=replace(KERNEL, per_element=x / 4)) for x in range(1, 40)]
    assert counted == sorted(counted)
    assert counted[-1] > counted[0]
    for name in ("bandwidth", "clock", "sms", "lanes", "matrix"):
        times = [
            total(replace(H200, **{name: type(getattr(H200, name))(getattr(H200, name) * x)}))
            for x in (0.5, 1, 2, 4)
        ]
        assert times == sorted(times, reverse=True), name
    for name in ("latency", "launch"):
        slow = replace(H200, **{name: 2 * getattr(H200, name)})
        assert total(slow) > total(H200), name


def test_the_sixteen_bit_kernel_of_a_h200_is_near_what_was_published() -> None:
    # vLLM's pull request 43232: bf16, 32x8x128; one row of 32k in 43.5 us, eight in 253.5 us.
    raw = plan_of(*(int_format(8, "token", 128),) * 2, heads=8, group=4, d=128)
    kernel = replace(KERNEL, per_element=1.4, rows=16, ahead=32e3, split_tokens=1024)
    for batch, published in ((1, 43.5), (8, 253.5)):
        # twice the bytes of 8 bits, but for the scales
        result, _ = decode(replace(H200, bandwidth=2400), raw, kernel, batch, 32768)
        assert 0.75 < result.total / published < 1.33, (batch, result)


@pytest.mark.parametrize("kind", ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"])
@pytest.mark.parametrize("resident", [2, 8])
def test_one_number_of_splits_is_near_the_best_for_each_batch(kind: str, resident: int) -> None:
    device = DEVICES[kind]
    plan = replace(PLAN, q_heads=32, k=replace(PLAN.k, heads=8), v=replace(PLAN.v, heads=8))
    kernel = replace(KERNEL, ahead=17e3, resident=resident, warps=1, split_tokens=64)
    most = cost.most_splits(device, plan, kernel)
    assert cost.LEAST_SPLITS <= most <= cost.MOST_SPLITS

    def time(batch: int, tokens: int, splits: int) -> float:
        own = replace(kernel, most_splits=splits)
        return decode(device, plan, own, batch, tokens)[0].total

    for batch in (1, 2, 8):
        for tokens in (4096, 32768, 131072):
            best = min(time(batch, tokens, n) for n in range(1, 129))
            assert time(batch, tokens, most) <= 1.35 * best, (batch, tokens, most)


def test_fewer_splits_where_each_has_more_under_way() -> None:
    def most(ahead: float) -> int:
        kernel = replace(KERNEL, ahead=ahead, warps=1, resident=8, split_tokens=64)
        return cost.most_splits(H200, replace(PLAN, q_heads=32), kernel)

    assert most(32e3) < most(4e3)


def test_rows_of_any_length_have_whole_splits() -> None:
    for tiles, parts in ((1, 1), (4, 4), (5, 3), (8, 4), (9, 3), (100, 4)):
        few = replace(KERNEL, split_tokens=64, most_splits=4)
        assert decode(SMALL, PLAN, few, 1, 64 * tiles)[1] == parts


def test_facts_of_splits_are_of_plan_and_machine() -> None:
    plan = plan_of(INT4, INT4, heads=8, group=4, d=128, compute="int")
    found = {name: split_facts(plan, GPUS[name], 8, 34_816, 1, 3) for name in ("sm_90", "sm_89")}
    assert {facts["least_tiles"] for facts in found.values()} == {1}
    # An L40S is full with fewer splits: it has a fifth of the H200's bandwidth.
    assert found["sm_89"]["most_splits"] < found["sm_90"]["most_splits"]
    assert split_facts(replace(plan, compute="float"), GPUS["sm_90"], 8, 0, 1, 3) == {}


def test_the_model_needs_no_compiler() -> None:
    tree = ast.parse(Path(cost.__file__).read_text())
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names == {"__future__", "dataclasses", "math", "ir.plan", "machines"}
    assert not any(isinstance(node, ast.Import) for node in ast.walk(tree))


def test_what_limits_is_the_largest() -> None:
    result = Cost(read=5.0, issue=9.0, matrix=1.0, work=9.0, begin=1.0, merge=1.0, launch=2.0)
    assert (result.total, result.limit) == (13.0, "issue")
    assert replace(result, launch=20.0).limit == "fixed"
