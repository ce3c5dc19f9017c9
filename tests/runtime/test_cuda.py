"""Starting binaries through the driver: what cuda-core is asked, and that it can be asked that."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from kvant.ir.errors import KvantError
from kvant.runtime.cuda import CudaLauncher

LAUNCHES = {
    "p0": {
        "binaries": {
            "attend": {
                "file": "attend.cubin",
                "entry": "attend_0",
                "shared": 57_344,
                "threads": 128,
            },
            "append": {
                "file": "append.cubin",
                "entry": "append_0",
                "shared": 512,
                "threads": 128,
            },
        },
    }
}
FILES = {"p0/attend.cubin": b"one", "p0/append.cubin": b"two"}


class Driver:
    """A stand-in for cuda.core and cuda.bindings.driver that keeps what it is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answer: str = "CUDA_SUCCESS") -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.answer = SimpleNamespace(name=answer)
        core, bindings, root = (ModuleType(n) for n in ("cuda.core", "cuda.bindings", "cuda"))
        core.Device = lambda index: SimpleNamespace(  # type: ignore[attr-defined]
            set_current=lambda: self.asked.append(("current", index))
        )
        core.ObjectCode = SimpleNamespace(from_cubin=self.module)  # type: ignore[attr-defined]
        bindings.driver = SimpleNamespace(  # type: ignore[attr-defined]
            CUfunction_attribute=SimpleNamespace(
                CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="dynamic"
            ),
            CUresult=SimpleNamespace(CUDA_SUCCESS=self.answer if answer == "CUDA_SUCCESS" else 0),
            cuKernelSetAttribute=self.set_attribute,
            cuLaunchKernel=self.launch,
            CUfunction=lambda handle: ("function", handle),
        )
        for name, module in (("cuda", root), ("cuda.core", core), ("cuda.bindings", bindings)):
            monkeypatch.setitem(sys.modules, name, module)
        self.handle, self.device, self.entries = 0, 0, [b""]
        monkeypatch.setattr(torch.cuda, "device", self.switched)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.device)
        monkeypatch.setattr(
            torch.cuda, "current_stream", lambda index: SimpleNamespace(cuda_stream=self.handle)
        )

    @contextmanager
    def switched(self, index: int) -> Iterator[None]:
        before, self.device = self.device, index
        yield
        self.device = before

    def launch(self, *given: Any) -> tuple[Any]:
        """Reads the arguments where the driver would."""
        *what, stream, places, extra = given
        addresses = (ctypes.c_void_p * self.arguments).from_address(places)
        numbers = [ctypes.c_int64.from_address(int(place or 0)).value for place in addresses]
        self.asked.append(("launch", *what, stream, numbers, extra, self.device))
        return (0 if self.answer.name == "CUDA_SUCCESS" else self.answer,)

    arguments = 0  # of the kernel

    def module(self, cubin: bytes) -> Any:
        """A kernel's handle is its number."""
        self.entries.append(cubin)
        number = len(self.entries) - 1
        return SimpleNamespace(get_kernel=lambda entry: SimpleNamespace(handle=number))

    def set_attribute(self, *given: Any) -> tuple[Any]:
        self.asked.append(("attribute", *given))
        return (self.answer,)


def test_shared_memory_is_asked_for_where_a_block_needs_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = Driver(monkeypatch)
    CudaLauncher(LAUNCHES, FILES, "cuda:1")
    assert driver.asked == [
        ("current", 1),
        ("attribute", "dynamic", 57_344, 1, 1),
    ]
    assert driver.entries == [b"", b"one", b"two"]


def test_what_the_device_does_not_have_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    Driver(monkeypatch, "CUDA_ERROR_INVALID_VALUE")
    with pytest.raises(KvantError) as caught:
        CudaLauncher(LAUNCHES, FILES, "cuda:0")
    assert str(caught.value) == (
        "kernel attend needs 57344 bytes of shared memory; the driver answers "
        "CUDA_ERROR_INVALID_VALUE\n"
        "  where: device cuda:0\n"
        "  fix: compile the artifact for this kind of GPU, or load another target  [shared-memory]"
    )


