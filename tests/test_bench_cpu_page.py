"""docs/bench-cpu.md: what the page says of the numbers."""

import json

import cpu
import cpu_measure
import cpu_model
import cpu_render
import pytest

from .bench_rows import QUIET, data, goal_line, probe, row


def test_the_page_is_made_from_the_data() -> None:
    if not cpu.DATA.exists() and not cpu.PAGE.exists():
        pytest.skip("nothing was measured yet: make bench-cpu")
    assert cpu.PAGE.read_text() == cpu_render.page(json.loads(cpu.DATA.read_text()))


def test_refused_cells_show_the_reason_and_no_number() -> None:
    page = cpu_render.page(data({**row(), "refused": "machine busy: others used 50% of the cores"}))
    line = next(x for x in page.splitlines() if "ik_q4_0 |" in x)
    assert "refused: machine busy" in line
    assert "2.00" not in page


def test_losses_are_shown_as_losses() -> None:
    lost = row(**cpu_measure.compare([2 * x for x in QUIET], QUIET))
    page = cpu_render.page(data(lost))
    assert "**0.50**" in page
    assert "**missed, a loss**" in goal_line(page, "int4 decode at 4k and 16k vs ik_llama.cpp q4_0")


def test_a_goal_is_judged_by_its_worst_cell() -> None:
    other = row(context=16384, **cpu_measure.compare(QUIET, [1.3 * x for x in QUIET]))
    line = goal_line(cpu_render.page(data(row(), other)), "int4 decode at 4k and 16k vs ik")
    assert line.endswith("| 4k, 1 thread: 2.00 (2.00); 16k, 1 thread: 1.30 (1.30) | reached |")
    assert cpu_render.verdict([2.0, 2.5], 1.2, 2.0) == "aim reached"
    assert cpu_render.verdict([1.1], 1.2, 2.0) == "**missed**"
    assert cpu_render.verdict([], 1.2, 2.0) == "not measured"
    refused = {**other, "refused": "machine busy"}
    line = goal_line(cpu_render.page(data(row(), refused)), "int4 decode at 4k and 16k vs ik")
    assert line.endswith("| incomplete |")


def test_the_best_of_torch_counts_and_bf16_not_where_the_machine_has_its_dots() -> None:
    slow = row(peer="torch_f32", **cpu_measure.compare(QUIET, [4 * x for x in QUIET]))
    fast = row(peer="torch_bf16")
    text = "int4 decode vs the best of torch SDPA"
    assert "2.00 (2.00)" in goal_line(cpu_render.page(data(slow, fast)), text)
    page = cpu_render.page(data(slow, fast, bf16_dots=True))
    assert "4.00 (4.00)" in goal_line(page, text)
    assert "not counted" in page
    assert "torch_bf16" in page


def test_a_share_of_the_bandwidth_compares_bytes_a_second() -> None:
    assert cpu_render.bandwidth_share(probe()) == 0.5  # half the time for a quarter of the bytes
    page = cpu_render.page(data(probe()))
    assert "| `int4-token` at 4k | L3 |" in page
    assert "| 0.12, floats |" in page


def test_the_limit_is_the_larger_of_bytes_and_instructions() -> None:
    ours = probe()["ours_ms"]["median"]
    assert cpu_render.limit_times(probe()) == pytest.approx((ours / 2, 0.84))
    assert cpu_render.limit_share(probe()) == pytest.approx(0.84 / ours)
    few = probe(executed={"dot": 10})
    assert cpu_render.limit_share(few) == pytest.approx(0.5)
    assert cpu_render.what_limits(probe()) == (
        "Instructions: 0.84 ms of instructions, 0.50 ms of reading; values go through floats, "
        "because the recipe says so."
    )
    assert cpu_render.what_limits(few).startswith("Bytes: 0.02 ms")
    assert "50% of the time is waiting and calls." in cpu_render.what_limits(few)
    page = cpu_render.page(data(probe(recipe="ksort-bfp", left_out=["sort-k"])))
    assert "| `ksort-bfp` without sort-k at 4k | L3 |" in page
    goal = goal_line(cpu_render.page(data(probe())), "int4 and 2-bit: share of the machine's limit")
    assert goal.endswith("| 0.7 | 0.85 | `int4-token` 4k, 1 thread: 0.84 | reached |")
    uncounted = {k: x for k, x in probe().items() if k not in ("executed", "third_ms")}
    goal = goal_line(cpu_render.page(data(uncounted)), "int4 and 2-bit: share of the machine's")
    assert goal.endswith("`int4-token` 4k, 1 thread: not counted | incomplete |")


def test_kernels_for_another_processor_are_labelled() -> None:
    other = row(recipe="int4-token@x86-64-v3")
    page = cpu_render.page(data(other))
    assert "| `int4-token` for x86-64-v3 | ik_q4_0 | 2.00 |" in page
    assert "4k, 1 thread: 2.00 (2.00)" in goal_line(page, "int4 decode, our kernels for x86-64-v3")


def test_two_bits_beside_four_show_both_errors() -> None:
    wide = {"recipe": "kivi-2bit", "shape": "32x32x128", "context": 32768}
    page = cpu_render.page(data(row(**wide, peer="kvant:int4-token")))
    line = goal_line(page, "2-bit (`kivi-2bit`) decode vs our int4")
    assert "32k, 1 thread: 2.00 (2.00; error 0.10 beside 0.12) | aim reached |" in line


def test_a_ratio_that_no_attention_exceeds_follows_from_the_free_run() -> None:
    found = {"ours_ms": {"median": 200.0}, "peer_ms": {"median": 400.0}}
    text = cpu_model._at_most(found | {"third_ms": {"median": 100.0}}, tokens=4)
    assert "40.0 tokens/s, which is 50% of our time: no attention reaches more than 4.00" in text
    assert cpu_model._at_most({"refused": "x"}, tokens=4) == ""
