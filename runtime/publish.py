"""Write a folder so that it is there whole or not at all.

Everything is written into a staging folder beside the output, flushed to the disk, and published
by one rename. What a killed process left behind is removed by the next one.
"""

import contextlib
import fcntl
import os
import secrets
import shutil
import stat
import time
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from ..ir.errors import KvantError

_STAGING = ".staging"
_SECONDS_TO_LOCK = 60  # between the making of a staging folder and its lock: much less than this


def refuse_existing(out: Path) -> None:
    """Refuse an output that exists, or whose parent folder does not.

    Raises: KvantError "output-exists" or "output-folder-missing".
    """
    if os.path.lexists(out):
        raise KvantError(
            "output-exists",
            f"{out.name} exists already, and kvant never writes over anything",
            where=str(out),
            fix="give another output path, or remove it first",
        )
    if not out.absolute().parent.is_dir():
        raise KvantError(
            "output-folder-missing",
            f"there is no folder to put {out.name} into",
            where=str(out),
            fix="make the parent folder first",
        )


def publish_folder(out: Path, files: Mapping[str, bytes]) -> None:
    """Create the folder `out` with exactly these files.

    Args:
        out: path that does not exist yet.
        files: content by path relative to `out`, with "/" between folders.

    Raises: KvantError "output-exists", "output-folder-missing", or "output-not-written" when the
        system refuses a write. After any exception, KeyboardInterrupt too, nothing is left.
    """
    refuse_existing(out)
    try:
        _publish(out.absolute(), files)
    except OSError as error:
        total = sum(len(data) for data in files.values())
        raise KvantError(
            "output-not-written",
            f"the system refused to write {out.name} ({total} bytes): {error.strerror}",
            where=str(out),
            fix="check free space and permissions of the folder, then run the same command again",
        ) from error


def _publish(out: Path, files: Mapping[str, bytes]) -> None:
    parent = out.parent
    # Names are cut: the limit of a file system is 255 bytes, however long the output's name is.
    prefix = f".{out.name.encode()[:150].decode(errors='ignore')}."
    staging = parent / f"{prefix}{secrets.token_hex(8)}{_STAGING}"
    ours: os.stat_result | None = None
    try:
        _collect_stale(parent, prefix)
        os.mkdir(staging)
        lock = _hold(staging)
        try:
            ours = os.fstat(lock)
            _write_tree(staging, files)
            refuse_existing(out)
            # A folder made by someone else since that line: rename fails, unless it is empty.
            os.rename(staging, out)
            flush_folder(parent)
        finally:
            os.close(lock)
    except BaseException:
        _withdraw(staging, out, ours)
        raise


def _withdraw(staging: Path, out: Path, ours: os.stat_result | None) -> None:
    """Remove what was written, also when the rename was done but not what comes after it."""
    if ours is not None and not os.path.lexists(staging):
        with contextlib.suppress(OSError):
            if os.path.samestat(os.lstat(out), ours):
                os.rename(out, staging)
    shutil.rmtree(staging, ignore_errors=True)


def _write_tree(root: Path, files: Mapping[str, bytes]) -> None:
    folders = {root}
    for name, data in files.items():
        path = root.joinpath(*PurePosixPath(name).parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        folders.update(p for p in path.parents if p.is_relative_to(root))
        _write_file(path, data)
    for folder in sorted(folders, key=lambda p: len(p.parts), reverse=True):
        flush_folder(folder)


def _write_file(path: Path, data: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
    try:
        rest = memoryview(data)
        while rest:  # a write may be short: at a file size limit the first one is
            rest = rest[os.write(handle, rest) :]
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _hold(staging: Path) -> int:
    """Return a handle whose lock says: the process that writes here is alive."""
    handle = os.open(staging, os.O_RDONLY | os.O_DIRECTORY)
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return handle


def _collect_stale(parent: Path, prefix: str) -> None:
    """Remove staging folders of this output whose process is gone."""
    for name in os.listdir(parent):
        if not (name.startswith(prefix) and name.endswith(_STAGING)):
            continue
        path = parent / name
        with contextlib.suppress(OSError):
            facts = os.lstat(path)
            if not stat.S_ISDIR(facts.st_mode) or time.time() - facts.st_mtime < _SECONDS_TO_LOCK:
                continue
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(handle)
