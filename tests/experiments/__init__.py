"""Experiments that try to make the gateway lose, tear, repeat or hang something.

Each module has ``run(size, seed, folder) -> Outcome``; ``python tests/lab.py`` runs them all and prints one table, and
the tests run each with a small, fixed size.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

HANG = 60.0  # seconds; what takes longer hangs


@dataclass
class Outcome:
    """What an experiment saw. ``trials`` counts faults or histories; anything in ``findings`` is a fault of ours."""

    trials: int = 0
    acknowledged: int = 0
    lost: int = 0
    hung: int = 0
    corrupt: int = 0
    findings: list[str] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)

    @property
    def good(self) -> bool:
        return not (self.lost or self.hung or self.corrupt or self.findings)

    def find(self, text: str) -> None:
        self.findings.append(text)


def child(code: str, *arguments: object, prefix: tuple[str, ...] = ()) -> list[str]:
    """The command of a Python process that runs ``code``."""
    return [*prefix, sys.executable, "-c", code, *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


WRITES = "import sqlite3, sys; sqlite3.connect(sys.argv[1]).execute('PRAGMA user_version = 1')"


@functools.cache
def strace() -> str | None:
    """The tool, if it is here, may trace, and sees where SQLite writes: one that is built without HAVE_PWRITE moves
    there by a call of its own, and then writes.
    """
    found = shutil.which("strace")
    if found is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        prefix = (found, "-f", "-qq", "-o", str(log), "-e", "trace=pwrite64")
        probe = subprocess.run(child(WRITES, Path(folder) / "file", prefix=prefix), capture_output=True, timeout=HANG)
        return found if probe.returncode == 0 and "pwrite64(" in log.read_text() else None


def integrity(path: Path, outcome: Outcome, what: str) -> bool:
    """Count a damaged file."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        try:
            found = connection.execute("PRAGMA integrity_check").fetchall()
        except sqlite3.DatabaseError as error:
            found = [(str(error),)]
    if found == [("ok",)]:
        return True
    outcome.corrupt += 1
    outcome.find(f"{what}: integrity_check says {found[:3]}")
    return False
