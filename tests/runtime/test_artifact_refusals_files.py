"""The whole text of every refusal of the reader that is about a file of an artifact."""

import json
import os
import re
from pathlib import Path

import pytest

from kvant.runtime import artifact

from .artifact_maker import COPY_FILES, SO, Made, expect, refusal


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
