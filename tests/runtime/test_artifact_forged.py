"""Artifacts whose digests fit but whose content does not: one error class, whatever is in them."""

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from kvant.ir.errors import KvantError
from kvant.runtime import load
from kvant.runtime.strict_json import canonical

from .artifact_maker import Made, reseal, seal_raw

ODD: tuple[Any, ...] = (
    None, True, 0, -1, 2**53, 0.5, -0.0, 1e300, "", "p0", "../x", "k", "é",
    [], [[]], {}, {"kind": "int"}, [None],
)  # fmt: skip


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (container, key) of everything inside."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
        yield value, key
        if isinstance(inner, dict | list):
            yield from places(inner)


def forged(facts: Any, rng: random.Random) -> Any:
    facts = copy.deepcopy(facts)
    container, key = rng.choice(list(places(facts)))
    match rng.randrange(3):
        case 0:
            container[key] = rng.choice(ODD)
        case 1:
            del container[key]
        case _ if isinstance(container, dict):
            container[rng.choice(["kind", "x", "size", "p9", "bits"])] = rng.choice(ODD)
        case _:
            container.append(rng.choice(ODD))
    return facts


@pytest.mark.parametrize("name", ["plan.json", "weight_edits.json", "manifest.json"])
def test_forged_content_is_refused_or_harmless(made: Made, name: str) -> None:
    path = made.folder / name
    good = json.loads(path.read_bytes())
    rng = random.Random(name)
    codes = set()
    for i in range(120):
        raw = canonical(forged(good, rng))
        if name == "manifest.json":
            seal_raw(made.folder, raw)
        else:
            path.write_bytes(raw)
            reseal(made.folder)
        for target in ("reference", "auto"):
            try:
                load(made.folder, target).show()
            except KvantError as error:
                codes.add(error.code)
            except Exception as error:
                raise AssertionError(f"case {i}: {raw.decode()}") from error
    assert codes, "nothing was refused: the test proves nothing"


def test_forged_constants_are_refused_or_harmless(made: Made) -> None:
    path = made.folder / "constants.safetensors"
    good = path.read_bytes()
    rng = random.Random(3)
    for i in range(120):
        data = bytearray(good)
        for _ in range(rng.choice((1, 1, 3))):
            data[rng.randrange(min(len(data), 700))] = rng.randrange(256)
        path.write_bytes(data[: rng.choice((len(data), len(data), rng.randrange(len(data))))])
        reseal(made.folder)
        try:
            load(made.folder, "reference")
        except KvantError:
            pass
        except Exception as error:
            raise AssertionError(f"case {i}: {bytes(data)!r}") from error
