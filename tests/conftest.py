"""Fixtures of all tests."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from onewriter import DbWriter

MEMORY = "/dev/shm"
ROOM = 2 << 30  # bytes


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--switch-interval", type=float, help="of the interpreter, in seconds: 1e-6 shakes threads up")


def pytest_configure(config: pytest.Config) -> None:
    if (seconds := config.getoption("--switch-interval")) is not None:
        sys.setswitchinterval(seconds)
    # There an fsync waits for no disk. TMPDIR names another place: .ci/run does so once, with one on a disk.
    if "TMPDIR" not in os.environ and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > ROOM:
        os.environ["TMPDIR"] = MEMORY
        tempfile.tempdir = None  # pytest has asked for it already


@pytest.fixture(scope="session", autouse=True)
def bytecode(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where no bytecode is to be written, it is not written there, but each child process does not compile all anew."""
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
        os.environ["PYTHONPYCACHEPREFIX"] = str(tmp_path_factory.mktemp("bytecode"))


@pytest.fixture
def no_collections() -> Iterator[None]:
    """The garbage collector runs when it is called, and not by itself."""
    thresholds = gc.get_threshold()
    gc.set_threshold(0)
    yield
    gc.set_threshold(*thresholds)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a test's database is to be."""
    return tmp_path / "app.db"


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Where another one is to be, to be attached."""
    return tmp_path / "other.db"


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that another user can reach, which tmp_path need not be."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture
def db(path: Path) -> Iterator[DbWriter]:
    """An open gateway of a new file."""
    with DbWriter(path) as gateway:
        yield gateway


@pytest.fixture(params=[False, True], ids=["thread", "inline"])
def any_db(path: Path, request: pytest.FixtureRequest) -> Iterator[DbWriter]:
    """An open gateway, with its writer thread and without: behaviour is the same."""
    with DbWriter(path, inline=request.param) as gateway:
        yield gateway


@pytest.fixture
def table_db(any_db: DbWriter) -> DbWriter:
    """An open gateway, with its writer thread and without, and a table ``t (n)``."""
    any_db.run("CREATE TABLE t (n UNIQUE)")
    return any_db


@pytest.fixture
def new_db(path: Path) -> Iterator[DbWriter]:
    """An open gateway of a new file, where a file of tests has another ``db``."""
    with DbWriter(path) as gateway:
        yield gateway


@pytest.fixture
def one(path: Path) -> Iterator[DbWriter]:
    """A gateway with a single connection to read, so that each read gets what the last one left."""
    with DbWriter(path, readers=1) as gateway:
        gateway.run("CREATE TABLE t (n INTEGER)")
        yield gateway


@pytest.fixture
def table(path: Path) -> Path:
    """A file with a table, which no gateway has opened."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE t (n INTEGER)")
    return path


FILL = "f = open({path!r}, 'r+b'); f.seek({page}); f.write(b'\\xff' * 4096)"


@pytest.fixture
def damaged(path: Path) -> Path:
    """A file with a table that is damaged, and one, ``t``, that is not."""
    with DbWriter(path) as db:
        db.run_script("CREATE TABLE bad (id INTEGER PRIMARY KEY, text); CREATE TABLE t (n)")
        db.run_many("INSERT INTO bad VALUES (NULL, ?)", [("x" * 400,)] * 500)
    subprocess.run([sys.executable, "-c", FILL.format(path=str(path), page=4096 * 20)], check=True)
    return path
