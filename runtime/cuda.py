"""Starts binaries of the target cuda through the driver, by cuda-core; no compiler is needed."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..ir.errors import KvantError
from .launch_gpu import Grid

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
        from cuda.core import LEGACY_DEFAULT_STREAM, Device, LaunchConfig, ObjectCode, Stream
        from cuda.core import launch as start

        self._cuda, self._start, self._config = torch.cuda, start, LaunchConfig
        self._stream, self._streams = Stream, {0: LEGACY_DEFAULT_STREAM}
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
                self._kernels[key, name] = kernel, shared, int(binary["threads"])

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
        """Start a kernel of plan `key` on torch's current stream; see `launch_gpu.Launcher`."""
        loaded, shared, threads = self._kernels[key, kernel]
        config = self._config(grid=grid, block=threads, shmem_size=shared)
        # Pointers and int64 are both eight bytes, as which a Python int is handed over.
        given = [x if isinstance(x, int) else x.data_ptr() for x in arguments]
        with self._cuda.device(self._index):
            handle = self._cuda.current_stream(self._index).cuda_stream
            if handle not in self._streams:
                self._streams[handle] = self._stream.from_handle(handle)
            self._start(self._streams[handle], config, loaded, *given, *_HIDDEN)


def read_launches(keys: Sequence[str], files: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
    """Return what launch.json says, by key of plan.

    Raises: KvantError "kernels-missing" if an earlier version wrote it.
    """
    launches = {key: json.loads(files[f"{key}/launch.json"]) for key in dict.fromkeys(keys)}
    for key, launch in launches.items():
        if not {"layouts", "rest_tokens"} <= launch.keys():
            raise KvantError(
                "kernels-missing",
                "launch.json lacks layouts or rest_tokens: an earlier version of kvant wrote it",
                where=f"plan {key}",
                fix="compile the artifact again",
            )
    return launches
