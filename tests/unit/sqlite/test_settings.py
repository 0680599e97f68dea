"""The constructor's arguments: checked one by one, before anything is created."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import Any

import pytest

from onewriter import DbWriter
from onewriter.sqlite import settings
from onewriter.sqlite.settings import refuse_old_sqlite

WRONG_TYPES: dict[str, list[Any]] = {
    "readers": ["4", None, 4.0, True],
    "maxsize": ["4", None, 4.0, math.inf, True],
    "wal_limit": ["4", None, 4.5, False],
    "lock_timeout": ["1", None, True, [1]],
    "slow_after": ["1", None, False],
    "max_hold": ["1", None, True],
    "label": [3, b"label", Path("label")],
    "on_connect": [3, "hook", ()],
    "on_error": [3, "hook", ()],
    "row_factory": [3, "Row"],
    "detect_types": ["1", None, 1.0],
    "pragmas": [{"cache_size": None}, {"cache_size": b"1"}, {"cache_size": [1]}, {"cache_size": 1.5}, ["x"]],
    "foreign_keys": ["no"],
    "inline": [1],
    "auto_checkpoint": [0],
    "unknown": [1],
}

WRONG_VALUES: dict[str, list[Any]] = {
    "readers": [0, -1, 2**63],
    "maxsize": [0, -5],
    "wal_limit": [-1, 2**63],
    "lock_timeout": [-0.1, math.nan, -math.inf],
    "slow_after": [-1, math.nan],
    "max_hold": [-1, math.nan],
    "synchronous": ["full", "2", 2, None, ""],
    "journal_mode": ["wal", "OFF", "MEMORY", None, ""],
    "pragmas": [
        {"": 1},
        {"no such": 1},
        {"cache_size = 1; --": 1},
        {"main.cache_size": 1},
        {"no_such_pragma": 1},
        {"Foreign_Keys": 1},
        {"SYNCHRONOUS": "OFF"},
        {"journal_mode": "WAL"},
        {"busy_timeout": 5000},
        {"query_only": 1},
        {"locking_mode": "EXCLUSIVE"},
        {"wal_autocheckpoint": 1},
        {"journal_size_limit": 1},
        {"cache_size": "many"},
        {"recursive_triggers": 2},
    ],
}


def test_a_library_without_mutexes_is_refused() -> None:
    with pytest.raises(RuntimeError, match="SQLITE_THREADSAFE=0"):
        settings.refuse_unsafe_sqlite(0)
    settings.refuse_unsafe_sqlite(1)


def test_an_old_sqlite_is_refused_with_the_reason() -> None:
    with pytest.raises(RuntimeError, match="corrupt"):
        refuse_old_sqlite((3, 37, 1))
    refuse_old_sqlite((3, 37, 2))


@pytest.mark.parametrize("name", WRONG_TYPES)
def test_an_argument_of_a_wrong_type_is_named_and_no_file_is_made(path: Path, name: str) -> None:
    threads = set(threading.enumerate())
    for value in WRONG_TYPES[name]:
        with pytest.raises(TypeError, match=name):
            DbWriter(path, **{name: value})
    assert set(threading.enumerate()) <= threads
    assert not path.exists()


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_an_argument_of_a_wrong_value_is_refused_and_leaves_no_thread_and_no_lock(path: Path, name: str) -> None:
    threads = set(threading.enumerate())
    for value in WRONG_VALUES[name]:
        with pytest.raises(ValueError, match="." if name == "pragmas" else f"^{name} "):
            DbWriter(path, **{name: value})
    assert set(threading.enumerate()) <= threads
    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")


def test_arguments_at_the_edge_are_taken(path: Path) -> None:
    with DbWriter(
        path,
        readers=1,
        maxsize=1,
        wal_limit=0,
        lock_timeout=math.inf,
        slow_after=math.inf,
        max_hold=math.inf,
        pragmas={},
    ) as db:
        db.run("CREATE TABLE t (n)")
        assert db.read("SELECT * FROM t") == []
