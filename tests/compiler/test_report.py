"""The report is one file: no script, nothing from elsewhere, and no text of the user as markup."""

from pathlib import Path

import numpy as np
import pytest

from kvant.compiler.demo import judged
from kvant.compiler.quality import Quality
from kvant.compiler.report import write_report


@pytest.fixture
def page(tmp_path: Path) -> str:
    x = np.arange(100.0)
    path = write_report(
        tmp_path / "new" / "report.html",
        "SmolLM2 with <kivi>",
        {"In short": [("perplexity", "12.3"), ("text", "a <b>bold</b> & 'quoted' word")]},
        {"KL by position": ("position", "KL, nats", np.stack([x, np.sin(x)]))},
        lead="It moved by < 1 %.",
        notes={"In short": "of a cache of 4,096 tokens"},
        texts={"Generated": ("Once", " upon <i>\n\nThe end")},
    )
    return path.read_text(encoding="utf-8")


def test_a_report_shows_its_tables_and_curves(page: str) -> None:
    assert "<td>perplexity</td><td>12.3</td>" in page
    assert "<h2>KL by position</h2>" in page
    assert page.count("<svg") == 1


def test_text_is_never_markup(page: str) -> None:
    assert "<title>SmolLM2 with &lt;kivi&gt;</title>" in page
    assert "a &lt;b&gt;bold&lt;/b&gt; &amp; &#39;quoted&#39; word" in page


def test_a_sentence_judges_a_note_explains_and_a_text_keeps_its_paragraphs(page: str) -> None:
    assert page.index("It moved by &lt; 1 %.") < page.index("<table>")
    assert '</table>\n<p class="note">of a cache of 4,096 tokens</p>' in page
    assert '<div class="text"><b>Once</b> upon &lt;i&gt;\n\nThe end</div>' in page
    assert ".text { white-space: pre-wrap;" in page


@pytest.mark.parametrize(
    ("shift", "begins"),
    [
        (0.0, "Perplexity moved by +0.00%, which is within the noise of 1."),
        (0.1, "Perplexity moved by +10.52%, which is outside the noise of 1."),
        (-0.1, "Perplexity moved by -9.52%, which is outside the noise of 1."),
    ],
)
def test_the_judgement_follows_from_the_numbers(shift: float, begins: str) -> None:
    moved = np.random.default_rng(0).normal(0, 0.2, 512)
    moved += shift - moved.mean()
    full, agrees = np.full(512, 3.0), np.arange(512) % 8 > 0
    said = judged(Quality({}, np.zeros(512), full, full + moved, agrees, 1024, 128))
    assert said.startswith(begins)
    assert "over 512 tokens), and both models prefer the same next token at 87.5% of" in said


def test_a_report_loads_nothing(page: str) -> None:
    for word in ("<script", "<link", "<img", "src=", "@import"):
        assert word not in page


def test_the_same_findings_give_the_same_plot(tmp_path: Path) -> None:
    points = np.stack([np.arange(30.0), np.arange(30.0) ** 2])
    for name in ("a", "b"):
        write_report(tmp_path / name, "t", {}, {"c": ("x", "y", points)})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_curve_of_one_point(tmp_path: Path) -> None:
    write_report(tmp_path / "r", "t", {}, {"c": ("x", "y", np.ones((2, 1)))})
    assert "<svg" in (tmp_path / "r").read_text()
