"""What test_bad_input.py refuses: one function for each way to give kvant something bad."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvant
from kvant.ir.errors import KvantError
from kvant.runtime import load

SHAPE = kvant.Shape(4, 2, 64, layers=2)
INT4 = 'format = "int"\nbits = 4\naxis = "token"\ngroup = 32\n'
RECIPE = f'name = "mine"\n[k]\n{INT4}[v]\n{INT4}'
SMOOTH = 'name = "smooth"\n[[rewrite]]\npass = "smooth-k"\n' + RECIPE.partition("\n")[2]


@dataclass
class Box:
    """A folder of its own for one bad input, and what the inputs are made from.

    Attributes:
        folder: empty at first; `out` in it is where results would go.
        model_folder: a small random Llama as transformers saves it, with a tokenizer.
        shape_artifact: an artifact for the reference, made from a shape.
        model_artifact: an artifact for the reference, made from the model.
        cpu_artifact: an artifact for this CPU, made from a shape.
        patch: undone after the test.
    """

    folder: Path
    model_folder: Path
    shape_artifact: Path
    model_artifact: Path
    cpu_artifact: Path
    patch: pytest.MonkeyPatch

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def compile(self, model: Any = SHAPE, recipe: Any = "int4-token", **options: Any) -> Any:
        return kvant.compile(model, recipe, **{"targets": ["reference"], "out": self.out} | options)

    def recipe(self, text: str) -> Path:
        path = self.folder / "mine.toml"
        path.write_text(text)
        return path

    def model(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.model_folder, dtype="float32").eval()

    def copy(self, artifact: Path | None = None) -> Path:
        return Path(shutil.copytree(artifact or self.shape_artifact, self.folder / "copy"))

    def sealed(self, change: Callable[[dict[str, Any]], None], artifact: Path) -> Path:
        """Return a copy of an artifact whose manifest says something else, with an ID that fits."""
        path = self.copy(artifact)
        facts = json.loads((path / "manifest.json").read_bytes())
        change(facts)
        raw = json.dumps(facts, sort_keys=True, separators=(",", ":")).encode() + b"\n"
        (path / "manifest.json").write_bytes(raw)
        (path / "ID").write_text(hashlib.sha256(raw).hexdigest() + "\n")
        return path

    def cache(self, **options: Any) -> Any:
        return load(self.shape_artifact, target="reference").new_cache(**options)

    def attach(self, model: Any) -> Any:
        from kvant.runtime.huggingface import attach

        return attach(model, load(self.model_artifact, target="reference"))

    def refusal(self, run: Callable[["Box"], object]) -> tuple[str, str, str, str]:
        """Return code, what, where and fix of a refusal, with the folders left out."""
        with pytest.raises(KvantError) as caught:
            run(self)
        error = caught.value
        return tuple(  # type: ignore[return-value]
            self.normalised(text) for text in (error.code, error.what, error.where, error.fix)
        )

    def normalised(self, text: str) -> str:
        for name in ("shape_artifact", "model_artifact", "cpu_artifact", "model_folder", "folder"):
            text = text.replace(str(getattr(self, name)), f"<{name}>")
        return re.sub(r"\b[0-9a-f]{12}\b", "<sha>", text)


def keys(tokens: int = 3, heads: int = 2, width: int = 64) -> Any:
    return np.random.default_rng(0).standard_normal((1, heads, tokens, width)).astype(np.float32)


def with_linear(model: Any, change: Callable[[Any], Any]) -> Any:
    """Replace one projection of a model."""
    attention = model.model.layers[1].self_attn
    attention.v_proj = change(attention.v_proj)
    return model


def quantized(linear: Any) -> Any:
    import torch

    class Linear4bit(torch.nn.Linear):
        pass

    made = Linear4bit(linear.in_features, linear.out_features, bias=False)
    made.weight = torch.nn.Parameter(torch.zeros(8, dtype=torch.uint8), requires_grad=False)
    return made


def adapted(linear: Any) -> Any:
    import torch

    class LoraLinear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = linear

    return LoraLinear()


def truncated_weights(box: Box) -> None:
    folder = Path(shutil.copytree(box.model_folder, box.folder / "model"))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    box.compile(folder)


def bad_gguf(box: Box) -> None:
    path = box.folder / "model.gguf"
    path.write_bytes(b"garbage" * 100)
    box.compile(path)


def unsupported_gguf(box: Box) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(box.folder / "model.gguf", "clip")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    box.compile(box.folder / "model.gguf")


def no_compiler(box: Box) -> None:
    box.patch.setenv("PATH", "")
    box.compile(targets=["cpu"])


def little_text_to_evaluate(box: Box) -> None:
    from kvant.compiler.bind import open_model
    from kvant.compiler.quality import evaluate

    evaluate(load(box.model_artifact, "reference"), open_model(box.model_folder), "a b c", 8, 8, 4)


def elsewhere(box: Box) -> None:
    def change(facts: dict[str, Any]) -> None:
        for target in facts["targets"].values():
            target["machine"] = "riscv64"

    load(box.sealed(change, box.cpu_artifact), target="cpu")


def missing_features(box: Box) -> None:
    def change(facts: dict[str, Any]) -> None:
        for target in facts["targets"].values():
            target["features"] = ["avx9"]

    load(box.sealed(change, box.cpu_artifact))


def newer(box: Box) -> None:
    load(
        box.sealed(lambda facts: facts.update(schema={"major": 99, "minor": 0}), box.shape_artifact)
    )


def damaged(box: Box) -> None:
    path = box.copy() / "plan.json"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    load(path.parent)


def damaged_manifest(box: Box) -> None:
    path = box.copy() / "manifest.json"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    load(path.parent)


def incomplete(box: Box) -> None:
    path = box.copy()
    (path / "plan.json").unlink()
    load(path)


def one_file_too_many(box: Box) -> None:
    path = box.copy()
    (path / "extra.so").write_bytes(b"\x7fELF")
    load(path)


def other_weights(box: Box) -> None:
    model = box.model()
    for layer in model.model.layers:
        layer.self_attn.k_proj.weight.data += 1.0
    box.attach(model)


def full(box: Box) -> None:
    cache = box.cache(max_tokens=4)
    cache.append(0, keys(), keys())
    cache.append(0, keys(), keys())


def appended(k: Any, v: Any) -> Callable[[Box], object]:
    return lambda box: box.cache().append(0, k, v)


def torch_keys(**options: Any) -> Any:
    import torch

    return torch.zeros((1, 2, 3, 64), **options)


def masked(mask: Any) -> Callable[[Box], object]:
    def run(box: Box) -> None:
        import torch

        model, cache = box.attach(box.model())
        ids = torch.ones(2, 8, dtype=torch.long)
        model(ids, past_key_values=cache, attention_mask=torch.tensor(mask))

    return run


def inside_a_group(box: Box) -> None:
    grouped = INT4.replace("token", "channel")
    path = box.recipe(f'name = "mine"\n[k]\n{grouped}[v]\n{grouped}')
    cache = box.compile(recipe=path).new_cache()
    for layer in range(2):
        cache.append(layer, keys(100), keys(100))
    cache.flush()
    shutil.rmtree(box.out)
    cache.truncate(50)


def output_exists(box: Box) -> None:
    box.out.mkdir()
    try:
        box.compile()
    finally:
        box.out.rmdir()


def missing_extra(box: Box) -> None:
    from kvant.compiler import extras

    real = extras.find_spec
    box.patch.setattr(extras, "find_spec", lambda name: None if name == "gguf" else real(name))
    (box.folder / "model.gguf").write_bytes(b"GGUF")
    box.compile(box.folder / "model.gguf")


def missing_runtime_extra(box: Box) -> None:
    from importlib import metadata

    real = metadata.version

    def version(package: str) -> str:
        if package == "apache-tvm-ffi":
            raise metadata.PackageNotFoundError(package)
        return real(package)

    box.patch.setattr(metadata, "version", version)
    load(box.cpu_artifact)


BAD: dict[str, Callable[[Box], object]] = {
    "missing model": lambda box: box.compile("no/such/model"),
    "unreadable model": truncated_weights,
    "unreadable gguf": bad_gguf,
    "gguf of an unsupported architecture": unsupported_gguf,
    "unknown recipe": lambda box: box.compile(recipe="kivi-3bit"),
    "unknown key": lambda box: box.compile(recipe=box.recipe(RECIPE + "recnet = 4\n")),
    "unknown key of a pass": lambda box: box.compile(
        recipe=box.recipe(SMOOTH.replace('"smooth-k"', '"smooth-k"\nalfa = 0.5'))
    ),
    "a recipe under the name of one of ours": lambda box: box.compile(
        recipe=box.recipe(RECIPE.replace('"mine"', '"kivi-4bit"'))
    ),
    "a rule that matches no layer": lambda box: box.compile(
        recipe=box.recipe(RECIPE + f'[[rule]]\nlayers = "7-9"\n[rule.k]\n{INT4}')
    ),
    "a group that does not divide": lambda box: box.compile(kvant.Shape(4, 2, 80), "kivi-4bit"),
    "an encoding that would quantize nothing": lambda box: box.compile(
        recipe=box.recipe('name = "mine"\n[k]\nformat = "f32"\n[v]\nformat = "f32"\n')
    ),
    "unsupported head size of a rotation": lambda box: box.compile(
        kvant.Shape(4, 2, 80), "quarot-kv4"
    ),
    "unsupported head size of the cpu": lambda box: box.compile(
        kvant.Shape(4, 2, 63), targets=["cpu:x86-64-v3"]
    ),
    "unknown target": lambda box: box.compile(targets=["gpu"]),
    "unknown target of an artifact": lambda box: load(box.cpu_artifact, target="cuda"),
    "no c compiler": no_compiler,
    "too little text to calibrate": lambda box: box.compile(
        box.model_folder, box.recipe(SMOOTH), text="a b c"
    ),
    "too little text to evaluate": little_text_to_evaluate,
    "artifact for another machine": elsewhere,
    "artifact for another processor": missing_features,
    "artifact of a newer schema": newer,
    "damaged artifact": damaged,
    "damaged manifest": damaged_manifest,
    "incomplete artifact": incomplete,
    "artifact with a file too many": one_file_too_many,
    "another model's weights": other_weights,
    "quantized projection, compile": lambda box: box.compile(with_linear(box.model(), quantized)),
    "quantized projection, attach": lambda box: box.attach(with_linear(box.model(), quantized)),
    "lora projection, compile": lambda box: box.compile(with_linear(box.model(), adapted)),
    "lora projection, attach": lambda box: box.attach(with_linear(box.model(), adapted)),
    "offloaded projection, compile": lambda box: box.compile(
        with_linear(box.model(), lambda linear: linear.to("meta"))
    ),
    "offloaded projection, attach": lambda box: box.attach(
        with_linear(box.model(), lambda linear: linear.to("meta"))
    ),
    "tensor of a wrong shape": appended(keys(), keys(width=32)),
    "tensor of a wrong dtype": appended(keys().astype(np.int64), keys()),
    "tensor on a wrong device": appended(torch_keys(device="meta"), keys()),
    "nan": appended(keys() * np.nan, keys()),
    "infinity": appended(keys(), keys() * np.inf),
    "full cache": full,
    "a mask of right padding": masked([[1] * 8, [1] * 5 + [0] * 3]),
    "a mask of four dimensions": masked(np.ones((2, 1, 8, 8), bool)),
    "truncation inside a group": inside_a_group,
    "an output path that exists": output_exists,
    "an extra that is not installed": missing_extra,
    "an extra of the runtime that is not installed": missing_runtime_extra,
}
