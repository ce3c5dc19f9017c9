"""Verification finds wrong kernels of every kind, and lets right ones through."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvant.ir.errors import KvantError
from kvant.runtime import launch_reference, verify
from kvant.runtime.stream import Stream

from .artifact_maker import INTEGER_PLANS, PLANS, Made, make, sparse_plans

Kernels = launch_reference.Kernels


class Right(Kernels):
    """Float32 noise of the size that compiled kernels have."""

    def attend(self, layer: int, q: Any, k: Stream, v: Stream) -> Any:
        out, lse = super().attend(layer, q, k, v)
        return out * np.float32(1 + 1e-6), lse + np.float32(1e-6)


class WrongScale(Kernels):
    def attend(self, layer: int, q: Any, k: Stream, v: Stream) -> Any:
        return super().attend(layer, q * np.float32(1.001), k, v)


class WrongOutput(Kernels):
    """By 0.05 %."""

    def attend(self, layer: int, q: Any, k: Stream, v: Stream) -> Any:
        out, lse = super().attend(layer, q, k, v)
        return out * np.float32(1.0005), lse


class OneIntegerOff(Kernels):
    """One integer of one query rounds the other way."""

    def queries(self, layer: int, q: Any) -> Any:
        x = super().queries(layer, q)
        x[-1, -1, -1, 3] += np.abs(x[-1, -1, -1]).max() / 32767
        return x


class WrongLse(Kernels):
    def attend(self, layer: int, q: Any, k: Stream, v: Stream) -> Any:
        out, lse = super().attend(layer, q, k, v)
        return out, lse + np.float32(1e-3)


class NotANumber(Kernels):
    def attend(self, layer: int, q: Any, k: Stream, v: Stream) -> Any:
        out, lse = super().attend(layer, q, k, v)
        out[-1, -1, -1, -1] = np.nan
        return out, lse


class WrongHead(Kernels):
    def attend(self, layer: int, q: Any, k: Stream, v: Stream) -> Any:
        out, lse = super().attend(layer, q[:, ::-1], k, v)
        return out[:, ::-1], lse[:, ::-1]


class LastLayerWithoutMaps(Kernels):
    """Right for all layers but the last one of a plan."""

    def append(self, layer: int, stream: Stream, x: Any, first: Any, count: Any) -> None:
        super().append(0 if layer == 2 else layer, stream, x, first, count)


class ForgetsStart(Kernels):
    def append(self, layer: int, stream: Stream, x: Any, first: Any, count: Any) -> None:
        super().append(layer, stream, x, first * 0, count)


class RoundsDown(Kernels):
    """Writes codes that are one too small wherever they can be."""

    def encode(self, layer: int, stream: Stream, begin: Any, end: Any) -> None:
        super().encode(layer, stream, begin, end)
        for row in range(len(begin)):
            for page in stream.table[row][stream.table[row] >= 0]:
                fields = stream.layout.unpack(stream.pages[page])
                fields["codes"] = np.maximum(fields["codes"], 1) - np.uint8(1)
                stream.layout.write(stream.pages[page], 0, fields)


class ForgetsOneGroup(Kernels):
    """Leaves the last token that it should encode in one head as it was."""

    def encode(self, layer: int, stream: Stream, begin: Any, end: Any) -> None:
        tail = stream.tail.copy()
        slot = end[0] - 1 - stream.tail_first[0]
        if end[0] > begin[0]:
            stream.tail[0, 0, slot] = 0
        super().encode(layer, stream, begin, end)
        stream.tail[...] = tail


WRONG = (
    WrongScale,
    WrongOutput,
    WrongLse,
    NotANumber,
    WrongHead,
    LastLayerWithoutMaps,
    ForgetsStart,
    RoundsDown,
    ForgetsOneGroup,
)


class LosesEntries(Kernels):
    """Stores the outliers' channels, but zeros in place of their values."""

    def encode(self, layer: int, stream: Stream, begin: Any, end: Any) -> None:
        super().encode(layer, stream, begin, end)
        for page in stream.table[stream.table >= 0]:
            fields = stream.layout.unpack(stream.pages[page])
            fields["value"] *= np.float16(0.0)
            stream.layout.write(stream.pages[page], 0, fields)