def test_a_kernel_starts_on_the_current_stream_with_two_pointers_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = Driver(monkeypatch)
    launcher = CudaLauncher(LAUNCHES, FILES, "cuda:0")
    x = torch.zeros(3)
    driver.arguments = 4
    for driver.handle in (0, 77):
        driver.asked.clear()
        launcher.launch("p0", "attend", (4, 2, 1), [x, 5])
        block, given = (128, 1, 1), [x.data_ptr(), 5, 0, 0]
        function = "function", 1
        want = "launch", function, 4, 2, 1, *block, 57_344, driver.handle, given, 0, 0
        assert driver.asked == [want]


def test_a_prepared_launch_reads_what_is_there_when_it_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = Driver(monkeypatch)
    launcher = CudaLauncher(LAUNCHES, FILES, "cuda:1")
    x, y, cell = torch.zeros(3), torch.zeros(0), ctypes.c_int64(7)
    prepared = launcher.prepare("p0", "attend", [x, y, 5, cell], [1])
    driver.arguments = 6
    for z in (torch.zeros(2), torch.zeros(4)):
        cell.value += 1
        driver.asked.clear()
        prepared.start((4, 2, 1), 77, z)
        ((*_, stream, numbers, _, device),) = driver.asked
        assert numbers == [x.data_ptr(), z.data_ptr(), 5, cell.value, 0, 0]
        assert (stream, device) == (77, 1)  # of the launcher, not the current one
    assert driver.device == 0


def test_what_the_driver_does_not_start_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch)
    launcher = CudaLauncher(LAUNCHES, FILES, "cuda:0")
    driver.answer = SimpleNamespace(name="CUDA_ERROR_LAUNCH_FAILED")
    with pytest.raises(KvantError) as caught:
        launcher.launch("p0", "append", (1, 1, 1), [])
    assert caught.value.code == "launch-failed"
    assert caught.value.what == (
        "the driver does not start kernel append: CUDA_ERROR_LAUNCH_FAILED"
    )


def test_cuda_core_can_be_asked_that() -> None:
    """The names and signatures of the real packages, which need no GPU to be imported."""
    from cuda.bindings import driver
    from cuda.core import Device, Kernel, ObjectCode

    assert all((Device.set_current, Kernel.handle))
    assert driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES == 8
    assert "cuKernelSetAttribute(attrib: CUfunction_attribute, int val, kernel, dev)" in str(
        driver.cuKernelSetAttribute.__doc__
    )
    said = str(driver.cuLaunchKernel.__doc__)
    assert "unsigned int sharedMemBytes, hStream, kernelParams, void_ptr extra" in said
    assert "or a CUDA kernel :py:obj:`~.CUkernel`" in said
    assert int(driver.CUfunction(4096)) == 4096
    assert not driver.CUresult.CUDA_SUCCESS
    assert ObjectCode.from_cubin(b"\x7fELF").get_kernel


SCRIPT = """
import ctypes, sys
from types import SimpleNamespace
cuda = SimpleNamespace(current_device=lambda: 0)
sys.modules["torch"] = SimpleNamespace(cuda=cuda, _C=SimpleNamespace())
from kvant.runtime.cuda import CudaLauncher
binary = {"file": "attend.cubin", "entry": "attend_0", "shared": 57344, "threads": 32}
files = {"p0/attend.cubin": b"\\x7fELF"}
launcher = CudaLauncher({"p0": {"binaries": {"attend": binary}}}, files, "cuda:0")
cell, x = ctypes.c_int64(0), SimpleNamespace(data_ptr=lambda: 4096)
prepared = launcher.prepare("p0", "attend", [1 << 40, x, cell], [1])
cell.value = -8
prepared.start((4, 3, 2), 77, SimpleNamespace(data_ptr=lambda: 8192))
"""


def test_the_driver_gets_what_was_meant_by_the_real_packages(tmp_path: Path) -> None:
    """cuda-core loads, cuda-bindings launches, and a stand-in of the driver's library prints."""
    source = Path(__file__).parent / "stub_driver.c"
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    there = os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=there, capture_output=True, text=True, check=True
    )
    # grid, block, shared memory, stream; then the arguments and the two pointers of Triton
    assert done.stdout == f"4 3 2, 32 1 1, 57344, 0x4d: {1 << 40} 8192 -8 0 0\n"
