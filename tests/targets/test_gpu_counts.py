"""Counts in the machine code of GPU kernels: the parser, and budgets that may only fall."""

import json
from dataclasses import replace
from typing import Any

import gpu_static
import gpu_static_render
import gpu_static_rows
import pytest

from kvant.targets.gpu_counts import (
    Counts,
    Pass,
    count_gcn,
    count_sass,
    main_loop,
    passes_of,
    per_element,
    resident,
)
from kvant.targets.gpu_loops import Loop, innermost, loops_of
from kvant.targets.machines import DEVICES, GPUS

# Lower than this share of its budget, a count shows that the budget is out of date.
SLACK = 0.9
IN_MAKE_TEST = (
    ("fp16", "sm_90"),
    ("int4-token", "sm_80"),
    ("int4-token", "sm_90"),
    ("int8-token", "sm_90"),
    ("kivi-4bit", "sm_90"),
    ("int4-token", "gfx942"),
)
ALL = [(name, kind) for name in gpu_static.names() for kind in gpu_static.KINDS]
REST = [pair for pair in ALL if pair not in IN_MAKE_TEST]
BUDGETS = json.loads(gpu_static.BUDGETS.read_text())


def within(name: str, kind: str) -> None:
    """Compile attend and hold it to its budget."""
    row = gpu_static.measure(name, gpu_static_rows.MAIN, kind, ("attend",))
    assert "refused" not in row, row["refused"]
    most = BUDGETS.get(name, {}).get(kind)
    assert most is not None, f"{name} on {kind} has no budget: bench/gpu_static.py --budgets"
    wrong = judged(gpu_static.held(row), most)
    assert not wrong, "; ".join(wrong)


def judged(counts: dict[str, float], most: dict[str, float]) -> list[str]:
    wrong = [f"{x}: {counts[x]:g}, the budget is {most[x]:g}" for x in most if counts[x] > most[x]]
    if counts["per_element"] < SLACK * most["per_element"]:
        fallen = f"{counts['per_element']:g}, the budget is {most['per_element']:g}"
        wrong.append(f"per_element: {fallen}; lower it: python bench/gpu_static.py --budgets")
    return wrong


@pytest.mark.parametrize(("name", "kind"), IN_MAKE_TEST)
def test_instructions_stay_within_their_budget(name: str, kind: str) -> None:
    within(name, kind)


@pytest.mark.long
@pytest.mark.parametrize(("name", "kind"), REST)
def test_instructions_of_every_recipe_stay_within_their_budget(name: str, kind: str) -> None:
    within(name, kind)


def test_a_budget_is_broken_by_more_and_by_much_less() -> None:
    most = {"per_element": 2.0, "spills": 1, "scalar_loads": 0}
    assert judged(most, most) == []
    assert judged(most | {"per_element": 1.81, "spills": 0}, most) == []
    risen = judged(most | {"per_element": 2.01, "scalar_loads": 1}, most)
    assert risen == ["per_element: 2.01, the budget is 2", "scalar_loads: 1, the budget is 0"]
    (fallen,) = judged(most | {"per_element": 1.7}, most)
    assert fallen.startswith("per_element: 1.7, the budget is 2; lower it: python bench/")


def test_budgets_only_fall() -> None:
    loop = {"spills": 3, "scalar_loads": 0}
    row: dict[str, Any] = {"recipe": "a", "shape": "32x8x128", "gpu": "sm_90", "main": loop}
    row["per_element"] = 2.0
    budgets: gpu_static.Budgets = {}
    assert gpu_static.lower([row], budgets) == []
    assert gpu_static.lower([row | {"per_element": 1.5}], budgets) == []
    assert gpu_static.lower([row], budgets) == ["a on sm_90: per_element 2, budget 1.5"]
    assert gpu_static.lower([row | {"refused": "no"}, row | {"shape": "8x2x64"}], {}) == []
    assert budgets == {"a": {"sm_90": {"per_element": 1.5, "spills": 3, "scalar_loads": 0}}}
    assert json.loads(gpu_static.dumped_budgets(budgets)) == budgets


