"""The runtime with its own dependencies alone: a second environment loads, verifies, attends."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import kvant

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(".*", "build", "demo", "*.egg-info", "*.kvant", "__pycache__")
ATTEND = """
import sys, numpy
from kvant.runtime import load
art = load(sys.argv[1], target="cpu")
data = numpy.load(sys.argv[2])
cache = art.new_cache(batch=1, max_tokens=512)
cache.append(0, data["k"], data["v"])
cache.flush()
numpy.save(sys.argv[3], cache.attend(0, data["q"]))
heavy = ("torch", "transformers", "tvm", "triton", "scipy", "typer", "pydantic")
print([name for name in heavy if name in sys.modules])
"""


def run(*command: str | Path) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with kvant[cpu] installed from a copy of this tree, and no compiler."""
    folder = tmp_path_factory.mktemp("bare")
    shutil.copytree(ROOT, folder / "source", ignore=LEFT_OUT)
    run(sys.executable, "-m", "venv", folder / "venv")
    python = folder / "venv" / "bin" / "python"
    pip = (python, "-m", "pip", "install", "-q", "--disable-pip-version-check")
    run(*pip, "-c", ROOT / "constraints.txt", f"{folder / 'source'}[cpu]")
    return python


def test_second_environment_loads_verifies_and_attends(bare_python: Path, tmp_path: Path) -> None:
    artifact = tmp_path / "shape.kvant"
    shape = kvant.Shape(heads=4, kv_heads=2, head_dim=64, dtype="f32")
    art = kvant.compile(shape, "int4-token", ["cpu"], out=artifact)
    rng = np.random.default_rng(7)
    arrays = {
        "q": rng.standard_normal((1, 4, 1, 64), dtype=np.float32),
        "k": rng.standard_normal((1, 2, 333, 64), dtype=np.float32),
        "v": rng.standard_normal((1, 2, 333, 64), dtype=np.float32),
    }
    np.savez(tmp_path / "data.npz", **arrays)
    installed = run(bare_python, "-m", "pip", "list", "--disable-pip-version-check")
    assert not {"torch", "transformers", "apache-tvm"} & set(installed.split())

    verified = json.loads(run(bare_python, "-m", "kvant.runtime", "verify", artifact, "--json"))
    assert verified["target"].startswith("cpu")
    loaded = run(bare_python, "-c", ATTEND, artifact, tmp_path / "data.npz", tmp_path / "there.npy")
    assert loaded.strip() == "[]"

    cache = art.new_cache(batch=1, max_tokens=512)
    cache.append(0, arrays["k"], arrays["v"])
    cache.flush()
    here = cache.attend(0, arrays["q"])
    np.testing.assert_array_equal(np.load(tmp_path / "there.npy"), here)
