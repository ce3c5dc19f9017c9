"""A folder is published whole or not at all, whatever happens at whichever call."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvant.ir.errors import KvantError
from kvant.runtime import publish
from kvant.runtime.publish import publish_folder

FILES = {"a": b"1" * 5000, "targets/x/p0/b": b"2", "targets/x/p1/c": b"", "ID": b"id\n"}
CALLS = ("mkdir", "open", "write", "fsync", "close", "rename", "listdir", "lstat")


def content(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_publishes_exactly_the_files(tmp_path: Path) -> None:
    publish_folder(tmp_path / "out", FILES)
    assert content(tmp_path / "out") == FILES
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "a").stat().st_mode & 0o111 == 0


def test_a_very_long_name_is_fine(tmp_path: Path) -> None:
    out = tmp_path / ("é" * 120 + "x" * 15)  # 255 bytes, the limit of a name
    publish_folder(out, FILES)
    assert content(out) == FILES


def test_a_relative_path_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    publish_folder(Path("out"), FILES)
    assert content(tmp_path / "out") == FILES


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "dangling link"])
def test_existing_output_is_refused_and_untouched(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "dangling link":
        out.symlink_to("nowhere")
    else:
        out.mkdir()
        if kind == "folder":
            (out / "mine").write_text("mine")
    with pytest.raises(KvantError) as caught:
        publish_folder(out, FILES)
    assert str(caught.value) == (
        "out exists already, and kvant never writes over anything\n"
        f"  where: {out}\n  fix: give another output path, or remove it first  [output-exists]"
    )
    assert os.listdir(tmp_path) == ["out"]
    assert "a" not in content(out)


def test_missing_parent_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "no" / "out"
    with pytest.raises(KvantError) as caught:
        publish_folder(out, FILES)
    assert str(caught.value) == (
        "there is no folder to put out into\n"
        f"  where: {out}\n  fix: make the parent folder first  [output-folder-missing]"
    )


def failing(name: str, at: int, error: BaseException, is_after: bool) -> tuple[Any, list[int]]:
    """Return os.<name> that fails at its `at`-th call, before or after doing the work."""
    real: Callable[..., Any] = getattr(os, name)
    calls: list[int] = []

    def fail(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == at and not is_after:
            raise error
        result = real(*arguments, **options)
        if len(calls) == at:
            if name == "open":
                os.closerange(result, result + 1)  # what the caller never got it cannot close
            raise error
        return result

    return fail, calls


@pytest.mark.parametrize("is_after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_left_wherever_it_fails(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    error: BaseException,
    is_after: bool,
) -> None:
    out = tmp_path / "out"
    for at in range(1, 200):
        handles = len(os.listdir("/proc/self/fd"))
        with monkeypatch.context() as patch:
            fail, calls = failing(name, at, error, is_after)
            patch.setattr(publish.os, name, fail)
            try:
                publish_folder(out, FILES)
                raised = None
            except (KvantError, KeyboardInterrupt) as caught:
                raised = caught
        if len(calls) < at:
            break
        if raised is None:  # a question whose answer is not needed, such as: does it exist
            assert content(out) == FILES
            shutil.rmtree(out)
            continue
        assert os.listdir(tmp_path) == [], (name, at)
        assert len(os.listdir("/proc/self/fd")) <= handles + (name == "close"), (name, at)
        if isinstance(error, OSError):
            assert isinstance(raised, KvantError)
            assert raised.code == "output-not-written"
    assert at > 1, "the call is never made: the test proves nothing"
    assert content(out) == FILES


def test_a_refused_write_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(publish.os, "write", full)
    with pytest.raises(KvantError) as caught:
        publish_folder(tmp_path / "out", FILES)
    assert str(caught.value) == (
        "the system refused to write out (5004 bytes): No space left on device\n"
        f"  where: {tmp_path / 'out'}\n"
        "  fix: check free space and permissions of the folder, then run the same command again"
        "  [output-not-written]"
    )


def test_short_writes_are_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(publish.os, "write", lambda handle, data: real(handle, data[:7]))
    publish_folder(tmp_path / "out", FILES)
    monkeypatch.undo()
    assert content(tmp_path / "out") == FILES


def test_everything_is_flushed_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    order: list[str] = []
    fsync, rename = os.fsync, os.rename

    def note_fsync(handle: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{handle}"))
        order.append("fsync")
        fsync(handle)

    def note_rename(source: Path, target: Path) -> None:
        order.append("rename")
        rename(source, target)

    monkeypatch.setattr(publish.os, "fsync", note_fsync)
    monkeypatch.setattr(publish.os, "rename", note_rename)
    publish_folder(tmp_path / "out", FILES)
    names = {path.split(".staging", 1)[-1] for path in flushed}
    assert {f"/{name}" for name in FILES} < names
    assert {"", "/targets", "/targets/x", "/targets/x/p0", "/targets/x/p1"} < names
    assert order.count("rename") == 1
    assert order[order.index("rename") + 1 :] == ["fsync"]
    assert flushed[-1] == str(tmp_path)


def test_leftovers_of_a_killed_process_are_collected(tmp_path: Path) -> None:
    code = (
        "import os, sys, signal, pathlib; from kvant.runtime import publish;"
        "publish.flush_folder = lambda folder: os.kill(os.getpid(), signal.SIGKILL);"
        "publish.publish_folder(pathlib.Path(sys.argv[1]), {'a/b': b'1'})"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], cwd="/")
    left = os.listdir(tmp_path)
    assert len(left) == 1
    assert left[0].startswith(".out.")
    (tmp_path / ".out.mine").mkdir()  # looks alike, but is not ours
    os.utime(tmp_path / ".out.mine", (0, 0))
    publish_folder(tmp_path / "out", FILES)
    assert left[0] in os.listdir(tmp_path)  # so new that its writer may not have locked it yet
    (tmp_path / "out").rename(tmp_path / "done")
    os.utime(tmp_path / left[0], (0, 0))
    publish_folder(tmp_path / "out", FILES)
    assert sorted(os.listdir(tmp_path)) == [".out.mine", "done", "out"]


def test_a_living_writer_is_left_alone(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, time; from kvant.runtime import publish;"
        "flush = publish.flush_folder\n"
        "def wait(folder):\n"
        "    print('ready', flush=True); sys.stdin.readline(); flush(folder)\n"
        "publish.flush_folder = wait\n"
        "publish.publish_folder(pathlib.Path(sys.argv[1]), {'a': b'1'})"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    pipes: dict[str, Any] = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    with subprocess.Popen(command, text=True, cwd="/", **pipes) as other:
        assert other.stdout is not None
        other.stdout.readline()
        os.utime(tmp_path / os.listdir(tmp_path)[0], (0, 0))
        publish_folder(tmp_path / "out", FILES)
        assert len(os.listdir(tmp_path)) == 2
        _, errors = other.communicate("\n" * 9, timeout=30)
    assert "output-exists" in errors
    assert other.returncode == 1
    assert os.listdir(tmp_path) == ["out"]
    assert content(tmp_path / "out") == FILES


def test_kills_leave_the_whole_folder_or_none(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from kvant.runtime.publish import publish_folder\n"
        "files = {f'd{i}/f': bytes([i]) * 9999 for i in range(60)}\n"
        "print('ready', flush=True)\n"
        "publish_folder(pathlib.Path(sys.argv[1]), files)"
    )
    files = {f"d{i}/f": bytes([i]) * 9999 for i in range(60)}
    outcomes = set()
    for delay in (0.0, 0.002, 0.005, 0.01, 0.05, None):
        out = tmp_path / "out"
        command = [sys.executable, "-c", code, str(out)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd="/") as other:
            assert other.stdout is not None
            other.stdout.readline()
            if delay is not None:
                time.sleep(delay)
                other.kill()
        outcomes.add(out.exists())
        if out.exists():
            assert content(out) == files
            out.rename(tmp_path / f"done-{delay}")
    assert outcomes == {True, False}