SASS = """
	//----- nvinfo : EIATTR_REGCOUNT
	.align		4
        /*0000*/ 	.byte	0x04, 0x2f
.L_0:
        /*0004*/ 	.word	index@(other)
        /*0008*/ 	.word	0x00000010
	//----- nvinfo : EIATTR_REGCOUNT
.L_1:
        /*0004*/ 	.word	index@(attend)
        /*0008*/ 	.word	0x000000a8
	//----- nvinfo : EIATTR_FRAME_SIZE
        /*0010*/ 	.word	index@(attend)
        /*0014*/ 	.word	0x00000048
.text.attend:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_9:
        /*0010*/                   IADD3 R3, R3, 0x1, RZ ;
        /*0020*/              @P2 BRA `(.L_x_9) ;
.L_x_0:
        /*0030*/                   LDGSTS.E.BYPASS.128 [R4], desc[UR4][R2.64] ;
        /*0040*/                   LDG.E.128.CONSTANT R8, desc[UR4][R2.64] ;
        /*0050*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0060*/                   LDSM.16.MT88.4 R8, [R2] ;
        /*0070*/                   LOP3.LUT R9, R9, 0xf000f, RZ, 0xc0, !PT ;
        /*0080*/              @!P0 BRA `(.L_x_1) ;
        /*0090*/                   HADD2.F32 R5, -RZ, R5.H0_H0 ;
.L_x_1:
        /*00a0*/                   BRA.DIV UR4, `(.L_x_5) ;
.L_x_6:
        /*00b0*/                   ISETP.GE.AND P1, PT, R3, R4, PT ;
        /*00c0*/              @!P1 BRA `(.L_x_0) ;
.L_x_2:
        /*00d0*/                   BRA.U UP0, `(.L_x_3) ;
        /*00e0*/                   STL [R1], R5 ;
        /*00f0*/                   LDG.E.U16 R8, desc[UR4][R2.64] ;
        /*0100*/                   LDG.E R8, desc[UR4][R2.64] ;
        /*0110*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0120*/                   LDL.LU R5, [R1] ;
        /*0130*/                   MUFU.EX2 R6, R6 ;
        /*0140*/                   FADD R6, R6, R5 ;
        /*0150*/                   FFMA R6, R6, R5, R5 ;
        /*0160*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0170*/                   BRA `(.L_x_2) ;
.L_x_3:
        /*0180*/                   LDL R5, [R1+0x4] ;
        /*0190*/                   EXIT ;
.L_x_5:
        /*01a0*/                   WARPSYNC.COLLECTIVE R2, `(.L_x_7) ;
.L_x_7:
        /*01b0*/                   SHFL.BFLY PT, R2, R3, 0x1, 0x1f ;
        /*01c0*/                   BRA `(.L_x_6) ;
.L_x_8:
        /*01d0*/                   BRA `(.L_x_8);
"""


def test_the_loops_of_nvidias_code_are_found_and_counted() -> None:
    counts = count_sass(SASS)
    assert (counts.registers, counts.stack, counts.spills) == (0xA8, 0x48, 3)
    first, second = counts.loops  # that without matrix instructions is none of them
    assert first.kinds == {
        "async copy": 1,
        "global": 1,
        "matrix": 1,
        "shared": 1,
        "integer": 1,
        "convert": 1,
        "branch": 3,
        "predicate": 1,
    }
    assert (first.instructions, first.loads, first.spills) == (10, {16: 1}, 0)
    assert first.scalar_loads == 0
    assert second.instructions == 11
    assert (second.kinds["float"], second.kinds["barrier"], second.kinds["branch"]) == (3, 1, 2)
    assert (second.loads, second.spills, second.scalar_loads) == ({2: 1, 4: 1}, 2, 1)


def test_what_only_parted_threads_run_is_left_out() -> None:
    parted = count_sass(SASS).loops[0]
    assert "shuffle" not in parted.kinds
    # as an ordinary branch it would belong to the loop
    joined = count_sass(SASS.replace("BRA.DIV UR4,", "BRA.U UP1,")).loops[0]
    assert joined.instructions == parted.instructions + 3
    assert joined.kinds["shuffle"] == 1


def test_the_main_loop_has_the_fewest_instructions_for_a_token() -> None:
    counts = count_sass(SASS)
    first, second = counts.loops
    assert main_loop(counts, (Pass(64, 3), Pass(64, 1))) == (first, Pass(64, 3))
    # the second takes four times as many tokens at once
    assert main_loop(counts, (Pass(16, 1), Pass(64, 1)))[0] is second
    # one loop of the text that became two
    assert main_loop(counts, (Pass(64, 2),)) == (first, Pass(64, 2))
    with pytest.raises(ValueError, match=r"^the text has 3 loops, the code 2 with matrix"):
        main_loop(counts, (Pass(64, 1), Pass(64, 1), Pass(16, 1)))
    with pytest.raises(ValueError, match="the text has 0 loops"):
        main_loop(Counts((), 1, 0, 1, 0), ())


