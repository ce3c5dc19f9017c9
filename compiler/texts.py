"""English prose that every machine with Python has: its own language reference.

The text is assembled from the standard library's `pydoc_data.topics` when it is asked for, so no
text is stored here. Only running prose is kept: grammar, code, tables, headings and lists of links
say little about how well a model reads. The text differs a little between versions of Python.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence

from ..ir.errors import KvantError

_NOT_PROSE = re.compile(r"::=|>>>|https?://|\.\. |\|\s|\t|^\[\d+\]|\*\*\*|====|----", re.MULTILINE)
_NOT_NEWS = r"(?!Changed in version|New in version|Added in version|Deprecated since)"
_MARKS = re.compile(r"\s*\[\d+\]|[*`\"]")
_BROKEN_WORD = re.compile(r"(?<=\w)- (?=\w)")
_SENTENCE = re.compile(rf"{_NOT_NEWS}[A-Z].*[.!?)]$", re.DOTALL)
_LEAST_WORDS = 12


def demo_text() -> str:
    """Return running English prose, over 100,000 characters, paragraphs separated by blank lines.

    Raises: KvantError "text-missing" if this Python was installed without its documentation topics.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise KvantError(
            "text-missing",
            "this Python has no pydoc_data, so there is no text to evaluate on",
            where="compiler/texts.py: demo_text",
            fix="install the full standard library, or give a text file with --text",
        ) from None
    return prose(topics)


def name_of(text: str | Sequence[int]) -> str:
    """Return what to call a text or token ids in a record: size and the start of its sha256."""
    if isinstance(text, str):
        raw, size = text.encode(), f"{len(text):,} characters"
    else:
        raw, size = json.dumps([int(i) for i in text]).encode(), f"{len(text):,} tokens"
    return f"{size}, sha256 {hashlib.sha256(raw).hexdigest()[:16]}"


def prose(topics: Mapping[str, str]) -> str:
    """Return the prose paragraphs of documentation topics, in the order of their names, once each.

    Args:
        topics: plain text by topic, with code indented by three spaces or more.
    """
    kept = dict.fromkeys(
        paragraph for name in sorted(topics) for paragraph in _paragraphs(topics[name])
    )
    return "\n\n".join(kept)


def _paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs of one topic that are whole sentences, each on one line."""
    for block in re.split(r"\n\s*\n", text):
        lines = block.split("\n")
        if any(line.startswith(" ") for line in lines) or _NOT_PROSE.search(block):
            continue
        paragraph = re.sub(r"\s+", " ", _MARKS.sub("", " ".join(lines))).strip()
        paragraph = _BROKEN_WORD.sub("-", paragraph)
        if _SENTENCE.match(paragraph) and len(paragraph.split()) >= _LEAST_WORDS:
            yield paragraph
