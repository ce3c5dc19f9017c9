"""Starting binaries through the driver: what cuda-core is asked, and that it can be asked that."""

import ctypes
import inspect
import sys
from contextlib import nullcontext
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
            "append_k": {
                "file": "append_k.cubin",
                "entry": "append_0",
                "shared": 512,
                "threads": 128,
            },
        },
    }
}
FILES = {"p0/attend.cubin": b"one", "p0/append_k.cubin": b"two"}


class Driver:
    """A stand-in for cuda.core and cuda.bindings.driver that keeps what it is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answer: str = "CUDA_SUCCESS") -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.answer = SimpleNamespace(name=answer)
        core, bindings, root = (ModuleType(n) for n in ("cuda.core", "cuda.bindings", "cuda"))
        core.LEGACY_DEFAULT_STREAM = "legacy"  # type: ignore[attr-defined]
        core.Device = lambda index: SimpleNamespace(  # type: ignore[attr-defined]
            set_current=lambda: self.asked.append(("current", index))
        )
        core.LaunchConfig = lambda **given: given  # type: ignore[attr-defined]
        core.ObjectCode = SimpleNamespace(from_cubin=self.module)  # type: ignore[attr-defined]
        core.Stream = SimpleNamespace(  # type: ignore[attr-defined]
            from_handle=lambda handle: ("stream", handle)
        )
        core.launch = lambda *given: self.asked.append(("launch", *given))  # type: ignore[attr-defined]
        bindings.driver = SimpleNamespace(  # type: ignore[attr-defined]
            CUfunction_attribute=SimpleNamespace(
                CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="dynamic"
            ),
            CUresult=SimpleNamespace(CUDA_SUCCESS=self.answer if answer == "CUDA_SUCCESS" else 0),
            cuKernelSetAttribute=self.set_attribute,
        )
        for name, module in (("cuda", root), ("cuda.core", core), ("cuda.bindings", bindings)):
            monkeypatch.setitem(sys.modules, name, module)
        self.handle = 0
        monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
        monkeypatch.setattr(
            torch.cuda, "current_stream", lambda index: SimpleNamespace(cuda_stream=self.handle)
        )

    def module(self, cubin: bytes) -> Any:
        return SimpleNamespace(
            get_kernel=lambda entry: SimpleNamespace(handle=(cubin, entry), entry=entry)
        )

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
        ("attribute", "dynamic", 57_344, (b"one", "attend_0"), 1),
    ]


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
    for driver.handle in (0, 77):
        driver.asked.clear()
        launcher.launch("p0", "attend", (4, 2, 1), [x, 5])
        ((_, stream, config, kernel, *arguments),) = driver.asked
        assert stream == ("legacy" if driver.handle == 0 else ("stream", 77))
        assert config == {"grid": (4, 2, 1), "block": 128, "shmem_size": 57_344}
        assert kernel.entry == "attend_0"
        assert arguments == [x.data_ptr(), 5, 0, 0]


def test_cuda_core_can_be_asked_that() -> None:
    """The names and signatures of the real packages, which need no GPU to be imported."""
    from cuda.bindings import driver
    from cuda.core import LEGACY_DEFAULT_STREAM, Device, Kernel, LaunchConfig, ObjectCode, Stream
    from cuda.core import launch as start
    from cuda.core._kernel_arg_handler import ParamHolder

    assert all((LEGACY_DEFAULT_STREAM, Device.set_current, Stream.from_handle, Kernel.handle))
    assert driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES == 8
    assert "cuKernelSetAttribute(attrib: CUfunction_attribute, int val, kernel, dev)" in str(
        driver.cuKernelSetAttribute.__doc__
    )
    assert ObjectCode.from_cubin(b"\x7fELF").get_kernel
    config = LaunchConfig(grid=(4, 2, 1), block=128, shmem_size=57_344)
    assert (config.grid, config.block, config.shmem_size) == ((4, 2, 1), (128, 1, 1), 57_344)
    assert list(inspect.signature(start).parameters) == [
        "stream",
        "config",
        "kernel",
        "kernel_args",
    ]
    given = [1 << 40, -5, 0]
    holder = ParamHolder(given)  # a Python int is handed over as eight bytes
    places = (ctypes.c_void_p * len(given)).from_address(holder.ptr)
    assert [ctypes.c_int64.from_address(int(p or 0)).value for p in places] == given