GCN = """
attend:
	s_load_dwordx2 s[0:1], s[4:5], 0x0
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	buffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen
	s_waitcnt vmcnt(0)
	v_mfma_f32_16x16x16_f16 v[0:3], v[4:5], v[6:7], v[0:3]
	ds_read_b128 v[0:3], v9
	v_and_b32_e32 v1, 15, v1
	v_cvt_f32_f16_e32 v2, v2
	v_pk_fma_f16 v2, v2, v3, v4
	v_add_f32_dpp v1, v1, v1 row_shr:1 row_mask:0xf bank_mask:0xf
	s_add_u32 s2, s2, 1
	s_cbranch_scc1 .LBB0_3
; %bb.2:
	global_load_ushort v1, v[2:3], off
	scratch_store_dword off, v1, s32        ; 4-byte Folded Spill
	buffer_load_dword v1, off, s[0:3], s33 offset:4 ; 4-byte Folded Reload
.LBB0_3:
	s_cbranch_vccnz .LBB0_1
	s_branch .LBB0_5
	v_mfma_f32_16x16x16_f16 v[0:3], v[4:5], v[6:7], v[0:3]
	s_branch .LBB0_1
.LBB0_5:
	s_endpgm
.Lfunc_end0:
	.set .Lattend.num_vgpr, 13
	v_mfma_f32_16x16x16_f16 v[0:3], v[4:5], v[6:7], v[0:3]
    .private_segment_fixed_size: 12
    .vgpr_count:     247
"""


def test_the_loops_of_amds_code_are_found_and_counted() -> None:
    counts = count_gcn(GCN)
    assert (counts.registers, counts.stack, counts.spills) == (247, 12, 2)
    assert counts.instructions == 19  # none behind the function's end
    (loop,) = counts.loops
    assert loop.kinds == {
        "global": 2,
        "barrier": 1,
        "matrix": 1,
        "shared": 1,
        "integer": 1,
        "convert": 1,
        "float": 1,
        "shuffle": 1,
        "scalar": 1,
        "branch": 2,
        "spill": 2,
    }
    assert (loop.instructions, loop.vector) == (14, 4)
    assert (loop.loads, loop.scalar_loads, loop.spills) == ({16: 1, 2: 1}, 1, 2)


def test_loops_in_loops_are_told_apart_wherever_they_are_entered() -> None:
    #      0 -> 1 -> 2 -> 3 -> 4,   3 -> 2 inside 4 -> 1;   5 jumps to itself
    follows = ((1,), (2,), (3,), (4, 2), (1, 5), (5,))
    assert loops_of(follows) == (Loop((1, 2, 3, 4), (Loop((2, 3), ()),)), Loop((5,), ()))
    assert [loop.places for loop in innermost(loops_of(follows), {3})] == [(2, 3)]
    assert [loop.places for loop in innermost(loops_of(follows), {4})] == [(1, 2, 3, 4)]
    # rotated: entered in its middle, and its pieces apart
    rotated = ((2,), (2,), (4, 3), (3,), (1,))
    assert loops_of(rotated)[0].places == (1, 2, 4)
    # entered at 3, behind the loop of 1 and 2 in it
    assert loops_of(((3,), (2,), (1, 3), (1, 4), ()))[0].inner == (Loop((1, 2), ()),)
    assert loops_of(((1,), (2,), ())) == ()


def test_passes_are_those_of_the_text() -> None:
    text = """
    if split < splits:
        for tile in tl.range(first, last, num_stages=3):
            x = 1

            y = tl.dot(a, b)
        for tile in tl.range(first, last, num_stages=2):
            x = 1
        y = tl.dot(a, b)
    for i in range(4, 8):
        y = tl.dot(a, b)
    for at in range(begin, tl.minimum(a, stop), 32):
        y = tl.dot(a, b)
    for x in tl.range(a, b, 16, num_stages=2):
        if c:
            y = tl.dot(a, b)
"""
    assert passes_of(text, 64) == (Pass(64, 3), Pass(64, 1), Pass(32, 1), Pass(16, 2))
    assert passes_of("x = 1", 64) == ()


