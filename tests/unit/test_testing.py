"""onewriter.testing: the fixture db_writer, as somebody else's tests use it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PLUGIN = 'pytest_plugins = ["onewriter.testing"]\n'


def outcome_of(folder: Path, code: str) -> tuple[int, str]:
    (folder / "conftest.py").write_text(PLUGIN)
    (folder / "test_theirs.py").write_text(code)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--strict-markers", str(folder)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=folder, env=environment)
    return found.returncode, found.stdout


def test_it_is_an_open_gateway_and_takes_options(tmp_path: Path) -> None:
    code, output = outcome_of(
        tmp_path,
        """
import sqlite3, threading
import pytest

def test_default(db_writer, tmp_path):
    db_writer.run("CREATE TABLE t (n)")
    assert db_writer.path == str(tmp_path / "test.db")
    assert db_writer.run(lambda tx: threading.get_ident()) != threading.get_ident()

@pytest.mark.db_writer(inline=True, foreign_keys=False)
def test_inline(db_writer):
    assert db_writer.run(lambda tx: threading.get_ident()) == threading.get_ident()
    assert db_writer.run("PRAGMA foreign_keys").rows == [(0,)]

def test_closed_by_the_test(db_writer):
    db_writer.close()

@pytest.mark.db_writer(lock_timeout=0.01)
def test_a_lock(db_writer):
    other = sqlite3.connect(db_writer.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(sqlite3.OperationalError):
        db_writer.run("CREATE TABLE t (n)")
    other.close()

@pytest.mark.db_writer(journal_mode="DELETE")
def test_without_a_log(db_writer):
    assert db_writer.journal_mode == "DELETE"
""",
    )
    assert (code, "5 passed" in output) == (0, True), output


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (
            'db_writer.run("CREATE TABLE p (n PRIMARY KEY)"); db_writer.run("CREATE TABLE c (n REFERENCES p)"); '
            'db_writer.run_without_transaction("PRAGMA foreign_keys = OFF"); other = sqlite3.connect(db_writer.path); '
            'other.execute("INSERT INTO c VALUES (1)"); other.commit(); other.close()',
            "rows refer to rows that do not exist",
        ),
        ("db_writer.enqueue(lambda tx: event.wait(60), label='stays'); wait(db_writer)", "still running at the end"),
    ],
)
def test_what_the_test_left_is_an_error(tmp_path: Path, body: str, why: str) -> None:
    code, output = outcome_of(
        tmp_path,
        f"""
import sqlite3, threading
import pytest
import onewriter.testing

event = threading.Event()
onewriter.testing.CLOSE_TIMEOUT = 0.05

def wait(db):
    while db.stats().running is None:
        pass

def test_it(db_writer):
    {body}

@pytest.fixture(scope="session", autouse=True)
def end():
    yield
    event.set()
""",
    )
    assert (code, "1 passed, 1 error" in output, why in output) == (1, True, True), output


def test_arguments_without_a_name_are_refused(tmp_path: Path) -> None:
    code, output = outcome_of(
        tmp_path, "import pytest\n@pytest.mark.db_writer(True)\ndef test_it(db_writer):\n    pass\n"
    )
    assert (code, "by name only" in output) == (1, True), output
