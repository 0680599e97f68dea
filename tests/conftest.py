"""Fixtures of all tests."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from onewriter import DbWriter


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a test's database is to be."""
    return tmp_path / "app.db"


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
