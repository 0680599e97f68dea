"""The Python blocks of the documentation that need a library."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```python\n(# needs .*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [(page.name, block) for page in sorted(DOCS.glob("*.md")) for block in BLOCK.findall(page.read_text("utf-8"))]


@pytest.mark.parametrize(("page", "block"), BLOCKS, ids=[page for page, _ in BLOCKS])
def test_a_block_that_needs_a_library_runs(
    page: str, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(block, {"DbWriter": __import__("onewriter").DbWriter, "__name__": "__docs__"})


def test_there_are_such_blocks() -> None:
    assert BLOCKS
