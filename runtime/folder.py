"""Read the files of a closed folder: exactly those listed, regular, of the right size and digest.

Every file is opened below a handle of the folder without following links, and read once; whoever
uses it afterwards uses the bytes that were hashed, not the file.
"""

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NoReturn

from ..ir.errors import KvantError

REPORT = "report"  # outside the closed world: for people, never read
MAX_ENTRIES = 10_000
_COPY = "copy the artifact again from its source, with `cp -rL`, or compile it again"
_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFBLK: "a block device",
    stat.S_IFCHR: "a character device",
    stat.S_IFDIR: "a folder",
}


@dataclass(frozen=True, slots=True)
class Listed:
    """What the manifest says of one file: `size` in bytes, `sha256` in hexadecimal."""

    size: int
    sha256: str


def open_folder(path: str) -> int:
    """Return a handle of the folder; the caller closes it.

    Raises: KvantError "artifact-missing" or "artifact-not-a-folder".
    """
    fix = "give the folder that holds manifest.json"
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except NotADirectoryError:
        raise KvantError(
            "artifact-not-a-folder", "an artifact is a folder, not a file", where=path, fix=fix
        ) from None
    except (FileNotFoundError, ValueError):
        raise KvantError("artifact-missing", "no such folder", where=path, fix=fix) from None
    except OSError as error:
        raise KvantError(
            "artifact-unreadable",
            f"the system refused to open the folder: {error.strerror}",
            where=path,
            fix="give your user the right to read it",
        ) from None


def check_closed_world(root: int, names: Iterable[str], where: str) -> None:
    """Refuse a folder that holds anything but regular files of these names and `report/`.

    Args:
        root: handle of the folder.
        names: relative paths with "/" between folders.
        where: path of the folder, for the error.

    Raises: KvantError "file-missing", "file-extra" or "file-kind".
    """
    wanted = set(names)
    folders = {"/".join(n.split("/")[:i]) for n in wanted for i in range(1, n.count("/") + 1)}
    found: dict[str, int] = {}
    try:
        _walk(root, "", found, where)
    except OSError as error:
        raise KvantError(
            "file-unreadable",
            f"the system refused to list a folder of the artifact: {error.strerror}",
            where=where,
            fix="give your user the right to read it",
        ) from None
    for name in sorted((wanted | folders) & found.keys()):
        is_right = stat.S_ISREG if name in wanted else stat.S_ISDIR
        if not is_right(found[name]):
            _refuse_kind(name, _kind(found[name]), where)
    extra = sorted(found.keys() - wanted - folders)
    if extra:
        raise KvantError(
            "file-extra",
            f"the manifest does not list {_names(extra)}",
            where=where,
            fix="remove what was added, or copy the artifact again; only report/ may be added to",
        )
    missing = sorted(wanted - found.keys())
    if missing:
        raise KvantError(
            "file-missing",
            f"the manifest lists {_names(missing)}, but the folder does not hold "
            f"{'it' if len(missing) == 1 else 'them'}",
            where=where,
            fix=_COPY,
        )


def read_small(root: int, name: str, where: str, limit: int) -> bytes:
    """Return a file of at most `limit` bytes; refuse a longer one without reading it.

    Raises: KvantError "file-missing", "file-kind", "file-unreadable" or "file-too-large".
    """
    handle = _open(root, name, where)
    try:
        size = os.fstat(handle).st_size
        if size > limit:
            raise KvantError(
                "file-too-large",
                f"{name} has {size} bytes; no artifact of kvant has more than {limit} there",
                where=f"{where}/{name}",
                fix="give the folder of a kvant artifact",
            )
        return _read(handle, limit)
    finally:
        os.close(handle)


