"""Bad input gets one error: code, what, where, fix. One row for each item of that promise.

`bad_inputs.py` gives each bad input through the public functions; here stands the whole answer.
Nothing may be left where the result would have been.
"""

import json
from pathlib import Path

import pytest

import kvant

from .bad_inputs import BAD, RECIPE, SHAPE, SMOOTH, Box

pytest.importorskip("transformers")

# What is bad: code, what, where, fix.
REFUSALS: dict[str, tuple[str, str, str, str]] = {
    "missing model": (
        "model-missing",
        "there is no file or folder 'no/such/model'",
        "the model argument",
        "give a path that exists; kvant downloads nothing (for a model of the hub: hf "
        "download NAME --local-dir FOLDER)",
    ),
    "unreadable model": (
        "model-unreadable",
        "model.safetensors cannot be read: SafetensorError: Error while deserializing "
        "header: invalid header length",
        "<folder>/model/model.safetensors",
        "the file is damaged or incomplete; download or write it again",
    ),
    "unreadable gguf": (
        "model-unreadable",
        "model.gguf cannot be read: it begins with b'garb', not with b'GGUF'",
        "<folder>/model.gguf",
        "the file is damaged or incomplete; download or write it again",
    ),
    "gguf of an unsupported architecture": (
        "unsupported-architecture",
        "transformers cannot load GGUF files of architecture 'clip'",
        "<folder>/model.gguf",
        "give the model as a Hugging Face folder",
    ),
    "unknown recipe": (
        "unknown-recipe",
        "there is no recipe 'kivi-3bit'",
        "the recipe argument",
        "did you mean: kivi-4bit, kivi-2bit, split-2bit? `kvant show recipes` lists all; a path "
        "must end in .toml",
    ),
    "unknown key": (
        "unknown-key",
        "unknown key 'recnet'",
        "<folder>/mine.toml: v.recnet",
        "did you mean recent? known keys: sink, recent, flush, format, bits, axis, "
        "group, zero, params, clip, sparse",
    ),
    "unknown key of a pass": (
        "unknown-key",
        "unknown key 'alfa'",
        "<folder>/mine.toml: rewrite 1, pass smooth-k",
        "did you mean alpha? known keys: pass, alpha",
    ),
    "a recipe under the name of one of ours": (
        "recipe-name",
        "the name 'kivi-4bit' belongs to a recipe of kvant with other content",
        "<folder>/mine.toml",
        "give your recipe a name of its own",
    ),
    "a rule that matches no layer": (
        "rule-matches-nothing",
        "layers '7-9' match none of the model's 2 layers",
        "<folder>/mine.toml: rule 1",
        "name layers from 0 to 1, or remove the rule",
    ),
    "a group that does not divide": (
        "group-does-not-divide",
        "groups of 32 do not divide 80 channels",
        "recipe kivi-4bit: v",
        "use one of: 1, 2, 4, 5, 8, 10, 16, 20, 40, 80",
    ),
    "an encoding that would quantize nothing": (
        "quantizes-nothing",
        "every layer keeps its keys and values as they are",
        "<folder>/mine.toml",
        "give k or v a format with fewer bits",
    ),
    "unsupported head size of a rotation": (
        "unsupported-head-size",
        "a head of 80 channels has no Walsh-Hadamard matrix here",
        "recipe quarot-kv4: pass hadamard-v: graph @attention",
        "leave the rotation out; legal head sizes are the powers of two",
    ),
    "unsupported head size of the cpu": (
        "target-does-not-support",
        "63 channels of 4 bits do not fill whole bytes: use a multiple of 2 channels, or 8 bits",
        "target cpu:x86-64-v3",
        "change the recipe, or use the target 'reference'",
    ),
    "unknown target": (
        "unknown-target",
        "there is no target 'gpu'",
        "the targets argument",
        "did you mean: cpu? `kvant show targets` lists all",
    ),
    "unknown target of an artifact": (
        "unknown-target",
        "the artifact has no target 'cuda'; it has cpu-x86-64-v3",
        "<cpu_artifact>",
        "load one of these, compile again with `-t`, or load the slow 'reference'",
    ),
    "no c compiler": (
        "target-not-available",
        "no C compiler `cc` was found",
        "target cpu",
        "install gcc or clang",
    ),
    "too little text to calibrate": (
        "too-little-text",
        "the text has 3 tokens; calibration needs 64",
        "the calibration text",
        "give a text of about 384 characters of prose or more",
    ),
    "too little text to evaluate": (
        "too-little-text",
        "the text has 3 tokens; the evaluation needs 17",
        "the evaluation text",
        "give a text of about 102 characters of prose or more",
    ),
    "artifact for another machine": (
        "no-usable-target",
        "no compiled target of the artifact runs here: cpu-x86-64-v3: it is for Linux on "
        "riscv64; this machine is Linux on x86_64",
        "<folder>/copy",
        "install what is missing, or compile for this machine; target='reference' runs "
        "anywhere, slowly",
    ),
    "artifact for another processor": (
        "no-usable-target",
        "no compiled target of the artifact runs here: cpu-x86-64-v3: it needs avx9, "
        "which this processor does not have",
        "<folder>/copy",
        "install what is missing, or compile for this machine; target='reference' runs "
        "anywhere, slowly",
    ),
    "artifact of a newer schema": (
        "schema-newer",
        "the artifact has schema 99.0; this runtime reads 1.x",
        "<folder>/copy/manifest.json",
        "upgrade kvant (it was made by kvant '0.1.0'), or compile again with this version",
    ),
    "damaged artifact": (
        "file-digest",
        "plan.json is not the file that was published: its sha256 is <sha>..., but the "
        "manifest says <sha>...",
        "<folder>/copy/plan.json",
        "copy the artifact again from its source, with `cp -rL`, or compile it again; if "
        "it happens again, check the disk",
    ),
    "damaged manifest": (
        "manifest-damaged",
        "the manifest has sha256 <sha>..., but the file ID says '<sha>'",
        "<folder>/copy/manifest.json",
        "copy the artifact again from its source, or compile it again",
    ),
    "incomplete artifact": (
        "file-missing",
        "the manifest lists 'plan.json', but the folder does not hold it",
        "<folder>/copy",
        "copy the artifact again from its source, with `cp -rL`, or compile it again",
    ),
    "artifact with a file too many": (
        "file-extra",
        "the manifest does not list 'extra.so'",
        "<folder>/copy",
        "remove what was added, or copy the artifact again; only report/ may be added to",
    ),
    "another model's weights": (
        "wrong-weights",
        "model.layers.0.self_attn.k_proj.weight begins a sample with 0.99482, the "
        "compiled model's with -0.00518029",
        "attach(model, artifact)",
        "attach the weights that were compiled, or compile these",
    ),
    "quantized projection, compile": (
        "unsupported-projection",
        "model.layers.1.self_attn.v_proj is a Linear4bit that holds torch.uint8; kvant "
        "rewrites projections: plain Linear or Conv1D in floating point",
        "model.layers.1.self_attn.v_proj",
        "give the model before its weights were quantized",
    ),
    "quantized projection, attach": (
        "quantized-projection",
        "model.layers.1.self_attn.v_proj is a Linear4bit holding a Tensor of "
        "torch.uint8, not a plain torch.nn.Linear",
        "attach(model, artifact)",
        "load the model unquantized, with dtype float32, bfloat16 or float16",
    ),
    "lora projection, compile": (
        "adapted-weights",
        "model.layers.1.self_attn.v_proj is a LoraLinear with an adapter; kvant rewrites "
        "projections and cannot see through an adapter",
        "model.layers.1.self_attn.v_proj",
        "merge it first: model.merge_and_unload().save_pretrained(FOLDER)",
    ),
    "lora projection, attach": (
        "adapted-projection",
        "model.layers.1.self_attn.v_proj is a LoraLinear around a base layer (LoRA)",
        "attach(model, artifact)",
        "merge the adapter into the model first (merge_and_unload)",
    ),
    "offloaded projection, compile": (
        "offloaded-weights",
        "model.layers.1.self_attn.v_proj.weight is on the meta device: its values are elsewhere",
        "model.layers.1.self_attn.v_proj",
        "load the model without device_map offloading",
    ),
    "offloaded projection, attach": (
        "offloaded-projection",
        "model.layers.1.self_attn.v_proj.weight is on the meta device: it is offloaded "
        "or was never loaded",
        "attach(model, artifact)",
        "load the whole model into memory, without device_map offloading",
    ),
    "tensor of a wrong shape": (
        "wrong-shape",
        "v has shape [1, 2, 3, 32], expected [1, 2, 3, 64]",
        "layer 0, append",
        "pass [batch, heads, tokens, channels] as the cache was created for",
    ),
    "tensor of a wrong dtype": (
        "wrong-dtype",
        "k has dtype int64, expected float32 or bfloat16 or float16 in native byte order",
        "k",
        "convert k first",
    ),
    "tensor on a wrong device": (
        "wrong-device",
        "k is a torch.strided tensor on device meta, expected torch.strided on cpu",
        "k",
        "move it first, for example with k.cpu()",
    ),
    "nan": (
        "non-finite",
        "k holds nan in row 0, head 0, token 0, channel 0",
        "layer 0, append",
        "find out why the model gave such values; nothing was stored",
    ),
    "infinity": (
        "non-finite",
        "v holds inf in row 0, head 0, token 0, channel 0",
        "layer 0, append",
        "find out why the model gave such values; nothing was stored",
    ),
    "full cache": (
        "cache-full",
        "3 more columns after 3 pass the limit of 4",
        "layer 0, append",
        "create the cache with a larger max_tokens, or truncate it",
    ),
    "a mask of right padding": (
        "unsupported-mask",
        "the attention mask hides tokens that come after visible ones",
        "attention_mask",
        'pad on the left: tokenizer.padding_side = "left"',
    ),
    "a mask of four dimensions": (
        "unsupported-mask",
        "the attention mask has 4 dimensions",
        "attention_mask",
        "pass a 2-D mask of ones and zeros, padded on the left",
    ),
    "truncation inside a group": (
        "truncate-inside-group",
        "50 columns would cut a group of encoded tokens in two",
        "truncate",
        "truncate to 32 or 64, or reserve(n) before speculative tokens",
    ),
    "an output path that exists": (
        "output-exists",
        "out exists already, and kvant never writes over anything",
        "<folder>/out",
        "give another output path, or remove it first",
    ),
    "an extra that is not installed": (
        "missing-extra",
        "compiling a model needs gguf, not installed here",
        "this Python environment",
        "pip install 'kvant[compile]'",
    ),
    "an extra of the runtime that is not installed": (
        "no-usable-target",
        "no compiled target of the artifact runs here: cpu-x86-64-v3: the package "
        "apache-tvm-ffi is not installed (pip install 'kvant[cpu]')",
        "<cpu_artifact>",
        "install what is missing, or compile for this machine; target='reference' runs "
        "anywhere, slowly",
    ),
}
# What an input itself puts into its folder.
OWN = {"mine.toml", "model", "model.gguf", "copy", "words.txt"}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama on disk, with a tokenizer of whole words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def artifacts(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    folder = tmp_path_factory.mktemp("artifacts")
    (folder / "mine.toml").write_text(RECIPE)
    shape, model, cpu = (folder / name for name in ("shape", "model", "cpu"))
    kvant.compile(SHAPE, "int4-token", ["reference"], out=shape)
    kvant.compile(model_folder, folder / "mine.toml", ["reference"], out=model)
    kvant.compile(kvant.Shape(2, 1, 16), "int4-token", ["cpu:x86-64-v3"], out=cpu)
    return shape, model, cpu


@pytest.fixture
def box(
    tmp_path: Path,
    model_folder: Path,
    artifacts: tuple[Path, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> Box:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return Box(tmp_path, model_folder, *artifacts, monkeypatch)


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, box: Box) -> None:
    assert box.refusal(BAD[name]) == REFUSALS[name]
    assert {path.name for path in box.folder.iterdir()} <= OWN, "something was left behind"


def test_every_bad_input_has_its_row() -> None:
    assert list(BAD) == list(REFUSALS)


COMMANDS: dict[str, tuple[list[str], str]] = {
    "missing model": (["compile", "no/such/model", "-t", "reference", "-o", "{out}"], ""),
    "unknown recipe": (["compile", "{model}", "-r", "kivi-3bit", "-o", "{out}"], ""),
    "unknown target": (["compile", "{model}", "-t", "gpu", "-o", "{out}"], ""),
    "unknown target of an artifact": (["verify", "{cpu}", "-t", "cuda"], ""),
    "too little text to calibrate": (
        ["compile", "{model}", "-r", "{recipe}", "-t", "reference", "-o", "{out}"]
        + ["--text", "{text}"],
        "smooth",
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("as_json", [False, True])
def test_on_the_command_line(
    name: str, as_json: bool, box: Box, capfd: pytest.CaptureFixture[str]
) -> None:
    """The same words; status 1; never a traceback."""
    from kvant.compiler.cli import main

    words = {"out": box.out, "model": box.model_folder, "cpu": box.cpu_artifact}
    words |= {"recipe": box.folder / "mine.toml", "text": box.folder / "words.txt"}
    arguments, needs = COMMANDS[name]
    if needs:
        box.recipe(SMOOTH)
        (box.folder / "words.txt").write_text("a b c")
    with pytest.raises(SystemExit) as caught:
        main([a.format(**words) for a in arguments] + ["--json"] * as_json)
    assert caught.value.code == 1
    out, err = (box.normalised(text) for text in capfd.readouterr())
    code, what, where, fix = REFUSALS[name]
    if as_json:
        error = json.loads(out)["error"]
        assert (error["code"], error["what"], error["where"], error["fix"]) == REFUSALS[name]
    else:
        assert f"kvant: {what}\n  where: {where}\n  fix: {fix}  [{code}]\n" in err
    assert "Traceback" not in out + err
    assert {path.name for path in box.folder.iterdir()} <= OWN
