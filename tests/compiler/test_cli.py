"""The command line: exit status, one JSON document on stdout, errors without tracebacks."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kvant
from kvant.compiler import cli, extras, listing, tables
from kvant.ir.errors import KvantError

WORDS = "the of and to in a is that it was for on are as with his they at be this".split()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, make_model: Any) -> Path:
    """Return a folder with a small random Llama and a tokenizer of twenty words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging

    # The command line says so to transformers before its import; here it was imported long ago.
    logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model = make_model("llama", head_dim=16, max_position_embeddings=512, eos_token_id=63)
    model.save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate([*WORDS, "[UNK]", "[EOS]"])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="[UNK]", eos_token="[EOS]"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    out = tmp_path_factory.mktemp("cli") / "tiny.kvant"
    kvant.compile(str(tiny), "int8-token", ["cpu:x86-64-v3", "reference"], out=out)
    return out


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(WORDS[i * i % 17 % 20] for i in range(400)))
    return path


class Line:
    """Runs the command line in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: object, status: int = 0) -> tuple[str, str]:
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main([str(a) for a in arguments])
        out, err = self.capsys.readouterr()
        assert caught.value.code == status, out + err
        return out, err

    def json(self, *arguments: object, status: int = 0) -> Any:
        out, err = self(*arguments, "--json", status=status)
        assert err == ""
        return json.loads(out)


@pytest.fixture
def line(capsys: pytest.CaptureFixture[str]) -> Line:
    return Line(capsys)


@pytest.mark.parametrize("what", ["recipes", "targets", "passes", "env"])
def test_lists(line: Line, what: str) -> None:
    out, err = line("show", what)
    rows = line.json("show", what)
    assert err == ""
    assert what in out or "debug variables" in out
    assert len(rows) >= 2
    assert all(row["name"] in out for row in rows)


def test_names_in_the_list_of_recipes_can_be_compiled(line: Line) -> None:
    from kvant.compiler import recipe

    assert [row["name"] for row in line.json("show", "recipes")] == list(recipe.names())


def test_compile(line: Line, tiny: Path, tmp_path: Path) -> None:
    facts = line.json("compile", tiny, "-r", "int8-token", "-t", "reference", "-o", tmp_path / "a")
    assert Path(facts["path"]) == tmp_path / "a"
    assert (facts["recipe"], facts["layers"], facts["targets"]) == ("int8-token", 2, ["reference"])
    assert facts["tokens_per_gb"] == pytest.approx(1e9 / facts["cache_bytes_per_token"])
    assert facts["bytes_full_per_token"] == 2 * 2 * 2 * 2 * 16
    assert facts["smaller_from"] >= 16
    out, _ = line("compile", tiny, "-r", "int8-token", "-t", "reference", "-o", tmp_path / "b")
    assert facts["id"] == (tmp_path / "b" / "ID").read_text().strip()
    for words in ("tokens per GB of cache", "smaller than bf16", "kvant bench", "tiny, 2 layers"):
        assert words in out


def test_show(line: Line, artifact: Path) -> None:
    facts = line.json("show", artifact)
    keys = "id recipe targets layers bits_per_element cache_bytes_per_token kernels".split()
    assert set(keys) <= facts.keys()
    assert facts["chosen"] == "cpu-x86-64-v3"
    assert {k["name"] for k in facts["kernels"]} >= {"cpu-x86-64-v3/p0/attend"}
    out, _ = line("show", artifact)
    assert "one query a row, for each split of the keys" in out
    assert "chosen: what `load` takes" in out


def test_show_says_why_a_target_is_not_chosen(
    line: Line, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = importlib.import_module("kvant.runtime.target")
    monkeypatch.setattr(target, "why_not", lambda facts, machine: "it needs avx2, not here")
    facts = line.json("show", artifact)
    assert facts["chosen"] is None
    assert "it needs avx2, not here" in facts["passed_over"]["cpu-x86-64-v3"]
    out, _ = line("show", artifact)
    assert "needs avx2, not here" in out


def test_verify(line: Line, artifact: Path) -> None:
    result = line.json("verify", artifact)
    assert result["target"] == "cpu-x86-64-v3"
    assert result["computed_share"] <= 1.0
    out, _ = line("verify", artifact)
    assert "verified: everything agrees" in out
    assert re.search(r"share of what is allowed  +stored [u0][\w .]*, computed ", out)
    assert "share  " not in out


def test_shares_are_shown_without_an_exponent() -> None:
    result = {"cases": 5, "passed_over": {}, "stored_share": 0.0, "computed_share": 0.0000834}
    error = "largest error, as a share of what is allowed"
    assert tables.verify_rows(result) == {"cases": 5, error: "stored 0, computed 0.000083"}
    tiny = tables.verify_rows(result | {"stored_share": 3e-9})
    assert tiny[error] == "stored under 0.00001, computed 0.000083"


def timed(context: int, ms: float, *peers: float) -> dict[str, Any]:
    names = (str(i) for i in range(len(peers)))
    return {"batch": 1, "context": context, "ms": ms, "peers": dict(zip(names, peers, strict=True))}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            [timed(4096, 1, 2, 3), timed(8192, 1, 2)],
            "faster than the best peer at every context timed (from 4,096 tokens)",
        ),
        ([timed(4096, 2, 1), timed(8192, 1, 2)], "faster than the best peer from 8,192 tokens on"),
        (
            [timed(4096, 1, 2), timed(8192, 2, 3, 1)],
            "slower than the best peer at 8,192 tokens, the longest context timed",
        ),
        ([timed(4096, 1)], "no peer to compare with"),
    ],
)
def test_where_it_pays_in_words(rows: list[dict[str, Any]], words: str) -> None:
    assert tables.pays_words(rows) == words


def test_what_kvant_adds_itself_is_no_option_of_a_recipe(line: Line) -> None:
    rows = {row["name"]: row for row in line.json("show", "passes")}
    added = [name for name, row in rows.items() if row["does"].endswith(" (added by kvant)")]
    assert added == ["store", "dead-code"]
    assert [rows[name]["options"] for name in added] == ["", ""]
    assert rows["smooth-k"]["options"] == "alpha: float = 0.5"


def test_eval(line: Line, artifact: Path, tiny: Path, text: Path) -> None:
    options = ("--model", tiny, "--text", text, "--tokens", 20, "--prompt-tokens", 40)
    result = line.json("eval", artifact, *options)
    keys = (
        "perplexity_full perplexity kl_mean kl_mean_low kl_mean_high kl_p99 kl_noise_floor top1 "
        "bits_per_element packed_share cache_bytes_per_token tokens context recipe target"
    )
    assert set(keys.split()) < set(result)
    assert (result["tokens"], result["target"]) == (20, "cpu-x86-64-v3")
    out, _ = line("eval", artifact, *options)
    assert "KL(unquantized || quantized)" in out


def test_run(line: Line, artifact: Path, tiny: Path) -> None:
    options = ("--model", tiny, "--prompt", "the of and", "--tokens", 5)
    result = line.json("run", artifact, *options)
    assert result["tokens"] == 5
    assert result["context"] == 8
    out, err = line("run", artifact, *options)
    assert out.strip() == result["text"].strip()  # stdout is the text, and only that
    assert err.startswith("5 tokens, ")


def test_bench(line: Line, artifact: Path) -> None:
    options = ("-t", "reference", "--context", "16,8", "--batch", "1")
    rows = line.json("bench", "--shape", "4x2x16", "-r", "int4-token", *options)
    assert [row["context"] for row in rows] == [8, 16]
    out, _ = line("bench", artifact, *options)
    assert "int8-token 6x2x16, reference: context 8, batch 1, threads 1" in out
    assert "slower than kvant by" in out
    assert re.search(r"enable_gqa +\d+\.\d{3} +\d+\.\d{2}x", out)
    assert re.search("^batch 1: (faster|slower) than the best peer ", out, re.MULTILINE)
    assert "tokens of this layer per GB" in out


def test_json_is_all_there_is_on_stdout(tiny: Path, artifact: Path, tmp_path: Path) -> None:
    code = "import sys; from kvant.compiler.cli import main; main()"
    for arguments in (
        ["compile", str(tiny), "-t", "reference", "-r", "int8-token", "-o", str(tmp_path / "a")],
        ["run", str(artifact), "--model", str(tiny), "--prompt", "the of", "--tokens", "2"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments, "--json"], capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")
        json.loads(done.stdout)


ERRORS: list[tuple[tuple[str, ...], dict[str, str]]] = [
    (
        ("compile", "nowhere", "-t", "reference"),
        {
            "code": "model-missing",
            "what": "there is no file or folder 'nowhere'",
            "where": "the model argument",
            "fix": "give a path that exists; kvant downloads nothing (for a model of the hub: "
            "hf download NAME --local-dir FOLDER)",
        },
    ),
    (
        ("compile", "nowhere", "--text", "no.txt"),
        {
            "code": "text-unreadable",
            "what": "the text cannot be read: FileNotFoundError",
            "where": "no.txt",
            "fix": "give a readable UTF-8 text file",
        },
    ),
    (
        ("show", "recipe"),
        {
            "code": "artifact-missing",
            "what": "there is no artifact 'recipe', and no list of that name",
            "where": "the argument of show",
            "fix": "did you mean: kvant show recipes?",
        },
    ),
    (
        ("bench", "--shape", "8by2"),
        {
            "code": "shape-syntax",
            "what": "'8by2' is not a shape",
            "where": "--shape",
            "fix": "write heads x kv heads x head size, such as 32x8x128",
        },
    ),
]


@pytest.mark.parametrize(("arguments", "error"), ERRORS, ids=[e["code"] for _, e in ERRORS])
def test_refusals(line: Line, arguments: tuple[str, ...], error: dict[str, str]) -> None:
    assert line.json(*arguments, status=1) == {"error": error}
    out, err = line(*arguments, status=1)
    assert out == ""
    assert err == (
        f"kvant: {error['what']}\n  where: {error['where']}\n"
        f"  fix: {error['fix']}  [{error['code']}]\n"
    )


def test_too_little_text(line: Line, artifact: Path, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("the of and")
    options = ("--model", tiny, "--text", tmp_path / "short.txt")
    error = line.json("eval", artifact, *options, "--tokens", 20, "--prompt-tokens", 40, status=1)[
        "error"
    ]
    assert error["code"] == "too-little-text"
    error = line.json(
        *("compile", tiny, "-r", "qserve-kv4", "-t", "reference", "-o", tmp_path / "a"),
        *("--text", tmp_path / "short.txt"),
        status=1,
    )["error"]
    assert error["code"] == "too-little-text"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["short.txt"]


def test_a_text_that_is_not_utf8(line: Line, tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    error = line.json("compile", "x", "--text", tmp_path / "bytes", status=1)["error"]
    assert error["what"] == "the text cannot be read: UnicodeDecodeError"


def test_an_empty_prompt(line: Line, artifact: Path, tiny: Path) -> None:
    error = line.json("run", artifact, "--model", tiny, "--prompt", "", status=1)["error"]
    assert (error["code"], error["what"]) == ("empty-prompt", "the prompt has no tokens")


@pytest.mark.parametrize(
    "arguments",
    [
        ("compile",),
        ("nonsense",),
        ("compile", "x", "--bogus"),
        ("bench",),
        ("bench", "a", "--shape", "1x1x2"),
        ("bench", "--shape", "1x1x2", "--context", "ten"),
        ("bench", "--shape", "1x1x2", "--batch", "0"),
        ("run", "a", "--model", "m", "--prompt", "p", "--tokens", "0"),
    ],
)
def test_usage_errors(line: Line, arguments: tuple[str, ...]) -> None:
    out, err = line(*arguments, status=2)
    assert out == ""
    assert "Usage: kvant" in err


def test_help(line: Line) -> None:
    out, _ = line("--help")
    assert all(name in out for name in ("compile", "show", "eval", "run", "bench", "verify"))


def test_our_bug(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise ZeroDivisionError("a wrong turn\nand more")

    monkeypatch.setitem(listing.LISTINGS, "env", broken)
    out, err = line("show", "env", status=70)
    assert out == ""
    assert err.startswith(
        "kvant: this is a bug in kvant: ZeroDivisionError: a wrong turn\n"
        "  where: the lines that follow, on stderr\n"
        "  fix: please report them with the command you ran  [internal-error]\n"
        "Traceback"
    )
    out, err = line("show", "env", "--json", status=70)
    assert json.loads(out)["error"]["code"] == "internal-error"
    assert err.startswith("Traceback")


def test_a_missing_extra_of_the_front_itself(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    real = extras.find_spec
    monkeypatch.setattr(extras, "find_spec", lambda n: None if n == "typer" else real(n))
    _, err = line("show", "env", status=1)
    assert err == (
        "kvant: compiling a model needs typer, not installed here\n"
        "  where: this Python environment\n"
        "  fix: pip install 'kvant[compile]'  [missing-extra]\n"
    )


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_compile_leaves_nothing(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, status: int
) -> None:
    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), number)
        raise KvantError("went-on", "not interrupted", where="here", fix="none")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("kvant.compiler.driver._kernels", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    # A shell starts what runs in its background with Ctrl-C ignored.
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _, err = line("bench", "--shape", "4x2x16", "-t", "reference", status=status)
    finally:
        signal.signal(signal.SIGINT, ours)
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_marks_in_texts_are_shown_as_they_are(line: Line) -> None:
    _, err = line("show", "[bold]/x", status=1)
    assert "  where: [bold]/x\n" in err
