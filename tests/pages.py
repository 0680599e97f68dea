"""The pages of the documentation, and their Python blocks as a reader would run them: from top to bottom, in a folder.

``python tests/pages.py [--libraries] [--twice] PAGE`` runs the blocks of one page in the current folder. A block that
begins with ``# needs NAME, …`` needs these packages; one that begins with ``# NAME.py`` is that file.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
DEADLINE = 120.0  # seconds


class Block(NamedTuple):
    """A Python block of a page; ``line`` is the number of lines before it, ``file`` its name if it is a file."""

    line: int
    text: str
    needs: tuple[str, ...]
    file: str | None


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    blocks = []
    for match in BLOCK.finditer(text):
        block = match.group(1)
        needs = re.match(r"# needs (.+)\n", block)
        file = re.match(r"(?:# needs .+\n)?# (\w+\.py)\n", block)
        names = tuple(needs.group(1).split(", ")) if needs else ()
        blocks.append(Block(text.count("\n", 0, match.start(1)), block, names, file and file.group(1)))
    return blocks


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def anchors_of(page: Path) -> list[str]:
    """The anchors that a renderer of Markdown makes of the headings, in order."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    return [re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in HEADING.findall(text)]


def run(page: Path, folder: Path, *options: str, warnings: str) -> None:
    command = [sys.executable, "-W", warnings, "-X", "utf8", __file__, *options, str(page)]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert ran.returncode == 0, f"{name_of(page)}:\n{ran.stdout}\n{ran.stderr}"


def _run(page: Path, with_libraries: bool) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    files = []
    for block in blocks_of(page):
        if block.needs and not (with_libraries and all(map(find_spec, block.needs))):
            continue
        if block.file is not None:
            Path(block.file).write_text(block.text, encoding="utf-8")
            files.append(block.file)
            continue
        # Blank lines in front, so that a traceback names the line of the page.
        exec(compile("\n" * block.line + block.text, str(page), "exec", dont_inherit=True), namespace)
    tests = [file for file in files if file.startswith("test_")]
    if tests:
        subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests], check=True)


if __name__ == "__main__":
    sys.path[0] = ""  # the folder, as for who types it, and not that of this file
    for _ in range(2 if "--twice" in sys.argv else 1):  # who starts a program again finds the files of the first time
        _run(Path(sys.argv[-1]), "--libraries" in sys.argv)
