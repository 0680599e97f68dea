"""The Python blocks of the documentation that need a library."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```python\n(# needs (.*?)\n.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks_of(page: Path) -> list[tuple[int, str]]:
    """Those whose libraries are here, each with the line before its first."""
    text = page.read_text(encoding="utf-8")
    found = BLOCK.finditer(text)
    return [
        (text.count("\n", 0, block.start(1)), block.group(1))
        for block in found
        if all(find_spec(library) for library in block.group(2).split(", "))
    ]


PAGES = [page for page in sorted(DOCS.glob("*.md")) if blocks_of(page)]


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_the_blocks_of_a_page_that_need_a_library_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"DbWriter": __import__("onewriter").DbWriter, "__name__": "__docs__"}
    for line, block in blocks_of(page):
        # Blank lines in front, so that a traceback names the line of the page.
        exec(compile("\n" * line + block, str(page), "exec", dont_inherit=True), namespace)


def test_there_are_such_pages() -> None:
    assert len(PAGES) >= 4
