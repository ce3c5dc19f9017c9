"""What the tests of `compile` share: a shape, and recipes for it."""

from collections.abc import Callable
from typing import Any

import pytest

from kvant.compiler import recipe as recipes
from kvant.compiler.shape import Shape
from kvant.ir.errors import KvantError

SHAPE = Shape(8, 2, 64, layers=3)
INT4 = {"format": "int", "bits": 4, "axis": "token", "group": "head"}
MINE = {"name": "mine", "k": INT4, "v": INT4}


def mine(**changes: Any) -> recipes.Recipe:
    return recipes.parse(MINE | changes, "mine.toml")


def refusal(run: Callable[[], object]) -> str:
    with pytest.raises(KvantError) as caught:
        run()
    return str(caught.value)
