"""Docstrings, comments, messages and documents use the words of CONTRIBUTING's glossary."""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("tinyusfm_edge", "export", "runtime", "calibration", "benchmarks", "scripts")
PAGES = ("README.md", "ARCHITECTURE.md", "runtime/README.md", "benchmarks/README.md", "docs/index.md")
PAGES += tuple(f"docs/{folder}/*.md" for folder in ("about", "guides", "reference", "trust", "tutorials"))
# pairs of (pattern, what to write); phrases first, then single words that have no other use here
WORST = {
    r"anew": "again",
    r"manieth": "every Nth",
    r"in silence": "silently",
    r"out loud": "explicitly",
    r"in so many words": "explicitly",
    r"dealt out": "assigned",
    r"lets? go of": "releases",
    r"cries wolf": "false-alarm rate",
    r"told of": "called with",
    r"as good as it says": "valid",
    r"nobody's fault": "a stall",
    r"a frame's worth": "one frame",
    r"at the door": "on arrival",
    r"with suspicion": "validated",
    r"lets? nobody wait": "wakes all waiters",
    r"clock in its hand": "with a timeout",
    r"rungs?|ladders?": "level, fallback",
    r"pictures?": "image",
    r"workshop": "training side",
    r"told": "called with, reported, distinguished",
    r"sure enough": "the confidence threshold is met",
    r"still at it": "still running",
    r"is worth now": "recomputed at delivery",
    r"[Tt]wice is harmless": "idempotent",
    r"for good|for ever": "permanently",
    r"how manieth": "every Nth",
    r"climbs? back": "switches back",
    r"whoever iterates": "the consumer",
    r"lies about now": "stale",
    r"book (?:of frames|that says)": "frame accounting",
    r"of which none may fail": "that must all succeed",
    r"what stands behind it": "the fallback",
    r"has to believe": "can be recomputed",
    r"the house's?": "name the rule",
    r"wish(?:es)?": "options",
    r"dogs?": "watchdog",
    r"(?<![`./\"'<{-])nets?(?![`\"'=\[:-]|\.\w)": "network, model",
    r"(?:rows?|frames|images|samples|bytes|bits|one|lines?|files?|objects?|patches) an? "
    r"(?:second|frame|image|step|pixel|line|target|patient|class|artefact|view|label|stage|side)": "per",
}
PATTERN = re.compile(r"\b(?:" + "|".join(f"(?:{pattern})" for pattern in WORST) + r")\b", re.IGNORECASE)


def prose(source: str) -> list[tuple[int, str]]:
    """Strings and comments of a Python source, with their lines."""
    kinds = (tokenize.STRING, tokenize.COMMENT)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [(token.start[0], token.string) for token in tokens if token.type in kinds]


def worst_words(parts: list[tuple[int, str]]) -> list[str]:
    """Words and phrases of the glossary's right column, with their lines."""
    return [
        f"{line + text[: match.start()].count(chr(10))}: {match.group()}"
        for line, text in parts
        for match in PATTERN.finditer(text)
    ]


def test_sources_and_documents_use_the_glossary() -> None:
    found = []
    for path in sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        words = worst_words(prose(path.read_text(encoding="utf-8")))
        found += [f"{path.relative_to(ROOT)}:{word}" for word in words]
    for page in sorted(page for pattern in PAGES for page in ROOT.glob(pattern)):
        words = worst_words([(1, page.read_text(encoding="utf-8"))])
        found += [f"{page.relative_to(ROOT)}:{word}" for word in words]
    assert not found, "see the table of words in CONTRIBUTING.md"


@pytest.mark.parametrize("text", ["# the process is made anew", '"""Lets go of the memory."""', "'a picture'"])
def test_a_worst_word_is_caught(text: str) -> None:
    assert worst_words(prose(text))


def test_names_and_plain_words_pass() -> None:
    assert not worst_words(prose("ladder = 1  # the level in use\n'image'"))