@pytest.mark.parametrize("limit", [0.0, 1.0, 8.0])
@pytest.mark.parametrize("kernels", [LosesEntries, Kernels])
def test_lost_entries_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernels: type[Kernels], limit: float
) -> None:
    made = make(tmp_path / "sparse.kvant", monkeypatch, plans=sparse_plans(limit))
    use(monkeypatch, kernels)
    if kernels is Kernels:
        assert verify.verify(made.folder)["computed_share"] < 0.1
        return
    with pytest.raises(KvantError) as caught:
        verify.verify(made.folder)
    assert caught.value.code == "kernel-disagrees"


def use(monkeypatch: pytest.MonkeyPatch, kernels: type[Kernels]) -> None:
    import sys

    stand_in = sys.modules["kvant.runtime.launch_cpu"]
    monkeypatch.setattr(stand_in, "Kernels", lambda plans, own, keys, files: kernels(plans, own))


@pytest.mark.parametrize("kernels", [Kernels, Right])
def test_right_kernels_pass(
    made: Made, monkeypatch: pytest.MonkeyPatch, kernels: type[Kernels]
) -> None:
    use(monkeypatch, kernels)
    result = verify.verify(made.folder)
    assert (result["id"], result["target"]) == (made.id, "cpu-test")
    assert (result["layers_checked"], result["plans"], result["cases"]) == ([0, 1, 2], 2, 48)
    assert result["files"] == 11
    assert result["stored_share"] == 0.0
    assert 0.0 < result["computed_share"] < 0.7
    assert (result["computed_share"] > 0.1) == (kernels is Right)


@pytest.mark.parametrize("kernels", WRONG, ids=lambda kernels: kernels.__name__)
def test_wrong_kernels_are_found(
    made: Made, monkeypatch: pytest.MonkeyPatch, kernels: type[Kernels]
) -> None:
    use(monkeypatch, kernels)
    with pytest.raises(KvantError) as caught:
        verify.verify(made.folder)
    assert caught.value.code == "kernel-disagrees"


@pytest.mark.parametrize("kernels", [WrongScale, WrongOutput, OneIntegerOff, Kernels])
def test_integer_plans_have_no_other_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernels: type[Kernels]
) -> None:
    """Codes of q are 8 and 16 bits here; one of 16 bits more or less is a wrong kernel."""
    made = make(tmp_path / "integers.kvant", monkeypatch, plans=INTEGER_PLANS)
    use(monkeypatch, kernels)
    if kernels is Kernels:
        assert 0.0 < verify.verify(made.folder)["computed_share"] < 0.1
        return
    with pytest.raises(KvantError) as caught:
        verify.verify(made.folder)
    assert caught.value.code == "kernel-disagrees"
    assert "stored values by 0 times" in caught.value.what


class ForgetsInRings(ForgetsOneGroup):
    """Right until pages were given back."""

    def encode(self, layer: int, stream: Stream, begin: Any, end: Any) -> None:
        kind = ForgetsOneGroup if stream.held.max() > stream.sinks else Kernels
        kind.encode(self, layer, stream, begin, end)


@pytest.mark.parametrize("kernels", [Kernels, ForgetsInRings])
def test_rings_are_filled_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernels: type[Kernels]
) -> None:
    rings = tuple(replace(one, window=30) for one in PLANS)
    made = make(tmp_path / "rings.kvant", monkeypatch, plans=rings)
    use(monkeypatch, kernels)
    if kernels is Kernels:
        result = verify.verify(made.folder)
        assert (result["stored_share"], result["cases"]) == (0.0, 57)
        return
    with pytest.raises(KvantError) as caught:
        verify.verify(made.folder)
    assert caught.value.code == "kernel-disagrees"


def test_text(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, NotANumber)
    with pytest.raises(KvantError) as caught:
        verify.verify(made.folder)
    assert str(caught.value) == (
        "the kernels of cpu-test differ from the reference in layer 0 after 5 tokens: "
        "stored values by 0 times what is allowed, outputs by inf times\n"
        f"  where: {made.folder}/targets/cpu-test/p0\n"
        "  fix: do not use this artifact on this machine; compile again, and report the lines above"
        "  [kernel-disagrees]"
    )


def test_pin_and_target_are_passed_on(made: Made) -> None:
    with pytest.raises(KvantError) as caught:
        verify.verify(made.folder, id="0" * 64)
    assert caught.value.code == "id-mismatch"
    assert verify.verify(made.folder, "reference", made.id)["target"] == "reference"
