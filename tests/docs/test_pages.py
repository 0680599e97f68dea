"""Every Python block of the README and of docs/ runs, page by page, as a reader would type it, and a second time."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pages import FENCED, PAGES, ROOT, anchors_of, blocks_of, name_of, run

MOST_WORDS = 1200


WITHOUT_LIBRARIES = [page for page in PAGES if any(not block.needs for block in blocks_of(page))]


@pytest.mark.parametrize("page", WITHOUT_LIBRARIES, ids=name_of)
def test_the_python_blocks_of_a_page_run_and_run_again(page: Path, tmp_path: Path) -> None:
    """Those that need no library; tests/libraries runs the pages that do."""
    run(page, tmp_path, "--twice", warnings="error")


def test_the_readme_begins_with_a_quickstart_of_twelve_lines() -> None:
    (block, *_) = blocks_of(ROOT / "README.md")
    assert len(block.text.splitlines()) <= 12


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_is_short(page: Path) -> None:
    """What a command has printed, a block without a language, is not counted."""
    text = FENCED.sub(lambda block: "" if block[0].startswith("```\n") else block[0], page.read_text(encoding="utf-8"))
    assert len(text.split()) <= MOST_WORDS


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_between_the_pages_leads_somewhere(page: Path) -> None:
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", text):
        if target.startswith("http"):
            continue
        other = page.parent / target if target else page
        assert other.exists(), target
        assert not anchor or anchor in anchors_of(other), f"{target}#{anchor}"


def test_every_page_is_in_the_readme_or_in_a_page_that_is() -> None:
    texts = {page: page.read_text(encoding="utf-8") for page in PAGES}
    linked = {ROOT / "README.md"}
    to_do = list(linked)
    while to_do:
        page = to_do.pop()
        for target in re.findall(r"\]\(([^)#\s]+\.md)(?:#[^)]*)?\)", texts[page]):
            other = (page.parent / target).resolve()
            if other in texts and other not in linked:
                linked.add(other)
                to_do.append(other)
    assert [name_of(page) for page in PAGES if page not in linked] == []
