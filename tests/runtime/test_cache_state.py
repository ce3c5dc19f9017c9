"""Caches in files: what comes back is what was saved, or nothing comes back."""

import fcntl
import hashlib
import os
import stat
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvant.ir.encodings import Bfp, Int, Tokens
from kvant.ir.errors import KvantError
from kvant.ir.plan import AttentionPlan, StreamPlan
from kvant.runtime import strict_json
from kvant.runtime.cache import Cache
from kvant.runtime.launch_reference import Kernels
from kvant.runtime.restore import restore

from .cache_bytes import poison, stored_bytes
from .cache_runner import random_kv

PLAN = AttentionPlan(
    q_heads=4,
    scale=0.2,
    softcap=None,
    window=None,
    q_maps=(),
    k=StreamPlan("k", 2, 32, (), Tokens(Int(4, "channel", 32), sink=4), 64),
    v=StreamPlan("v", 2, 16, (), Tokens(Bfp(8, 16), sink=2, recent=20), 64),
    out_maps=(),
)


@dataclass
class Source:
    """Stands for an artifact of two layers."""

    id: str = "a1"
    plans: tuple[AttentionPlan, ...] = (PLAN, PLAN)

    @property
    def kernels(self) -> Kernels:
        return Kernels(self.plans, [{}] * len(self.plans))

    def new_cache(self, **options: Any) -> Cache:
        return Cache(self.plans, self.kernels, artifact_id=self.id, **options)


def values(tokens: int, seed: int = 0) -> Any:
    return random_kv(np.random.default_rng(seed), PLAN, 2, tokens)


def filled(source: Source, padding: Any = None) -> Cache:
    cache = source.new_cache(batch=2, max_tokens=400, start=[0, 7])
    for layer in range(2):
        cache.append(layer, *values(130, layer))
        cache.append(layer, *values(20, layer + 5), padding)
    return cache


def attend(cache: Cache) -> list[Any]:
    q = np.random.default_rng(1).normal(size=(2, 4, 3, 32)).astype(np.float32)
    return [cache.attend(layer, q) for layer in range(2)]


def refused(code: str, call: Callable[[], object]) -> KvantError:
    with pytest.raises(KvantError) as caught:
        call()
    assert caught.value.code == code, caught.value
    return caught.value


@pytest.mark.parametrize("padding", [None, [20, 11]])
def test_restore_is_identity(tmp_path: Path, padding: Any) -> None:
    source = Source()
    cache = filled(source, padding)
    cache.reserve(3)
    poison(cache, 0xFF)
    cache.save(tmp_path / "state")
    twin = restore(source, tmp_path / "state")
    assert twin is not cache
    assert (twin.batch, twin.max_tokens, twin.reserved) == (2, 400, 3)
    assert twin.start.tolist() == [0, 7]
    assert stored_bytes(twin) == stored_bytes(cache)
    for _ in range(2):
        assert all((a == b).all() for a, b in zip(attend(cache), attend(twin), strict=True))
        for each in (cache, twin):
            for layer in range(2):
                each.append(layer, *values(33, 9))
            each.truncate(each.length - 2)
            each.flush()
        assert stored_bytes(twin) == stored_bytes(cache)
    assert twin.lengths.tolist() == cache.lengths.tolist()


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_small_states(tmp_path: Path, tokens: int) -> None:
    source = Source()
    cache = source.new_cache(batch=1, max_tokens=8)
    for layer in range(2):
        cache.append(layer, *(x[:1, :, :tokens] for x in values(5)))
    cache.save(tmp_path / "state")
    assert stored_bytes(restore(source, tmp_path / "state")) == stored_bytes(cache)


