"""The whole text of the refusals of the reader: the folder, the manifest, the machine."""

import os
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvant.ir.errors import KvantError
from kvant.runtime import load

from .artifact_maker import COPY, COPY_FILES, Made, builds, expect, refusal, reseal, seal_raw, write

# The folder


def test_folder_missing(made: Made) -> None:
    made.folder = made.folder / "no\x00where"
    expect(
        made,
        "artifact-missing",
        "no such folder",
        "give the folder that holds manifest.json",
    )
    made.folder = made.folder.parent / "nowhere"
    assert refusal(made).code == "artifact-missing"


def test_folder_is_a_file(made: Made) -> None:
    made.folder = made.folder / "manifest.json"
    expect(
        made,
        "artifact-not-a-folder",
        "an artifact is a folder, not a file",
        "give the folder that holds manifest.json",
    )


def test_manifest_missing(made: Made) -> None:
    (made.folder / "manifest.json").unlink()
    expect(
        made,
        "manifest-missing",
        "the folder holds no manifest.json",
        "give the folder that `kvant compile` made",
    )


def test_manifest_is_a_folder(made: Made) -> None:
    (made.folder / "manifest.json").unlink()
    (made.folder / "manifest.json").mkdir()
    what = "manifest.json is a folder; an artifact holds regular files only"
    expect(made, "file-kind", what, COPY_FILES, "manifest.json")


def test_manifest_too_large(made: Made) -> None:
    with (made.folder / "manifest.json").open("wb") as file:
        file.truncate(5 << 20)
    what = "manifest.json has 5242880 bytes; no artifact of kvant has more than 4194304 there"
    fix = "give the folder of a kvant artifact"
    expect(made, "file-too-large", what, fix, "manifest.json")


def test_id_missing(made: Made) -> None:
    (made.folder / "ID").unlink()
    expect(made, "file-missing", "there is no ID", COPY_FILES, "ID")


# The manifest


def test_manifest_truncated(made: Made) -> None:
    path = made.folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:100])
    what = "the manifest is incomplete: it ends after 100 bytes"
    expect(made, "manifest-truncated", what, COPY, "manifest.json")


def test_manifest_damaged(made: Made) -> None:
    (made.folder / "ID").write_text("0" * 64 + "\n")
    what = f"the manifest has sha256 {made.id[:12]}..., but the file ID says '000000000000'"
    expect(made, "manifest-damaged", what, COPY, "manifest.json")


def test_id_pinned(made: Made) -> None:
    what = f"this artifact has id {made.id}, but 'abc' was asked for"
    fix = "give the folder of the artifact that you pinned, or its own id"
    expect(made, "id-mismatch", what, fix, id="abc")


def test_pinned_id_beats_a_forged_one(made: Made) -> None:
    reseal(made.folder, lambda facts: facts.update(recipe="other"))
    assert refusal(made, id=made.id).code == "id-mismatch"


def test_duplicate_key(made: Made) -> None:
    raw = (made.folder / "manifest.json").read_bytes()
    seal_raw(made.folder, raw.replace(b'"kvant"', b'"recipe": "a",\n "kvant"', 1))
    what = "the key 'recipe' is written twice"
    expect(made, "json-duplicate-key", what, COPY, "manifest.json")


def test_newer_schema(made: Made) -> None:
    reseal(made.folder, lambda facts: facts.update(schema={"major": 2, "minor": 3}))
    what = "the artifact has schema 2.3; this runtime reads 1.x"
    fix = "upgrade kvant (it was made by kvant '0.1.0'), or compile again with this version"
    expect(made, "schema-newer", what, fix, "manifest.json")


def test_older_schema(made: Made) -> None:
    reseal(made.folder, lambda facts: facts.update(schema={"major": 0, "minor": 3}))
    what = "the artifact has schema 0.3; this runtime reads 1.x"
    fix = "compile again with this version (it was made by kvant '0.1.0')"
    expect(made, "schema-unknown", what, fix, "manifest.json")


def test_unknown_required_feature(made: Made) -> None:
    reseal(made.folder, lambda facts: facts.update(requires=["sparse", []]))
    what = "reading this artifact requires 'sparse', [], not known to this runtime"
    fix = "upgrade kvant (it was made by kvant '0.1.0')"
    expect(made, "feature-unknown", what, fix, "manifest.json")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda f: f.pop("model"), "model is missing"),
        (lambda f: f.update(colour=1), "colour is not a key of this schema"),
        (lambda f: f.update(schema=1), "schema must be {major, minor}"),
        (lambda f: f.update(schema={"major": True, "minor": 0}), "schema must be {major, minor}"),
        (lambda f: f.update(requires=1), "requires must be a list"),
        (lambda f: f.update(recipe=[]), "recipe must be a string"),
        (lambda f: f.update(calibration=7), "calibration must be a string or null"),
        (
            lambda f: f.update(model={}),
            "model must hold architecture, facts, fingerprint, name, weights",
        ),
        (lambda f: f.update(files=[]), "files must be an object"),
        (lambda f: f["files"].pop("plan.json"), "files must list plan.json"),
        (
            lambda f: f["files"].update({"plan.json": 1}),
            "files['plan.json'] must be {size, sha256} of a file",
        ),
        (
            lambda f: f["files"]["plan.json"].update(size=-1),
            "files['plan.json'] must be {size, sha256} of a file",
        ),
        (
            lambda f: f["files"]["plan.json"].update(size=True),
            "files['plan.json'] must be {size, sha256} of a file",
        ),
        (
            lambda f: f["files"]["plan.json"].update(sha256="AB"),
            "files['plan.json'] must be {size, sha256} of a file",
        ),
        (
            lambda f: f["files"].update(extra=f["files"]["plan.json"]),
            "files['extra'] belongs to no target",
        ),
        (
            lambda f: f["files"].update({"report/a": f["files"]["plan.json"]}),
            "files['report/a'] belongs to no target",
        ),
        (lambda f: f.update(targets=[]), "targets must be an object"),
        (lambda f: f["targets"]["cpu-test"].pop("kind"), "targets['cpu-test'] must have a kind"),
        (
            lambda f: f["targets"]["cpu-test"]["files"].pop(),
            "targets['cpu-test'].files must list the files of its folder",
        ),
        (
            lambda f: f["targets"]["cpu-test"].update(features="avx2"),
            "targets['cpu-test'].features must be a list of names",
        ),
        (
            lambda f: f["targets"]["cpu-test"].update(glibc="two"),
            "targets['cpu-test'].glibc must be a version such as 2.17",
        ),
        (
            lambda f: f["targets"]["cpu-test"].update(system=1),
            "targets['cpu-test'].system must be a name",
        ),
        (
            lambda f: f["targets"]["cpu-test"].update(packages=[]),
            "targets['cpu-test'].packages must be versions by name",
        ),
        (
            lambda f: f["targets"]["cpu-test"].update(kernels=[]),
            "targets['cpu-test'].kernels must be texts by name",
        ),
    ],
)
def test_manifest_invalid(made: Made, change: Callable[[Any], object], what: str) -> None:
    reseal(made.folder, change)
    expect(made, "manifest-invalid", what, COPY, "manifest.json")


