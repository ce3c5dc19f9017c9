"""The whole text of every refusal of the reader."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvant.ir.errors import KvantError
from kvant.runtime import artifact, load

from .artifact_maker import Made, builds, expect, make, refusal, reseal, seal_raw, write

COPY = "copy the artifact again from its source, or compile it again"
COPY_FILES = "copy the artifact again from its source, with `cp -rL`, or compile it again"
SO = "targets/cpu-test/p0/kernels.so"


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    return make(tmp_path / "tiny.kvant", monkeypatch)


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


# The files


def test_file_missing(made: Made) -> None:
    (made.folder / SO).unlink()
    (made.folder / "plan.json").unlink()
    what = f"the manifest lists 'plan.json', '{SO}', but the folder does not hold them"
    expect(made, "file-missing", what, COPY_FILES)


@pytest.mark.parametrize("name", ["notes.txt", ".git/config", "targets/cpu-test/p0/x.so", ".hid"])
def test_file_extra(made: Made, name: str) -> None:
    (made.folder / name).parent.mkdir(exist_ok=True)
    (made.folder / name).write_text("")
    shown = "'.git', '.git/config'" if name.startswith(".git") else repr(name)
    what = f"the manifest does not list {shown}"
    fix = "remove what was added, or copy the artifact again; only report/ may be added to"
    expect(made, "file-extra", what, fix)


def test_file_extra_cannot_paint_the_terminal(made: Made) -> None:
    for i in range(9):
        (made.folder / f"\x1b[31m{i}").write_text("")
    assert refusal(made).what == (
        "the manifest does not list "
        + ", ".join(f"'\\x1b[31m{i}'" for i in range(8))
        + " and 1 more"
    )


def test_empty_folder_and_report_file_are_extra(made: Made) -> None:
    (made.folder / "report").write_text("not a folder")
    (made.folder / "empty").mkdir()
    assert refusal(made).what == "the manifest does not list 'empty', 'report'"


def test_file_size(made: Made) -> None:
    path = made.folder / SO
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"x")
    what = f"{SO} has {size + 1} bytes, but the manifest says {size}"
    expect(made, "file-size", what, COPY_FILES, SO)


def test_file_digest(made: Made) -> None:
    path = made.folder / SO
    facts = json.loads((made.folder / "manifest.json").read_bytes())
    path.write_bytes(b"\0" * path.stat().st_size)
    what = (
        f"{SO} is not the file that was published: its sha256 is 1cc5e1aa5aec..., "
        f"but the manifest says {facts['files'][SO]['sha256'][:12]}..."
    )
    found = refusal(made)
    assert re.sub("its sha256 is .{12}", "its sha256 is 1cc5e1aa5aec", found.what) == what
    assert found.fix == f"{COPY_FILES}; if it happens again, check the disk"
    assert found.where == f"{made.folder}/{SO}"


def test_symlink(made: Made, tmp_path: Path) -> None:
    path = made.folder / SO
    path.rename(tmp_path / "blob")
    path.symlink_to(tmp_path / "blob")
    what = f"{SO} is a symbolic link; an artifact holds regular files only"
    expect(made, "file-kind", what, COPY_FILES, SO)


def test_symlink_to_a_folder(made: Made, tmp_path: Path) -> None:
    (made.folder / "targets").rename(tmp_path / "elsewhere")
    (made.folder / "targets").symlink_to(tmp_path / "elsewhere")
    what = "targets is a symbolic link; an artifact holds regular files only"
    expect(made, "file-kind", what, COPY_FILES, "targets")


@pytest.mark.parametrize("name", ["manifest.json", "ID", SO])
def test_hard_link(made: Made, tmp_path: Path, name: str) -> None:
    os.link(made.folder / name, tmp_path / "second name")
    what = f"{name} is one of 2 hard links to the same file; an artifact holds regular files only"
    expect(made, "file-kind", what, COPY_FILES, name)


def test_pipe_is_refused_without_waiting(made: Made) -> None:
    for name in ("plan.json", "ID"):
        (made.folder / name).unlink()
        os.mkfifo(made.folder / name)
        what = f"{name} is a pipe; an artifact holds regular files only"
        found = refusal(made)
        assert (found.code, found.what) == ("file-kind", what if name == "ID" else found.what)
        (made.folder / name).unlink()
        (made.folder / name).write_text("")


@pytest.mark.parametrize(
    ("name", "named"), [(SO, SO), ("targets", "targets/cpu-test/p0/kernels.py")]
)
def test_a_link_put_there_after_the_listing_is_refused(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, named: str
) -> None:
    (made.folder / name).rename(tmp_path / "elsewhere")
    (made.folder / name).symlink_to(tmp_path / "elsewhere")
    monkeypatch.setattr(artifact, "check_closed_world", lambda root, names, where: None)
    what = f"{named} is a symbolic link; an artifact holds regular files only"
    expect(made, "file-kind", what, COPY_FILES, named)


def test_folder_in_place_of_a_file(made: Made) -> None:
    (made.folder / SO).unlink()
    (made.folder / SO).mkdir()
    what = f"{SO} is a folder; an artifact holds regular files only"
    expect(made, "file-kind", what, COPY_FILES, SO)


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
