"""IR before and after each pass, as text; `pytest tests/passes --update-golden` renews them.

A file tests/golden/<pass>/<case>.kir holds `# pass: name`, perhaps `# options: {json}` and, for
the store pass, `# k: tokens(...)` and `# v: tokens(...)`; then the graph, `----`, the expected one.
"""

import json
import re
from pathlib import Path

import pytest

from kvant.ir.text import parse, print_graph
from kvant.ir.verify import verify
from kvant.passes import PASSES

GOLDEN = Path(__file__).parents[1] / "golden"
SPLIT = "----\n"
FILES = sorted(path for name in PASSES for path in (GOLDEN / name).glob("*.kir"))


def _tokens(text: str):
    """Parse an encoding with the parser of graphs."""
    lines = (
        "kvant 1",
        "graph @options",
        "%x : f32[1, 1, 1, 64] = input {name = x}",
        f"%c : cache[k] = cache_write %x {{basis = (), role = k, store = {text}}}",
        "return %c",
    )
    return parse("\n".join(lines)).ops[1].attr("store")


def _options(head: str) -> dict[str, object]:
    found = dict(re.findall(r"^# (\w+): (.*)$", head, re.M))
    options = json.loads(found.get("options", "{}"))
    return options | {role: _tokens(found[role]) for role in ("k", "v") if role in found}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_golden(path, request):
    text = path.read_text(encoding="utf-8")
    given, _, expected = text.partition(SPLIT)
    head = "".join(line for line in given.splitlines(True) if line.startswith("#"))
    name = re.search(r"^# pass: (.*)$", head, re.M).group(1)
    assert name == path.parent.name
    before = parse(given)
    verify(before)
    after = PASSES[name].run(before, **_options(head))
    verify(after, after=name)
    if path.stem.startswith("untouched"):
        assert after is before
    if request.config.getoption("--update-golden", default=False):
        path.write_text(head + print_graph(before) + SPLIT + print_graph(after), encoding="utf-8")
        return
    assert print_graph(after) == expected
    assert print_graph(before) == given.removeprefix(head)


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_has_goldens(name):
    stems = {path.stem for path in FILES if path.parent.name == name}
    assert len(stems) >= 3, f"{name} has {sorted(stems)}: a typical, an untouched, an awkward case"
    assert any(stem.startswith("untouched") for stem in stems)
