"""One process of the load: what it says of errors, and when it ends."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import DEADLINE
from onewriter.tools.load import is_locked


def test_a_locked_error_is_told_by_its_code() -> None:
    locked, other = sqlite3.OperationalError("locked?"), sqlite3.OperationalError("database is locked")
    locked.sqlite_errorcode = sqlite3.SQLITE_BUSY_SNAPSHOT
    other.sqlite_errorcode = sqlite3.SQLITE_FULL
    assert (is_locked(locked), is_locked(other), is_locked(None)) == (True, False, False)


@pytest.mark.parametrize("begin", [b"", b"!"])
def test_a_process_of_the_load_ends_with_its_parent(path: Path, begin: bytes) -> None:
    command = [sys.executable, "-m", "onewriter.tools.load", json.dumps({"path": str(path), "hold": 3600})]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert json.loads(child.stdout.readline()) == {"ready": True}
        child.stdin.write(begin)
        child.stdin.close()
        assert child.wait(DEADLINE) == 1


def test_a_process_of_the_load_whose_parent_has_gone_ends_without_a_word(path: Path) -> None:
    command = [sys.executable, "-m", "onewriter.tools.load", json.dumps({"path": str(path / "no folder"), "hold": 1})]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        assert (child.wait(DEADLINE), child.stderr.read()) == (1, "")