def test_same_state_same_file(tmp_path: Path) -> None:
    """Neither page numbers nor slots nor leftovers in the tail get into a file."""
    source = Source()
    one, other = filled(source), filled(source)
    for layer in range(2):
        other.append(layer, *values(9))
    other.truncate(150)
    one.flush()
    other.flush()
    one.save(tmp_path / "1")
    other.save(tmp_path / "2")
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_file_is_private_and_alone(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_bytes(b"old")
    path.chmod(0o644)
    (tmp_path / ".state.partial").write_bytes(b"left by a killed process" * 10**6)
    filled(Source()).save(str(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["state"]
    restore(Source(), path)


def test_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = tmp_path / "state", filled(Source())
    path.write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        error = refused("output-not-written", lambda: cache.save(path))
    assert "No space left on device" in error.what
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["state"]
    refused("output-not-written", lambda: cache.save(tmp_path / "no" / "folder"))
    with open(tmp_path / ".state.partial", "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        refused("output-not-written", lambda: cache.save(path))
    assert path.read_bytes() == b"old"


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    source, path = Source(), tmp_path / "state"
    live = filled(source)
    live.save(path)
    good = path.read_bytes()
    before, out = stored_bytes(live), attend(live)
    rng = np.random.default_rng(0)
    mutants = [good[: int(n)] for n in rng.integers(0, len(good), 50)]
    mutants += [good + b"\0", good[:-1], b""]
    for at in [*range(24), *rng.integers(0, len(good), 150), *range(len(good) - 26, len(good))]:
        flipped = bytearray(good)
        flipped[int(at)] ^= 1 << int(rng.integers(8))
        mutants.append(bytes(flipped))
    for mutant in mutants:
        path.write_bytes(mutant)
        with pytest.raises(KvantError) as caught:
            restore(source, path)
        assert caught.value.code in ("state-damaged", "state-version")
    assert stored_bytes(live) == before
    assert all((a == b).all() for a, b in zip(out, attend(live), strict=True))
    path.write_bytes(good)
    restore(source, path)


def sealed(good: bytes, edit: Callable[[Any], object]) -> bytes:
    """Return the file with another header and right checksums: what only a reader's checks stop."""
    magic, version, size, _ = struct.unpack_from("<8sIII", good)
    header = strict_json.parse_object(good[20 : 20 + size], "test")
    edit(header)
    raw = strict_json.canonical(header)
    head = struct.pack("<8sIII", magic, version, len(raw), zlib.crc32(raw))
    body = head + raw + good[20 + size : -32]
    return body + hashlib.sha256(body).digest()


def test_what_is_damaged_is_named(tmp_path: Path) -> None:
    path = tmp_path / "state"
    filled(Source()).save(path)
    good = path.read_bytes()
    body = bytearray(good[:-32])
    body[-1000] ^= 1  # in the last page, under a digest that fits
    path.write_bytes(bytes(body) + hashlib.sha256(body).digest())
    error = refused("state-damaged", lambda: restore(Source(), path))
    assert error.what == "page 3 of a v stream is damaged"
    path.write_bytes(good[:-100])
    error = refused("state-damaged", lambda: restore(Source(), path))
    assert error.what == f"{len(good) - 100} bytes long, but its header describes {len(good)}"


@pytest.mark.parametrize(
    "edit",
    [
        lambda h: h.update(batch=0),
        lambda h: h.update(batch=3),
        lambda h: h.update(batch=True),
        lambda h: h.update(max_tokens=1),
        lambda h: h.update(max_tokens=1 << 50),
        lambda h: h.update(max_tokens="400"),
        lambda h: h.update(reserved=-1),
        lambda h: h.update(start=[0]),
        lambda h: h.update(start=[0, -7]),
        lambda h: h.update(start=[0, 8]),
        lambda h: h.update(layers=h["layers"][:1]),
        lambda h: h.pop("layers"),
        lambda h: h["layers"][0].update(columns=[]),
        lambda h: h["layers"][0].update(columns=[[0, [0, 0]]]),
        lambda h: h["layers"][0]["columns"][-1][1].__setitem__(0, 1 << 40),
        lambda h: h["layers"][0]["columns"][-1][1].__setitem__(0, 151),
        lambda h: h["layers"][0]["columns"][-1].__setitem__(0, 401),
        lambda h: h["layers"][0]["encoded"][0].__setitem__(0, 5),
        lambda h: h["layers"][0]["encoded"][0].__setitem__(0, 3),
        lambda h: h["layers"][0]["encoded"][0].__setitem__(0, 164),
        lambda h: h["layers"][0]["encoded"][1].__setitem__(0, 1),
        lambda h: h["layers"][0]["encoded"].pop(),
        lambda h: h["layers"][0].update(encoded=None),
        lambda h: h["layers"][0]["held"][0].__setitem__(0, 68),
        lambda h: h["layers"][0]["held"].pop(),
        lambda h: h["layers"][0].pop("held"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path: Path, edit: Callable[[Any], object]) -> None:
    path = tmp_path / "state"
    filled(Source()).save(path)
    good = path.read_bytes()
    assert sealed(good, lambda h: None) == good
    path.write_bytes(sealed(good, edit))
    error = refused("state-damaged", lambda: restore(Source(), path))
    assert error.what.startswith("the header makes no sense")  # found before the file's size is
    path.write_bytes(sealed(good, lambda h: h["layers"][0]["encoded"][0].__setitem__(0, 68)))
    error = refused("state-damaged", lambda: restore(Source(), path))
    assert "but its header describes" in error.what


def test_foreign_states_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "state"
    filled(Source()).save(path)
    error = refused("state-other-artifact", lambda: restore(Source("b2"), path))
    assert str(error) == (
        "the state belongs to artifact 'a1'\n"
        f"  where: {path}\n"
        "  fix: load that artifact; this one is 'b2'  [state-other-artifact]"
    )
    other = AttentionPlan(4, 0.2, None, 9, (), PLAN.k, PLAN.v, ())
    refused("state-other-artifact", lambda: restore(Source(plans=(PLAN, other)), path))
    newer = bytearray(path.read_bytes())
    newer[8] = 3
    path.write_bytes(bytes(newer))
    refused("state-version", lambda: restore(Source(), path))
    refused("state-missing", lambda: restore(Source(), tmp_path / "none"))
    refused("state-missing", lambda: restore(Source(), tmp_path))
