"""Kernels that are interrupted at one of their calls, as by Ctrl-C."""

from dataclasses import dataclass
from typing import Any

from kvant.runtime.stream import Kernels


@dataclass
class Countdown:
    """Calls of append and encode until the one that is interrupted; never at or below zero."""

    left: int = -1


def interrupting(kernels: Kernels) -> Countdown:
    """Interrupt a call of append or encode after its work is done; the countdown says which."""
    countdown = Countdown()

    def counted(call: Any) -> Any:
        def run(*arguments: Any) -> None:
            call(*arguments)
            countdown.left -= 1
            if countdown.left == 0:
                raise KeyboardInterrupt

        return run

    target: Any = kernels
    target.append, target.encode = counted(kernels.append), counted(kernels.encode)
    return countdown
