"""The debug variables, all in one table. None of them changes what is computed."""

import os
from dataclasses import dataclass
from pathlib import Path

from ..ir.errors import KvantError


@dataclass(frozen=True, slots=True)
class Variable:
    """An environment variable: its default and what it does."""

    name: str
    default: str
    does: str

    def get(self) -> str:
        """Return the value set in the environment, or the default."""
        return os.environ.get(self.name, self.default)


DUMP_IR = Variable(
    "KVANT_DUMP_IR", "", "folder for the graph after every pass: 00-input.kir, 01-<pass>.kir, ..."
)
DUMP_KERNELS = Variable(
    "KVANT_DUMP_KERNELS", "", "folder for what each stage of a target makes: <target>/<plan>/..."
)
TRACE = Variable("KVANT_TRACE", "0", "1 prints the seconds of every pass and stage to stderr")
NUM_THREADS = Variable(
    "KVANT_NUM_THREADS", "", "threads of CPU kernels; the cores this process may use if empty"
)

VARIABLES = (DUMP_IR, DUMP_KERNELS, TRACE, NUM_THREADS)


def write_dump(path: Path, data: bytes) -> None:
    """Write one file of a dump; its folders are made.

    Raises: KvantError ("dump-not-written").
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise KvantError(
            "dump-not-written",
            f"the system refused to write a dump: {error.strerror}",
            where=str(path),
            fix="give a folder that can be written, or unset the variable",
        ) from None
