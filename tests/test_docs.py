"""Documents stay true: what they point at exists."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Code in backticks that looks like a file of ours. Braces and stars stand for several.
A_FILE = re.compile(
    r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|md|cc|h|inc|proto|sh|json|png|svg|toml|sbatch))`"
)
# Relative paths are read from the repository, or from one of these.
FROM = ("", "moeserve", "tests", "docs", "bench")
# What design.md says is to come.
TO_COME = "## Where the next features go"


def documents() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a checkout: which files are ours is not known")
    return [ROOT / name for name in listed.stdout.split()]


def section_less(text: str, heading: str) -> str:
    """``text`` without the section of that heading."""
    before, found, after = text.partition(heading)
    return before + after.partition("\n## ")[2] if found else before


def test_every_file_that_a_document_names_exists() -> None:
    missing = [
        f"{document.relative_to(ROOT)}: {name}"
        for document in documents()
        for name in A_FILE.findall(section_less(document.read_text(), TO_COME))
        if not any((ROOT / start / name).exists() for start in FROM)
    ]
    assert not missing, "\n".join(missing)


def test_every_link_between_documents_leads_somewhere() -> None:
    missing = []
    for document in documents():
        for target in re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", document.read_text()):
            if "://" in target or target.startswith("mailto:"):
                continue
            if not (document.parent / target).exists():
                missing.append(f"{document.relative_to(ROOT)}: {target}")
    assert not missing, "\n".join(missing)


def test_every_document_is_reached_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    unreached = [
        str(d.relative_to(ROOT))
        for d in documents()
        if d.parent.name == "docs" and f"docs/{d.name}" not in readme
    ]
    assert not unreached, unreached


def test_the_glossary_defines_a_word_once() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text()
    words = re.findall(r"^\| \*\*(.+?)\*\* \|", text, re.MULTILINE)
    assert len(words) > 30
    assert len(words) == len(set(words))
