"""Every Python block of the README and of docs/ runs, page by page, as a reader would type it, and a second time."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from onewriter import DbWriter
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


def test_the_readme_says_when_not_to_use_it_before_what_it_guarantees() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    titles = ("Accepted ≠ committed ≠ durable", "## Try it", "## When not to use it", "## What it guarantees")
    assert [text.index(title) for title in titles] == sorted(text.index(title) for title in titles)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_is_short(page: Path) -> None:
    """What a command has printed, a block without a language, is not counted."""
    text = FENCED.sub(lambda block: "" if block[0].startswith("```\n") else block[0], page.read_text(encoding="utf-8"))
    assert len(text.split()) <= MOST_WORDS


def test_the_commands_of_the_pages_are_there(tmp_path: Path) -> None:
    """Those of onewriter that end by themselves run; of the others, the program is there."""
    with DbWriter(tmp_path / "app.db") as db:
        db.run("CREATE TABLE t (n)")
    commands = {line.split("#")[0].strip() for page in PAGES for line in shell_lines(page)}
    own = {command for command in commands if re.match(r"python -m onewriter (check|--version)", command)}
    assert len(own) == 2
    for command in own:
        arguments = [sys.executable, *shlex.split(command)[1:]]
        ran = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran
    programs = {name for command in commands for name in re.findall(r"python ((?:tests|docs)/\S+)", command)}
    assert programs
    assert [name for name in programs if not (ROOT / name).exists()] == []


def shell_lines(page: Path) -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


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
