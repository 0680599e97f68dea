"""Every Python block of the README and of docs/ runs, page by page, as a reader would type it."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import onewriter
from onewriter import (
    AsyncDbWriter,
    AsyncTransaction,
    AsyncWatch,
    CloseReport,
    DbWriter,
    Result,
    Stats,
    Ticket,
    Transaction,
    Watch,
    events,
)
from onewriter.base.tally import Latency

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks_of(page: Path) -> list[tuple[int, str]]:
    """The page's Python blocks, each with the line before its first."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, match.start(1)), match.group(1)) for match in BLOCK.finditer(text)]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)], ids=lambda page: page.name)
def test_the_python_blocks_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that begins with the name of a file is that file, for pytest; tests/libraries runs those with needs."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__docs__"}
    for line, block in blocks_of(page):
        if block.startswith("# needs "):
            continue
        if file := re.match(r"# (\w+\.py)\n", block):
            (tmp_path / file.group(1)).write_text(block, encoding="utf-8")
            continue
        # Blank lines in front, so that a traceback names the line of the page.
        exec(compile("\n" * line + block, str(page), "exec"), namespace)
    if list(tmp_path.glob("test_*.py")):
        ran = subprocess.run([sys.executable, "-m", "pytest", "-q"], capture_output=True, text=True, check=False)
        assert (ran.returncode, ran.stdout.splitlines()[-1].split(" in ")[0]) == (0, "1 passed"), ran.stdout


def test_the_readme_begins_with_a_quickstart() -> None:
    assert blocks_of(ROOT / "README.md")


def test_the_reference_has_every_public_name() -> None:
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    names = [name for name in onewriter.__all__ if f"`{name}" not in text and name not in text]
    kinds = (DbWriter, AsyncDbWriter, Transaction, AsyncTransaction, Ticket, Result, Stats, CloseReport, Latency)
    for kind in (*kinds, Watch, AsyncWatch):
        names += [f"{kind.__name__}.{name}" for name in vars(kind) if name[0] != "_" and not mentions(text, name)]
    arguments = inspect.signature(DbWriter).parameters
    names += [f"DbWriter({name})" for name in arguments if not mentions(text, name)]
    names += [name for name in vars(events) if name[0].isupper() and name in EVENTS and not mentions(text, name)]
    inner = {
        "belongs_to",
        "describe",
        "withdraw",
        "withdraw_quietly",
        "is_queued",
        "arrival",
        "wait",
        "run_callbacks",
        "outcome",
    }
    inner |= {"in_stats", "logs_failure", "created_at", "started_at", "ended_at", "work"}
    left = [name for name in names if name.partition(".")[2] not in inner]
    assert [name for name in left if not name.startswith("Transaction.") or public_in_transaction(name)] == []


EVENTS = {"JobSubmitted", "BatchEnded", "CheckpointEnded", "BackupEnded", "WriterBroken"}


def public_in_transaction(name: str) -> bool:
    documented = {
        "execute",
        "executemany",
        "executescript",
        "savepoint",
        "on_commit",
        "on_rollback",
        "connection",
        "label",
    }
    return name.removeprefix("Transaction.") in documented


def mentions(text: str, name: str) -> bool:
    return re.search(rf"\b{name}\b", text) is not None


def test_every_link_between_the_pages_leads_somewhere() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#\s]+)?(?:#[^)]*)?\)", text):
            if target and not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
