"""What starts kernels on a device: the driver, or in tests Triton's interpreter."""

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

from ..ir.errors import KvantError

Tensor: TypeAlias = Any
Grid: TypeAlias = tuple[int, int, int]


class Prepared(Protocol):
    """A kernel with its arguments, for launches that come at every token."""

    def start(self, grid: Grid, stream: int, *changing: Tensor) -> None:
        """Start the kernel on a stream: what `Launcher.stream` returned.

        `changing`: tensors in the places that `prepare` was told of; their bytes are read as the
        type that was there.
        """


class Launcher(Protocol):
    """Starts kernels."""

    def launch(self, key: str, kernel: str, grid: Grid, arguments: Sequence[Any]) -> None:
        """Start a kernel of plan `key` on torch's current stream; numbers are int64."""

    def prepare(
        self, key: str, kernel: str, arguments: Sequence[Any], changing: Sequence[int]
    ) -> Prepared:
        """Return a kernel with arguments, which it keeps alive.

        Args:
            key: of the plan.
            kernel: its name.
            arguments: tensors; numbers; and cells (ctypes.c_int64), numbers that are read when the
                kernel starts.
            changing: places of tensors that are given anew at each start; an empty one of the type
                stands there.
        """

    def stream(self) -> int:
        """Return torch's current stream, as the driver calls it."""

    def is_capturing(self) -> bool:
        """Return whether that stream is being captured into a graph."""


def refuse_capture(launcher: Launcher, what: str) -> None:
    """Refuse what a graph would replay with the numbers of now.

    Raises: KvantError "graph-capture".
    """
    if launcher.is_capturing():
        raise KvantError(
            "graph-capture",
            f"{what} while a CUDA graph is captured; a replay would use the counts of now again",
            where="cache",
            fix="use cache.decode_steps: plan() before the capture and before each replay, append "
            "and attend inside the capture",
        )