def test_instructions_of_an_element() -> None:
    # 240 instructions of 4 warps for 64 keys and 64 values of 128 channels
    assert per_element(240, 4, 32, 64 * 2 * 128) == 1.875


def test_blocks_on_a_multiprocessor() -> None:
    ampere, ada, hopper, cdna = (GPUS[x] for x in ("sm_80", "sm_89", "sm_90", "gfx942"))
    assert resident(hopper, 255, 0, 4) == 2  # by registers: 65,536 / (256 x 128)
    assert resident(hopper, 128, 0, 4) == 4
    assert resident(hopper, 129, 0, 4) == 3  # in portions of 8
    assert resident(hopper, 32, 57344, 4) == 4  # by shared memory: 228 KiB / 57 KiB
    assert resident(ampere, 32, 81920, 4) == 2
    assert resident(ampere, 32, 82945, 4) == 1  # 164 KiB / (81 KiB + 1 + 1 KiB)
    assert resident(ada, 32, 0, 4) == 12  # by warps: 48
    assert resident(ada, 32, 0, 1) == 24  # by blocks
    assert resident(cdna, 247, 0, 4) == 2  # two waves on each of four SIMDs
    assert resident(cdna, 64, 32768, 4) == 2  # by LDS


def test_every_kind_of_gpu_has_a_device_and_fits_a_block() -> None:
    assert set(DEVICES) == set(GPUS)
    for gpu in GPUS.values():
        assert gpu.shared <= gpu.shared_per_sm
        assert resident(gpu, 64, gpu.shared, 4) == 1


def row_of(recipe: str, **fields: Any) -> dict[str, Any]:
    loop = {"kinds": {"matrix": 8}, "spills": 0, "scalar_loads": 0}
    kernel = {
        "seconds": 1.0,
        "instructions": 99,
        "registers": 100,
        "stack": 0,
        "spills": 0,
        "shared": 4096,
        "warps": 4,
        "resident": 4,
    }
    row = {"recipe": recipe, "shape": "32x8x128", "gpu": "sm_90", "kernels": {"attend": kernel}}
    row |= {"main": loop, "other_loops": [], "per_element": 1.0, "vector_per_element": 1.0}
    return row | {"predicted": []} | fields


def goal(text: str, rows: list[dict[str, Any]]) -> str:
    page = gpu_static_render.page({"triton": "3", "rows": rows})
    return next(line for line in page.splitlines() if line.startswith(f"| {text}"))


def test_the_page_is_made_from_the_data() -> None:
    if not gpu_static.DATA.exists() and not gpu_static.PAGE.exists():
        pytest.skip("nothing was made yet: make bench-gpu-static")
    data = json.loads(gpu_static.DATA.read_text())
    assert gpu_static.PAGE.read_text() == gpu_static_render.page(data)
    assert gpu_static.DATA.read_text() == gpu_static.dumped(data)


def test_a_goal_is_judged_by_its_worst_row() -> None:
    base = row_of("fp16", per_element=2.0)
    rows = [base, row_of("int8-token", per_element=2.6)]
    assert goal("8-bit, NVIDIA", rows).endswith("| 1.4 |  | 1.30 | `int8-token` sm_90 | reached |")
    rows.append(row_of("int4-token", per_element=2.4))
    assert goal("4-bit, NVIDIA", rows).endswith("| 1.20 | `int4-token` sm_90 | aim reached |")
    rows.append(row_of("quarot-kv4", per_element=3.2))
    assert goal("4-bit, NVIDIA", rows).endswith("| 1.60 | `quarot-kv4` sm_90 | **missed** |")
    assert goal("4-bit, NVIDIA", rows[1:]).endswith("| incomplete |")
    assert goal("4-bit, AMD", rows).endswith("| incomplete |")


def test_a_slow_16_bit_kernel_makes_no_goal_reached() -> None:
    rows = [row_of("fp16", per_element=25.0), row_of("int8-token", per_element=1.9)]
    found = goal("8-bit, NVIDIA", rows)
    assert found.endswith("| **not judged**: our 16-bit kernel is no fair one |")
    cell = {"us": 10.0, "limit": "read", "batch": 1, "tokens": 4096}
    rows = [row | {"predicted": [cell]} for row in rows]
    page = gpu_static_render.page({"triton": "3", "rows": rows})
    assert "| `int8-token` | 10 read |" in page  # and no claim of being faster