@pytest.mark.parametrize(
    "name",
    [
        "targets/cpu-test/../../../etc/passwd",
        "../outside",
        "targets/cpu-test/..",
        "/etc/passwd",
        "targets//x",
        "targets/cpu-test/./x",
        "targets\\cpu-test\\x",
        "C:x",
        "targets/cpu-test/.hidden",
        "targets/cpu-test/a b",
        "targets/cpu-test/a.",
        "targets/cpu-test/NUL.so",
        "targets/cpu-test/com1",
        "targets/cpu-test/é",
        "targets/cpu-test/" + "x" * 129,
        "targets/cpu-test/" + "d/" * 8 + "x",
        "",
        "~/x",
    ],
)
def test_file_name(made: Made, name: str) -> None:
    entry = {"size": 1, "sha256": "0" * 64}
    reseal(made.folder, lambda facts: facts["files"].update({name: entry}))
    what = f"{name[:200]!a} is not a file name an artifact may use"
    expect(made, "file-name", what, COPY, "manifest.json")


def test_names_that_differ_in_case(made: Made) -> None:
    reseal(made.folder, lambda f: f["files"].update({"PLAN.json": f["files"]["plan.json"]}))
    what = "'PLAN.json' and 'plan.json' are one file where case does not count"
    expect(made, "file-name", what, COPY, "manifest.json")


def test_target_name(made: Made) -> None:
    reseal(made.folder, lambda f: f["targets"].update({"../x": {"kind": "cpu", "files": []}}))
    what = "'../x' is not a file name an artifact may use"
    expect(made, "file-name", what, COPY, "manifest.json")


def test_too_large(made: Made) -> None:
    reseal(made.folder, lambda f: f["files"]["plan.json"].update(size=2**40))
    error = refusal(made)
    assert error.code == "artifact-too-large"
    assert re.match(
        r"the manifest lists 10995116\d+ bytes; more than 8589934592 are not", error.what
    )


# The machine


def rewritten(made: Made, name: str = "cpu-other", **facts: Any) -> Made:
    made.folder = made.folder.with_name("other.kvant")
    write(made.folder, targets={"cpu": builds(name, **facts)})
    return made


NO_TARGET_FIX = (
    "install what is missing, or compile for this machine; target='reference' runs anywhere, slowly"
)


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (
            {"system": "Linux", "machine": "riscv64"},
            "it is for Linux on riscv64; this machine is {system} on {machine}",
        ),
        (
            {"features": ["avx9", "avx10"]},
            "it needs avx10, avx9, which this processor does not have",
        ),
        ({"glibc": "9.99"}, "it needs glibc 9.99 or newer; this system has {glibc}"),
        (
            {"packages": {"kvant-none": "1.0"}},
            "the package kvant-none is not installed (pip install 'kvant[cpu]')",
        ),
        (
            {"packages": {"numpy": "1.2.3"}},
            f"it was built for numpy 1.2.3; installed is {np.__version__}",
        ),
        ({"kind": "hip"}, "this version of the runtime does not run targets of kind 'hip'"),
    ],
)
def test_for_another_machine(made: Made, facts: dict[str, Any], reason: str) -> None:
    rewritten(made, **facts)
    system, _, _, _, machine = os.uname()
    glibc = (os.confstr("CS_GNU_LIBC_VERSION") or "glibc none").removeprefix("glibc ")
    reason = reason.format(system=system, machine=machine, glibc=glibc)
    what = f"no compiled target of the artifact runs here: cpu-other: {reason}"
    expect(made, "no-usable-target", what, NO_TARGET_FIX)
    assert load(made.folder, "reference").target == "reference"


def test_unknown_target(made: Made) -> None:
    what = "the artifact has no target 'cuda:sm_90'; it has cpu-test"
    fix = "load one of these, compile again with `-t`, or load the slow 'reference'"
    expect(made, "unknown-target", what, fix, target="cuda:sm_90")


def test_refusals_show_only_the_path_that_was_given(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made.folder.parent)
    (made.folder / "extra").write_text("")
    with pytest.raises(KvantError) as caught:
        load("tiny.kvant")
    assert str(made.folder.parent) not in str(caught.value)
