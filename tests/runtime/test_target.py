"""Which target is chosen on which machine, and what is said of the others."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvant.ir.errors import KvantError
from kvant.runtime.machine import Machine, this_gpu, this_machine, why_not
from kvant.runtime.target import choose_target

V3 = ("avx2", "fma")
V4 = (*V3, "avx512f")
NO_GPU = "no NVIDIA GPU was found: no driver"
LAPTOP = Machine("Linux", "x86_64", frozenset(V3), (2, 31), lambda: (None, NO_GPU))
SERVER = Machine("Linux", "x86_64", frozenset(V4), (2, 36), lambda: ("sm_80", ""))
HOPPER = Machine("Linux", "x86_64", frozenset(V4), (2, 36), lambda: ("sm_90", ""))
PHONE = Machine("Linux", "aarch64", frozenset({"neon"}), None, lambda: (None, NO_GPU))


def cpu(*features: str, **facts: Any) -> dict[str, Any]:
    base = {"kind": "cpu", "system": "Linux", "machine": "x86_64", "features": list(features)}
    return base | facts


TARGETS: dict[str, dict[str, Any]] = {
    "cpu-x86-64-v3": cpu(*V3),
    "cpu-x86-64-v4": cpu(*V4),
    "cuda-sm_90": {"kind": "cuda", "system": "Linux", "gpu": "sm_90", "packages": {}},
    "reference": {"kind": "reference"},
}


def test_the_one_that_uses_most_of_the_machine_is_chosen() -> None:
    assert choose_target(TARGETS, "auto", "x", SERVER).name == "cpu-x86-64-v4"
    chosen = choose_target(TARGETS, "auto", "x", LAPTOP)
    assert chosen.name == "cpu-x86-64-v3"
    assert chosen.passed_over == {
        "cpu-x86-64-v4": "it needs avx512f, which this processor does not have",
        "cuda-sm_90": NO_GPU,
    }


def test_the_order_of_processors_is_that_of_the_table() -> None:
    """Not that of names or of how many features are asked for; what is not known comes last."""
    best = ["sapphirerapids", "znver4", "x86-64-v4", "alderlake", "x86-64-v3", "x86-64-v2"]
    order = [f"cpu-{name}" for name in (*best, "later", "newest")]
    targets = {name: cpu(*V3[: i % 2]) for i, name in enumerate(sorted(order))}
    targets["cpu-newest"], targets["cpu-later"] = cpu(*V3[:1]), cpu(*V3)
    while targets:
        chosen = choose_target(targets, "auto", "x", LAPTOP)
        assert (chosen.name, *chosen.also) == tuple(order)
        preferred = f"{chosen.name} was preferred"
        assert chosen.passed_over == {name: preferred for name in order[1:]}
        del targets[order.pop(0)]


def test_what_is_not_linked_is_never_chosen() -> None:
    reason = (
        "it is an object file and assembly for macOS, which nothing links to a library that could "
        "be loaded"
    )
    targets = {"cpu-apple-m1": cpu(system="Darwin", machine="arm64"), "cpu-x86-64-v3": cpu(*V3)}
    chosen = choose_target(targets, "auto", "x", LAPTOP)
    assert (chosen.name, chosen.also) == ("cpu-x86-64-v3", ())
    assert chosen.passed_over == {"cpu-apple-m1": reason}
    mac = Machine("Darwin", "arm64", frozenset(), None, lambda: (None, NO_GPU))
    with pytest.raises(KvantError) as caught:
        choose_target({"cpu-apple-m1": targets["cpu-apple-m1"]}, "auto", "x", mac)
    what = f"no compiled target of the artifact runs here: cpu-apple-m1: {reason}"
    assert (caught.value.code, caught.value.what) == ("no-usable-target", what)


def test_a_gpu_is_preferred_if_it_is_of_the_right_kind() -> None:
    assert choose_target(TARGETS, "auto", "x", HOPPER).name == "cuda-sm_90"
    assert choose_target(TARGETS, "cuda", "x", HOPPER).name == "cuda-sm_90"
    chosen = choose_target(TARGETS, "auto", "x", SERVER)
    assert chosen.passed_over["cuda-sm_90"] == "it is for sm_90; this machine's GPU is sm_80"


def test_the_packages_of_a_gpu_are_named_with_their_extra() -> None:
    facts = {"kind": "cuda", "gpu": "sm_90", "packages": {"kvant-none": "1"}}
    reason = "the package kvant-none is not installed (pip install 'kvant[cuda]')"
    assert why_not(facts, HOPPER) == reason


def test_as_many_parts_of_a_version_count_as_are_named() -> None:
    major = np.__version__.split(".")[0]
    assert why_not({"kind": "cuda", "packages": {"numpy": major}}, LAPTOP) is None
    assert why_not({"kind": "cuda", "packages": {"numpy": "1"}}, LAPTOP) == (
        f"it was built for numpy 1; installed is {np.__version__}"
    )


def test_this_machine_has_a_gpu_or_says_why_not() -> None:
    found, reason = this_gpu()
    assert (found is None) == bool(reason)
    assert found is None or re.fullmatch(r"sm_\d+", found)


def test_who_asks_for_one_gets_that_one() -> None:
    for name in ("cpu:x86-64-v3", "cpu-x86-64-v3"):
        chosen = choose_target(TARGETS, name, "x", SERVER)
        assert chosen.name == "cpu-x86-64-v3"
        assert chosen.passed_over["cpu-x86-64-v4"] == "cpu-x86-64-v3 was preferred"
    assert choose_target(TARGETS, "cpu", "x", SERVER).name == "cpu-x86-64-v4"
    assert choose_target(TARGETS, "reference", "x", PHONE).name == "reference"


def test_auto_never_falls_back_to_the_reference() -> None:
    with pytest.raises(KvantError) as caught:
        choose_target(TARGETS, "auto", "x", PHONE)
    assert str(caught.value) == (
        "no compiled target of the artifact runs here: "
        "cpu-x86-64-v3: it is for Linux on x86_64; this machine is Linux on aarch64; "
        "cpu-x86-64-v4: it is for Linux on x86_64; this machine is Linux on aarch64; "
        f"cuda-sm_90: {NO_GPU}\n"
        "  where: x\n"
        "  fix: install what is missing, or compile for this machine; "
        "target='reference' runs anywhere, slowly"
        "  [no-usable-target]"
    )


def test_an_artifact_of_the_reference_alone_is_served_by_it() -> None:
    only = {"reference": {"kind": "reference"}}
    assert choose_target(only, "auto", "x", PHONE).name == "reference"
    with pytest.raises(KvantError) as caught:
        choose_target(only, "cpu", "x", SERVER)
    assert caught.value.what == "the artifact has no target 'cpu'; it has reference"


def test_an_artifact_without_targets() -> None:
    with pytest.raises(KvantError, match="runs here: it has none"):
        choose_target({}, "auto", "x", SERVER)
    assert choose_target({}, "reference", "x", SERVER).name == "reference"


def test_glibc() -> None:
    assert why_not(cpu(glibc="2.31"), LAPTOP) is None
    assert why_not(cpu(glibc="2.4"), LAPTOP) is None
    reason = "it needs glibc 2.32 or newer; this system has 2.31"
    assert why_not(cpu(glibc="2.32"), LAPTOP) == reason
    phone = {"kind": "cpu", "glibc": "2.17"}
    assert why_not(phone, PHONE) == "it needs glibc 2.17 or newer; this system has none"


def test_this_machine_is_read(tmp_path: Path) -> None:
    machine = this_machine()
    assert machine.system == "Linux"
    assert machine.features
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "processor : 0\nflags\t\t: pni sse4_2 avx512_vnni abm avx_vnni\n\nflags : x\n"
    )
    found = this_machine(cpuinfo).features
    assert {"sse3", "sse4.2", "avx512vnni", "lzcnt", "avxvnni", "avx512_vnni"} < found
    assert "x" not in found
    cpuinfo.write_text("Features : fp asimd asimddp\n")
    assert {"neon", "dotprod"} < this_machine(cpuinfo).features
    assert this_machine(tmp_path / "none").features == frozenset()