def test_limits_name_what_misses_them() -> None:
    good = row_of("int4-token")
    for text in ("spills in", "global loads of 1", "blocks of attend", "seconds of"):
        assert goal(text, [good]).endswith("| reached |")
    loop = {"kinds": {}, "spills": 3, "scalar_loads": 5}
    kernel = good["kernels"]["attend"] | {"resident": 1, "seconds": 11.0, "shared": 232449}
    bad = row_of("nf4", main=loop, kernels={"attend": kernel})
    where = "`nf4` 32x8x128 sm_90, attend"
    assert goal("spills in", [good, bad]).endswith(f"| 3 | {where} | **missed**: 1 of 2 |")
    assert goal("global loads of 1", [good, bad]).endswith(f"| 5 | {where} | **missed**: 1 of 2 |")
    assert goal("blocks of attend", [good, bad]).endswith(f"| 1 | {where} | **missed**: 1 of 2 |")
    assert goal("seconds of", [good, bad]).endswith(f"| 11.0 | {where} | **missed**: 1 of 2 |")
    assert goal("shared memory", [good, bad]).endswith("| **missed**: 1 of 2 |")
    base = bad | {"recipe": "fp16"}
    assert goal("spills in", [good, base]).endswith("| reached |")
    assert goal("the same of `fp16`", [good, base]).endswith(
        "| 11.0 | `fp16` 32x8x128 sm_90, attend |  |"
    )
    assert "the same of" not in gpu_static_render.page({"triton": "3", "rows": [good, bad]})


def test_refused_rows_are_shown_and_counted() -> None:
    refused = {"recipe": "nf4", "shape": "32x8x128", "gpu": "sm_90", "refused": "too wide"}
    page = gpu_static_render.page({"triton": "3", "rows": [row_of("fp16"), refused]})
    assert "1 refused, which miss every goal" in page
    assert "| `nf4` | refused: too wide |" in page


def test_times_are_called_predicted() -> None:
    cell = {"us": 10.0, "limit": "read", "batch": 1, "tokens": 4096}
    rows = [row_of("fp16", predicted=[cell])]
    rows.append(row_of("int4-token", predicted=[cell | {"us": 4.0}]))
    page = gpu_static_render.page({"triton": "3", "rows": rows})
    assert "**Predicted, not measured**" in page
    assert "### Predicted: H200" in page
    assert "| `int4-token` | 4 (2.50x) read |" in page


def test_goals_of_time_are_predicted_against_published_times() -> None:
    cell = {"us": 12.5, "limit": "read", "batch": 8, "tokens": 131072, "bytes": 48 * 10**6}
    short = {"us": 7.0, "limit": "fixed", "batch": 1, "tokens": 4096, "bytes": 10**6}
    slow = {"us": 50.0, "limit": "issue", "batch": 1, "tokens": 32768, "bytes": 10**6}
    rows = [row_of("int4-token", predicted=[cell, short, slow])]
    assert goal("`int4-token`, 1 x 4k", rows).endswith("| 0.9 | 1.2 | 14 | 7.0 | 2.00, aim |")
    assert goal("`int4-token`, 1 x 32k", rows).endswith("| 43.5 | 50.0 | 0.87, **missed** |")
    assert goal("`int8-token`, 8 x 32k", rows).endswith("| 253.5 |  | not made |")
    share = goal("`int4-token`, 8 x 128k, 48 MB: share", rows)
    assert share.endswith("| 0.6 | 0.8 |  | 12 | 0.80, aim |")


def test_what_is_made_anew_follows_from_the_kernels_text() -> None:
    one, other = GPUS["sm_80"], GPUS["sm_90"]
    assert gpu_static.made_of("a", one) != gpu_static.made_of("b", one)
    assert gpu_static.made_of("a", one) != gpu_static.made_of("a", other)
    plan = gpu_static.plan_of("qserve-kv4", "32x8x128")
    assert plan.q_maps  # constants are arguments: no model is needed
    assert replace(plan, q_maps=()) != plan
    assert set(gpu_static.names()) >= {name for g in gpu_static_render.GOALS for name in g.recipes}
