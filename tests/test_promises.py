"""docs/promises.md names tests that exist, and says rightly which of them are long."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (TESTS.parent / "docs" / "promises.md").read_text().splitlines()
    if line.startswith("|")
][2:]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_every_named_test_exists(row: list[str]) -> None:
    _, tests, _, where = row
    file = ""
    for name in re.findall(r"`([^`]+)`", tests):
        path, _, function = name.partition("::")
        file = path or file
        text = (TESTS / file).read_text()
        found = re.search(rf"((?:@.*\n)*)def {function or 'test_.*'}\(", text)
        assert found, name
        is_long = "mark.long" in found[1] or "mark.long" in "".join(
            re.findall("pytestmark.*", text)
        )
        assert is_long == (where == "long"), name
