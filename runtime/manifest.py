"""The manifest of an artifact: which files belong to it, what it was made from, where it runs."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn

from ..ir.errors import KvantError
from .folder import Listed
from .strict_json import Json, parse_object

SCHEMA = (1, 0)
"""(major, minor) that this package reads and writes. A reader refuses any other major; a newer
minor only adds keys, and may be read unless `requires` names a feature that is not known here."""

MANIFEST, ID = "manifest.json", "ID"
PLAN, RECIPE, GRAPH = "plan.json", "recipe.toml", "graph.kir"
CONSTANTS, WEIGHT_EDITS = "constants.safetensors", "weight_edits.json"
ALWAYS = (CONSTANTS, GRAPH, PLAN, RECIPE, WEIGHT_EDITS)

MAX_MANIFEST_BYTES = 4 << 20
MAX_TOTAL_BYTES = 8 << 30
KNOWN_FEATURES: frozenset[str] = frozenset()

_KEYS = {"schema", "kvant", "requires", "tools", "model", "recipe", "calibration"}
_KEYS |= {"targets", "files"}
_MODEL_KEYS = {"name", "architecture", "facts", "fingerprint", "weights"}
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_VERSION = re.compile(r"[0-9]{1,4}\.[0-9]{1,4}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DEVICES = {"con", "prn", "aux", "nul"} | {f"{d}{i}" for d in ("com", "lpt") for i in range(10)}
_COPY = "copy the artifact again from its source, or compile it again"


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest whose structure was checked.

    Attributes:
        id: sha256 of the bytes of manifest.json, hexadecimal.
        files: every file of the artifact but manifest.json, ID and report/.
        targets: facts by target name; `kind` and `files` are always there.
        facts: all of it, as read.
    """

    id: str
    files: Mapping[str, Listed]
    targets: Mapping[str, dict[str, Json]]
    facts: dict[str, Json]


def id_of(raw: bytes) -> str:
    """Return the id of an artifact from the bytes of its manifest."""
    return hashlib.sha256(raw).hexdigest()


def read_manifest(raw: bytes, id_file: bytes, pinned: str | None, where: str) -> Manifest:
    """Return the manifest after all checks that need no other file.

    Args:
        raw: bytes of manifest.json.
        id_file: bytes of the file ID.
        pinned: the id that the caller trusts, or none.
        where: path of the artifact.

    Raises: KvantError "manifest-truncated", "manifest-damaged", "id-mismatch", "json-...",
        "schema-newer", "schema-unknown", "feature-unknown", "manifest-invalid", "file-name",
        "artifact-too-large".
    """
    identity = _check_identity(raw, id_file, pinned, where)
    facts = parse_object(raw, f"{where}/{MANIFEST}")
    _check_schema(facts, where)
    _check_requires(facts, where)
    _check_keys(facts, where)
    files = _files(facts, where)
    check_names(files, where)
    targets = _targets(facts, files, where)
    total = sum(listed.size for listed in files.values())
    if total > MAX_TOTAL_BYTES:
        raise KvantError(
            "artifact-too-large",
            f"the manifest lists {total} bytes; more than {MAX_TOTAL_BYTES} are not read",
            where=f"{where}/{MANIFEST}",
            fix="compile again with fewer targets",
        )
    return Manifest(identity, files, targets, facts)


def check_names(names: Iterable[str], where: str) -> None:
    """Refuse names that leave the folder, differ only in case, or mean a device somewhere.

    Raises: KvantError "file-name".
    """
    seen: dict[str, str] = {}
    for name in names:
        parts = name.split("/")
        for part in parts:
            is_device = part.split(".")[0].lower() in _DEVICES
            if not _PART.fullmatch(part) or part.endswith(".") or is_device or len(parts) > 8:
                _refuse_name(f"{name[:200]!a} is not a file name an artifact may use", where)
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            _refuse_name(f"{other!r} and {name!r} are one file where case does not count", where)


def target_of(name: str) -> str | None:
    """Return the target whose folder holds the file `name`, or none."""
    parts = name.split("/")
    return parts[1] if len(parts) > 2 and parts[0] == "targets" else None


def _check_identity(raw: bytes, id_file: bytes, pinned: str | None, where: str) -> str:
    identity = id_of(raw)
    if pinned is not None and pinned.strip().lower() != identity:
        raise KvantError(
            "id-mismatch",
            f"this artifact has id {identity}, but {pinned[:80]!a} was asked for",
            where=where,
            fix="give the folder of the artifact that you pinned, or its own id",
        )
    if id_file == identity.encode() + b"\n":
        return identity
    if not raw.endswith(b"\n}\n"):
        raise KvantError(
            "manifest-truncated",
            f"the manifest is incomplete: it ends after {len(raw)} bytes",
            where=f"{where}/{MANIFEST}",
            fix=_COPY,
        )
    raise KvantError(
        "manifest-damaged",
        f"the manifest has sha256 {identity[:12]}..., but the file ID says "
        f"{id_file[:12].decode('ascii', 'replace')!a}",
        where=f"{where}/{MANIFEST}",
        fix=_COPY,
    )