def read_verified(root: int, files: Mapping[str, Listed], where: str) -> dict[str, bytes]:
    """Return the content of every file after its size and digest were compared.

    Raises: KvantError "file-size", "file-digest", "file-kind", "file-missing", "file-unreadable".
    """
    contents = {}
    for name, listed in sorted(files.items()):
        handle = _open(root, name, where)
        try:
            size = os.fstat(handle).st_size
            data = _read(handle, listed.size + 1) if size == listed.size else b""
        finally:
            os.close(handle)
        if size != listed.size or len(data) != listed.size:
            raise KvantError(
                "file-size",
                f"{name} has {size} bytes, but the manifest says {listed.size}",
                where=f"{where}/{name}",
                fix=_COPY,
            )
        digest = hashlib.sha256(data).hexdigest()
        if digest != listed.sha256:
            raise KvantError(
                "file-digest",
                f"{name} is not the file that was published: its sha256 is {digest[:12]}..., "
                f"but the manifest says {listed.sha256[:12]}...",
                where=f"{where}/{name}",
                fix=f"{_COPY}; if it happens again, check the disk",
            )
        contents[name] = data
    return contents


def _walk(folder: int, prefix: str, found: dict[str, int], where: str) -> None:
    """Add the mode of everything below `folder` to `found`, without following links."""
    with os.scandir(folder) as entries:
        modes = {entry.name: entry.stat(follow_symlinks=False).st_mode for entry in entries}
    for name, mode in sorted(modes.items()):
        if not prefix and name == REPORT and stat.S_ISDIR(mode):
            continue
        found[prefix + name] = mode
        if len(found) > MAX_ENTRIES:
            raise KvantError(
                "file-extra",
                f"the folder holds more than {MAX_ENTRIES} entries; that is no artifact",
                where=where,
                fix="give the folder that holds manifest.json and nothing else",
            )
        if stat.S_ISDIR(mode):
            below = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            try:
                _walk(below, f"{prefix}{name}/", found, where)
            finally:
                os.close(below)


def _open(root: int, name: str, where: str) -> int:
    """Return a handle of a regular file below `root`; no link is followed on the way."""
    *folders, last = name.split("/")
    at = os.dup(root)
    part = ""
    try:
        for part in folders:
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
            os.close(at)
            at = below
        part = last
        # Without O_NONBLOCK, opening a pipe would wait for a writer for ever.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        handle = os.open(part, flags, dir_fd=at)
    except OSError as error:
        _refuse_open(name, part, error, where, at)
    finally:
        os.close(at)
    facts = os.fstat(handle)
    if stat.S_ISREG(facts.st_mode) and facts.st_nlink == 1:
        return handle
    os.close(handle)
    if stat.S_ISREG(facts.st_mode):
        _refuse_kind(name, f"one of {facts.st_nlink} hard links to the same file", where)
    _refuse_kind(name, _kind(facts.st_mode), where)


def _read(handle: int, limit: int) -> bytes:
    """Return up to `limit` bytes of an open file."""
    parts = []
    while limit > 0 and (part := os.read(handle, min(limit, 1 << 24))):
        parts.append(part)
        limit -= len(part)
    return b"".join(parts)


def _refuse_open(name: str, part: str, error: OSError, where: str, at: int) -> NoReturn:
    """Say why `part` of the path `name` could not be opened below the handle `at`."""
    if isinstance(error, FileNotFoundError):
        raise KvantError(
            "file-missing", f"there is no {name}", where=f"{where}/{name}", fix=_COPY
        ) from None
    with contextlib.suppress(OSError):
        mode = os.stat(part, dir_fd=at, follow_symlinks=False).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            _refuse_kind(name, _kind(mode), where)
    raise KvantError(
        "file-unreadable",
        f"the system refused to open {name}: {error.strerror}",
        where=f"{where}/{name}",
        fix="give your user the right to read it",
    ) from None


def _kind(mode: int) -> str:
    return _KINDS.get(stat.S_IFMT(mode), "no regular file")


def _refuse_kind(name: str, kind: str, where: str) -> NoReturn:
    raise KvantError(
        "file-kind",
        f"{name} is {kind}; an artifact holds regular files only",
        where=f"{where}/{name}",
        fix=_COPY,
    )


def _names(names: list[str]) -> str:
    """Return names for an error: quoted, so that no name can paint the terminal; at most eight."""
    shown = ", ".join(ascii(name) for name in names[:8])
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"
