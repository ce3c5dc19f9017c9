"""The README's Python runs as it stands in an empty folder; the demo keeps its promises."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.model

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
DEMO_SECONDS = 300


def run(folder: Path, *command: str) -> str:
    env = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # as in a user's shell
        env.pop(name, None)
    done = subprocess.run(
        (sys.executable, *command), cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_there_are_two_blocks() -> None:
    assert len(BLOCKS) == 2


@pytest.mark.long
def test_the_model_is_compiled_attached_and_generates(tmp_path: Path) -> None:
    words = run(tmp_path, "-c", BLOCKS[0])
    found = re.search(r"(\d+) bytes a token; bf16 takes (\d+)", words)
    assert found, words
    assert 2 * int(found[1]) < int(found[2])
    assert (tmp_path / "smol.kvant" / "manifest.json").exists()


def test_kernels_run_without_a_model(tmp_path: Path) -> None:
    shape = run(tmp_path, "-c", BLOCKS[1] + "\nprint(y.shape, abs(y).max() > 0)")
    assert shape.split("\n")[-2] == "(1, 32, 1, 128) True"


@pytest.mark.long
def test_the_demo_prints_its_table_and_a_report_in_time(tmp_path: Path) -> None:
    begin = time.perf_counter()
    printed = run(tmp_path, "-m", "kvant.compiler.demo")
    assert time.perf_counter() - begin < DEMO_SECONDS
    for row in (
        "bits per element",
        "cache bytes per token",
        "tokens per GB",
        "perplexity",
        "KL(unquantized || quantized)",
        "noise floor",
        "tokens per second",
    ):
        assert row in printed, row
    report = tmp_path / re.search(r"report: (\S+)", printed)[1]
    page = report.read_text()
    assert page.count("<svg") >= 2
    assert not re.search(r"""(src|href)=["']https?:""", page), "not one file"