def _check_schema(facts: dict[str, Json], where: str) -> None:
    schema = facts.get("schema")
    match schema:
        case {"major": bool()} | {"minor": bool()}:
            _invalid("schema", "must be {major, minor}", where)
        case {"major": int(major), "minor": int(minor)}:
            pass
        case _:
            _invalid("schema", "must be {major, minor}", where)
    made_by = f"it was made by kvant {facts.get('kvant')!a}"
    if major > SCHEMA[0]:
        raise KvantError(
            "schema-newer",
            f"the artifact has schema {major}.{minor}; this runtime reads {SCHEMA[0]}.x",
            where=f"{where}/{MANIFEST}",
            fix=f"upgrade kvant ({made_by}), or compile again with this version",
        )
    if major != SCHEMA[0] or minor < 0:
        raise KvantError(
            "schema-unknown",
            f"the artifact has schema {major}.{minor}; this runtime reads {SCHEMA[0]}.x",
            where=f"{where}/{MANIFEST}",
            fix=f"compile again with this version ({made_by})",
        )


def _check_requires(facts: dict[str, Json], where: str) -> None:
    requires = facts.get("requires", [])
    if not isinstance(requires, list):
        _invalid("requires", "must be a list", where)
    unknown = [ascii(name) for name in requires if str(name) not in KNOWN_FEATURES]
    if unknown:
        raise KvantError(
            "feature-unknown",
            f"reading this artifact requires {', '.join(unknown)}, not known to this runtime",
            where=f"{where}/{MANIFEST}",
            fix=f"upgrade kvant (it was made by kvant {facts.get('kvant')!a})",
        )


def _check_keys(facts: dict[str, Json], where: str) -> None:
    if _KEYS - facts.keys():
        _invalid(", ".join(sorted(_KEYS - facts.keys())), "is missing", where)
    if not _is_newer(facts) and facts.keys() - _KEYS:
        _invalid(", ".join(sorted(facts.keys() - _KEYS)), "is not a key of this schema", where)
    if not isinstance(facts["recipe"], str):
        _invalid("recipe", "must be a string", where)
    if not isinstance(facts["calibration"], str | None):
        _invalid("calibration", "must be a string or null", where)
    model = facts["model"]
    if not isinstance(model, dict) or _MODEL_KEYS - model.keys():
        _invalid("model", f"must hold {', '.join(sorted(_MODEL_KEYS))}", where)


def _is_newer(facts: dict[str, Json]) -> bool:
    """Return whether a newer minor version wrote this, whose further keys are left unread."""
    schema = facts["schema"]
    minor = schema.get("minor") if isinstance(schema, dict) else 0
    return isinstance(minor, int) and minor > SCHEMA[1]


def _files(facts: dict[str, Json], where: str) -> dict[str, Listed]:
    table = facts["files"]
    if not isinstance(table, dict):
        _invalid("files", "must be an object", where)
    files = {}
    for name, entry in table.items():
        size, digest = _size_and_digest(entry)
        if size < 0 or not _SHA256.fullmatch(digest):
            _invalid(f"files[{name!a}]", "must be {size, sha256} of a file", where)
        files[name] = Listed(size, digest)
    for name in sorted(set(ALWAYS) - files.keys()):
        _invalid("files", f"must list {name}", where)
    return files


def _targets(
    facts: dict[str, Json], files: Mapping[str, Listed], where: str
) -> dict[str, dict[str, Json]]:
    table = facts["targets"]
    if not isinstance(table, dict):
        _invalid("targets", "must be an object", where)
    targets: dict[str, dict[str, Json]] = {}
    owned: dict[str, list[str]] = {name: [] for name in table}
    for name in files:
        if name in ALWAYS:
            continue
        owner = target_of(name)
        if owner is None or owner not in table:
            _invalid(f"files[{name!r}]", "belongs to no target", where)
        owned[owner].append(name)
    for name, target in table.items():
        check_names([name], where)
        if not isinstance(target, dict) or not isinstance(target.get("kind"), str):
            _invalid(f"targets[{name!r}]", "must have a kind", where)
        if target.get("files") != sorted(owned[name]):
            _invalid(f"targets[{name!r}].files", "must list the files of its folder", where)
        for key, problem in _problems(target):
            _invalid(f"targets[{name!r}].{key}", problem, where)
        targets[name] = target
    return targets


def _problems(target: dict[str, Json]) -> Iterator[tuple[str, str]]:
    """Yield (key, problem) of facts that are there but not what the choice of a target reads."""
    for key in ("system", "machine"):
        if not isinstance(target.get(key, ""), str):
            yield key, "must be a name"
    if not _are_texts(target.get("features", [])):
        yield "features", "must be a list of names"
    glibc = target.get("glibc")
    if glibc is not None and not (isinstance(glibc, str) and _VERSION.fullmatch(glibc)):
        yield "glibc", "must be a version such as 2.17"
    for key, problem in (("packages", "versions"), ("kernels", "texts")):
        table = target.get(key, {})
        if not isinstance(table, dict) or not _are_texts(list(table.values())):
            yield key, f"must be {problem} by name"


def _are_texts(values: Json) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _size_and_digest(entry: Json) -> tuple[int, str]:
    """Return what a well-formed entry says, and (-1, "") of any other."""
    match entry:
        case {"size": bool()}:
            return -1, ""
        case {"size": int(size), "sha256": str(digest)}:
            return size, digest
    return -1, ""


def _invalid(key: str, problem: str, where: str) -> NoReturn:
    raise KvantError("manifest-invalid", f"{key} {problem}", where=f"{where}/{MANIFEST}", fix=_COPY)


def _refuse_name(what: str, where: str) -> NoReturn:
    raise KvantError("file-name", what, where=f"{where}/{MANIFEST}", fix=_COPY)
