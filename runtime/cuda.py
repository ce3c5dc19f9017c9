"""Starts binaries of the target cuda through the driver; no compiler is needed.

cuda-core loads them. They are launched by cuda-bindings: a kernel's arguments lie in one block of
memory, so that a launch converts nothing but what has changed.
"""

import ctypes
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..ir.errors import KvantError
from .launcher import Grid

# Dynamic shared memory of a block that needs no leave.
_SHARED_WITHOUT_ASKING = 48 * 1024
# Every kernel that Triton compiles takes two more pointers: memory for scratch and for profiling.
# These kernels use neither; the compiler refuses those that do.
_HIDDEN = (0, 0)


class CudaLauncher:
    """Kernels of all plans, loaded to one device.

    Args:
        launches: by key, what launch.json says.
        files: verified bytes, "<key>/<kernel>.cubin".
        device: as torch calls it, "cuda:0".
    """

    def __init__(
        self,
        launches: Mapping[str, Mapping[str, Any]],
        files: Mapping[str, bytes],
        device: str,
    ) -> None:
        import torch
        from cuda.bindings import driver
        from cuda.core import Device, ObjectCode

        self._cuda, self._launch = torch.cuda, driver.cuLaunchKernel
        self._raw_stream = _raw_stream(torch)
        self._index = int(device.partition(":")[2])
        self._device = Device(self._index)
        self._device.set_current()
        self._kernels: dict[tuple[str, str], tuple[Any, int, int]] = {}
        for key, facts in launches.items():
            for name, binary in facts["binaries"].items():
                module = ObjectCode.from_cubin(files[f"{key}/{binary['file']}"])
                kernel, shared = module.get_kernel(binary["entry"]), int(binary["shared"])
                if shared > _SHARED_WITHOUT_ASKING:
                    self._allow(driver, kernel, name, shared)
                # A kernel of a library stands for the function of any context.
                function = driver.CUfunction(int(kernel.handle))
                self._kernels[key, name] = function, shared, int(binary["threads"])

    def _allow(self, driver: Any, kernel: Any, name: str, shared: int) -> None:
        """Ask for more dynamic shared memory; cuda-core can only read that attribute.

        Raises: KvantError "shared-memory" if the device does not have as much.
        """
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        (error,) = driver.cuKernelSetAttribute(attribute, shared, kernel.handle, self._index)
        if error != driver.CUresult.CUDA_SUCCESS:
            raise KvantError(
                "shared-memory",
                f"kernel {name} needs {shared} bytes of shared memory; the driver answers "
                f"{error.name}",
                where=f"device cuda:{self._index}",
                fix="compile the artifact for this kind of GPU, or load another target",
            )

    def launch(self, key: str, kernel: str, grid: Grid, arguments: Sequence[Any]) -> None:
        """Start a kernel of plan `key` on torch's current stream; see `launcher.Launcher`."""
        self.prepare(key, kernel, arguments).start(grid, self.stream())

    def prepare(
        self, key: str, kernel: str, arguments: Sequence[Any], changing: Sequence[int] = ()
    ) -> "PreparedLaunch":
        """Return a kernel with its arguments; see `launcher.Launcher`."""
        function, shared, threads = self._kernels[key, kernel]
        return PreparedLaunch(self, kernel, (function, shared, threads), arguments, changing)

    def stream(self) -> int:
        """Return torch's current stream; see `launcher.Launcher`."""
        return int(self._raw_stream(self._index))

    def is_capturing(self) -> bool:
        """Return whether that stream is being captured; see `launcher.Launcher`."""
        return bool(self._cuda.is_current_stream_capturing())

    def start(self, name: str, given: tuple[Any, ...]) -> None:
        """Ask the driver to launch, on this launcher's device.

        Args:
            name: of the kernel.
            given: what cuLaunchKernel takes.

        Raises: KvantError "launch-failed".
        """
        if self._cuda.current_device() == self._index:
            (error,) = self._launch(*given)
        else:
            with self._cuda.device(self._index):
                (error,) = self._launch(*given)
        if error:
            raise KvantError(
                "launch-failed",
                f"the driver does not start kernel {name}: {error.name}",
                where=f"device cuda:{self._index}",
                fix="an earlier kernel may have failed: run with CUDA_LAUNCH_BLOCKING=1; "
                "`python -m kvant.runtime verify` checks each kernel",
            )


class PreparedLaunch:
    """A kernel and one block of memory with its arguments, 8 bytes each: pointers and int64.

    Args:
        launcher: starts it.
        name: of the kernel.
        binary: function as the driver knows it, bytes of shared memory, threads of a block.
        arguments: tensors, which are kept alive, numbers, and cells.
        changing: places of those that are given anew at each start.
    """

    __slots__ = ("_changing", "_fixed", "_function", "_kept", "_name", "_start", "_words")

    def __init__(
        self,
        launcher: CudaLauncher,
        name: str,
        binary: tuple[Any, int, int],
        arguments: Sequence[Any],
        changing: Sequence[int],
    ) -> None:
        self._start, self._name, self._changing = launcher.start, name, tuple(changing)
        self._function, shared, threads = binary
        words = [_word(x) for x in arguments] + [*_HIDDEN]
        self._words = (ctypes.c_int64 * len(words))(*words)
        begin = ctypes.addressof(self._words)
        # The driver reads each argument where this list of addresses says, while it launches.
        places = (ctypes.c_void_p * len(words))(*(begin + 8 * i for i in range(len(words))))
        for place, x in enumerate(arguments):
            if isinstance(x, ctypes.c_int64):
                places[place] = ctypes.addressof(x)
        self._fixed = threads, 1, 1, shared
        self._kept = places, ctypes.addressof(places), tuple(arguments)

    def start(self, grid: Grid, stream: int, *changing: Any) -> None:
        """Start the kernel; see `launch_gpu.Prepared`. What is given must live until it has run."""
        words = self._words
        for place, value in zip(self._changing, changing, strict=True):
            words[place] = value.data_ptr()
        self._start(self._name, (self._function, *grid, *self._fixed, stream, self._kept[1], 0))


def _word(argument: Any) -> int:
    """Return an argument as eight bytes: a pointer or an int64."""
    if isinstance(argument, ctypes.c_int64):
        return argument.value
    return argument if isinstance(argument, int) else int(argument.data_ptr())


def _raw_stream(torch: Any) -> Callable[[int], int]:
    """Return what gives torch's current stream of a device, as the driver calls it."""
    # What torch's own compiler calls before each launch; a Stream object takes ten times as long.
    found = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return found or (lambda index: torch.cuda.current_stream(index).cuda_stream)


def read_launches(keys: Sequence[str], files: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
    """Return what launch.json says, by key of plan.

    Raises: KvantError "kernels-missing" if an earlier version wrote it.
    """
    launches = {key: json.loads(files[f"{key}/launch.json"]) for key in dict.fromkeys(keys)}
    for key, launch in launches.items():
        if not {"layouts", "least_tiles"} <= launch.keys():
            raise KvantError(
                "kernels-missing",
                "launch.json lacks layouts or least_tiles: an earlier version of kvant wrote it",
                where=f"plan {key}",
                fix="compile the artifact again",
            )
    return launches
