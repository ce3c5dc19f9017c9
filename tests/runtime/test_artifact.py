"""The reader: what it gives, and that a damaged artifact never reaches native code."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvant.ir.errors import KvantError
from kvant.runtime import load
from kvant.runtime.artifact import read_contents

from .artifact_maker import PLANS, SO, Made, reseal, write

WATCHED = ("ctypes.dlopen", "socket.", "pickle.", "subprocess.", "exec", "marshal.load")
SEEN: list[str] = []
IS_WATCHING = [False]


def hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not IS_WATCHING[0]:
        return
    if event == "import" and "launch_cpu" in str(arguments[0]):
        SEEN.append(f"import {arguments[0]}")
    elif event.startswith(WATCHED):
        SEEN.append(event)


sys.addaudithook(hook)


def watched_load(path: Path) -> tuple[KvantError | None, list[str]]:
    """Load for the CPU; return the refusal and what an audit hook saw on the way."""
    SEEN.clear()
    IS_WATCHING[0] = True
    try:
        load(path, target="cpu")
        return None, list(SEEN)
    except KvantError as error:
        return error, list(SEEN)
    finally:
        IS_WATCHING[0] = False


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture(autouse=True)
def warm_imports() -> None:
    """Import what the reader imports lazily, so that the hook sees the loads alone."""
    import safetensors.numpy  # noqa: F401

    import kvant.runtime.launch_reference  # noqa: F401


def test_artifact_gives_what_was_written(made: Made) -> None:
    art = load(made.folder)
    assert (art.id, art.target, art.layer_count) == (made.id, "cpu-test", 3)
    assert art.plans == (PLANS[0], PLANS[1], PLANS[0])
    assert [entry.plan for entry in art.layers] == ["p0", "p1", "p0"]
    assert art.layers[2].prefix == "model.layers.2.self_attn."
    assert sorted(art.constants[1]) == ["kvant.k_order", "kvant.k_smooth", "sinks"]
    assert art.tensors["layers.1.kvant.k_order"] is art.constants[1]["kvant.k_order"]
    assert art.weight_edits[1]["ops"][0]["op"] == "hadamard_rows"
    assert made.loaded[:2] == ["p0/kernels.py", "p0/kernels.so"]
    with pytest.raises(ValueError):
        art.tensors["layers.1.kvant.k_order"][0, 0] = 1
    assert (made.folder / "ID").read_text() == f"{made.id}\n"


def test_show(made: Made) -> None:
    facts = load(made.folder, "reference").show()
    assert made.loaded == []
    assert facts["id"] == made.id
    assert (facts["recipe"], facts["targets"], facts["layers"]) == ("kivi-4bit", ["cpu-test"], 3)
    assert facts["kernels"][0] == {"name": "cpu-test/p0/append", "does": "stores tokens"}
    plan = PLANS[0]
    size = 2 * (plan.k.bytes(4096) + plan.v.bytes(4096))
    size += PLANS[1].k.bytes(4096) + PLANS[1].v.bytes(4096)
    assert facts["cache_bytes_per_token"] == size / 4096
    assert facts["bits_per_element"] == size * 8 / 4096 / (3 * 2 * 2 * 16)
    assert load(made.folder, "reference").full_bytes_per_token() == 3 * 2 * 2 * 16 * 2


def test_new_cache_of_the_reference_holds_tokens(made: Made) -> None:
    cache = load(made.folder, "reference").new_cache(batch=2, max_tokens=64, start=[0, 1])
    x = np.ones((2, 2, 5, 16), np.float32)
    for layer in range(3):
        cache.append(layer, x, x)
    assert cache.length == 5
    assert cache.lengths.tolist() == [5, 4]


def test_same_inputs_give_the_same_bytes(made: Made, tmp_path: Path) -> None:
    assert write(tmp_path / "again.kvant") == made.id
    for path in files_of(made.folder):
        twin = tmp_path / "again.kvant" / path.relative_to(made.folder)
        assert path.read_bytes() == twin.read_bytes(), path


def test_another_input_gives_another_id(made: Made, tmp_path: Path) -> None:
    other = write(tmp_path / "other.kvant", recipe_toml='name = "kivi-4bit" \n')
    assert other != made.id


def test_same_id_in_another_process(made: Made, tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[1]); from artifact_maker import write;"
        "print(write(pathlib.Path(sys.argv[2])))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "LC_ALL": "C", "HOSTNAME": "elsewhere"}
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path / "b.kvant")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/")
    assert done.stdout.strip() == made.id, done.stderr


def test_nothing_of_the_machine_is_written(made: Made, tmp_path: Path) -> None:
    host = f'"{os.uname().nodename}"'
    names = [str(tmp_path), host, str(Path.cwd()), str(Path.home())]
    for path in files_of(made.folder):
        data = path.read_bytes()
        for name in names:
            assert name.encode() not in data, (path, name)


def test_a_location_loses_its_folder_only() -> None:
    from kvant.compiler.artifact_writer import _without_folder

    assert _without_folder("/a/b/model.py:7: x = a / b") == "model.py:7: x = a / b"
    assert _without_folder("llama/model.py:7: x") == "llama/model.py:7: x"
    assert _without_folder(None) is None


def test_positive_control_the_hook_sees_native_loading(made: Made) -> None:
    error, seen = watched_load(made.folder)
    assert error is None
    assert "ctypes.dlopen" in seen


def test_200_bit_flips_are_refused_before_native_code(made: Made) -> None:
    rng = random.Random(20)
    paths = files_of(made.folder)
    for i in range(200):
        path = paths[i % len(paths)]
        data = bytearray(path.read_bytes())
        bit = rng.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        before = path.read_bytes()
        path.write_bytes(data)
        error, seen = watched_load(made.folder)
        assert error is not None, (path, bit)
        assert (seen, made.loaded) == ([], []), (path, bit)
        path.write_bytes(before)
    assert load(made.folder).id == made.id


def test_50_truncations_are_refused_before_native_code(made: Made) -> None:
    rng = random.Random(21)
    paths = files_of(made.folder)
    for i in range(50):
        path = paths[i % len(paths)]
        before = path.read_bytes()
        path.write_bytes(before[: rng.randrange(len(before))])
        error, seen = watched_load(made.folder)
        assert error is not None, path
        assert (seen, made.loaded) == ([], []), path
        path.write_bytes(before)
    assert load(made.folder).id == made.id


def test_every_truncation_of_the_manifest_is_refused(made: Made) -> None:
    path = made.folder / "manifest.json"
    raw = path.read_bytes()
    codes = set()
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        with pytest.raises(KvantError) as refusal:
            read_contents(made.folder)
        codes.add(refusal.value.code)
    assert codes == {"manifest-truncated"}


def test_swapped_files_are_refused(made: Made) -> None:
    one, two = (made.folder / f"targets/cpu-test/p{i}/kernels.so" for i in range(2))
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)
    error, seen = watched_load(made.folder)
    assert error is not None
    assert (error.code, seen) == ("file-digest", [])


def test_files_of_two_artifacts_do_not_mix(made: Made, tmp_path: Path) -> None:
    other = tmp_path / "other.kvant"
    write(other, recipe_toml="# same length!!\n"[:1] + 'name = "kivi-4bit"\n')
    shutil.copy(other / "manifest.json", made.folder / "manifest.json")
    error, seen = watched_load(made.folder)
    assert error is not None
    assert (error.code, seen) == ("manifest-damaged", [])
    shutil.copy(other / "ID", made.folder / "ID")
    error, seen = watched_load(made.folder)
    assert error is not None
    assert (error.code, seen) == ("file-size", [])


def test_verified_bytes_are_what_is_used(made: Made) -> None:
    contents = read_contents(made.folder)
    path = made.folder / SO
    before = path.read_bytes()
    path.write_bytes(b"changed after the check")
    assert contents.files[SO] == before


def test_bad_constants_are_refused_before_native_code(made: Made, tmp_path: Path) -> None:
    path = made.folder / "constants.safetensors"
    path.write_bytes(path.read_bytes()[:-8] + np.float64("nan").tobytes())
    reseal(made.folder)
    error, seen = watched_load(made.folder)
    assert error is not None
    assert (error.code, seen, made.loaded) == ("constants-wrong", [], [])


@pytest.mark.parametrize("pin", [lambda i: i, str.upper, lambda i: f"{i}\n"])
def test_pinned_id_is_accepted(made: Made, pin: Any) -> None:
    assert load(made.folder, "reference", id=pin(made.id)).id == made.id


def test_readable_after_moving(made: Made, tmp_path: Path) -> None:
    there = tmp_path / "a folder" / "naïve 🙂 name\n.kvant"
    there.parent.mkdir()
    made.folder.rename(there)
    assert load(there).id == made.id


def test_legitimate_layouts_are_accepted(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    current = tmp_path / "current"
    current.symlink_to(made.folder, target_is_directory=True)
    parent = tmp_path / "link to the parent"
    parent.symlink_to(tmp_path, target_is_directory=True)
    report = made.folder / "report"
    report.mkdir()
    (report / "index.html").write_text("for people")
    (report / "latest").symlink_to("/dev/zero")
    for path in files_of(made.folder):
        if path.parent != report:
            path.chmod(0o444)
    made.folder.chmod(0o777)
    monkeypatch.chdir(tmp_path)
    copy = shutil.copytree(made.folder, tmp_path / "copy", symlinks=True)
    for path in (
        current,
        parent / "tiny.kvant",
        f"{made.folder}/",
        "tiny.kvant",
        Path("tiny.kvant"),
        copy,
    ):
        assert load(path).id == made.id, path


def test_report_is_no_part_of_the_id(made: Made) -> None:
    (made.folder / "report").mkdir()
    (made.folder / "report" / "quality.json").write_text("{}")
    contents = read_contents(made.folder)
    assert not any("report" in name for name in contents.files)


def test_newer_minor_schema_is_read(made: Made) -> None:
    reseal(made.folder, lambda f: f.update(schema={"major": 1, "minor": 7}, colour="unknown key"))
    assert load(made.folder, "reference").layer_count == 3


def test_import_is_quick_and_light() -> None:
    heavy = ("torch", "triton", "tvm", "tvm_ffi", "transformers", "onnx", "numpy")
    code = (
        "import sys, time; t = time.perf_counter(); import kvant.runtime;"
        "s = time.perf_counter() - t;"
        f"print(s, [m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    seconds, modules = done.stdout.split(maxsplit=1)
    assert modules.strip() == "[]", done.stderr
    assert float(seconds) < 0.5


def test_the_reader_is_light(made: Made) -> None:
    heavy = ("torch", "triton", "tvm", "tvm_ffi", "transformers", "onnx")
    code = (
        "import sys; from kvant.runtime import load; load(sys.argv[1], 'reference');"
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(made.folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.stdout.strip() == "[]", done.stderr


def runtime(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvant.runtime", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def test_command_line(made: Made, tmp_path: Path) -> None:
    shown = runtime("show", "tiny.kvant", "--json", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout) == load(made.folder, "reference").show()
    assert f"{'id':<24} {made.id}" in runtime("show", "tiny.kvant", cwd=tmp_path).stdout

    verified = runtime("verify", "tiny.kvant", "--target", "reference", "--json", cwd=tmp_path)
    assert verified.returncode == 0, verified.stderr
    assert json.loads(verified.stdout)["plans"] == 2

    refused = runtime("verify", "nowhere.kvant", cwd=tmp_path)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == (
        "kvant: no such folder\n  where: nowhere.kvant\n"
        "  fix: give the folder that holds manifest.json  [artifact-missing]\n"
    )
    as_json = runtime("show", "nowhere.kvant", "--json", cwd=tmp_path)
    assert (as_json.returncode, json.loads(as_json.stdout)["error"]["code"]) == (
        1,
        "artifact-missing",
    )
    pinned = runtime("show", "tiny.kvant", "--id", "0" * 64, "--json", cwd=tmp_path)
    assert json.loads(pinned.stdout)["error"]["code"] == "id-mismatch"
    assert runtime("verify", cwd=tmp_path).returncode == 2
    assert runtime("guess", "tiny.kvant", cwd=tmp_path).returncode == 2


def test_our_bug_is_status_70(
    made: Made, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kvant.runtime import artifact
    from kvant.runtime.__main__ import main

    def bug(*arguments: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(artifact, "load", bug)
    assert main(["show", str(made.folder)]) == 70
    assert capsys.readouterr().err.endswith(
        "kvant: this is a bug in kvant: ZeroDivisionError\n"
        "  where: the lines on stderr\n"
        "  fix: please report them with the command you ran  [internal-error]\n"
    )
    assert main(["show", str(made.folder), "--json"]) == 70
    out, err = capsys.readouterr()
    assert json.loads(out)["error"]["code"] == "internal-error"
    assert "ZeroDivisionError" in err
