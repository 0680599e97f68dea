"""The ends of a gateway's life: closed, dropped, and private files, which close removes."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import (
    DEADLINE,
    child_code,
    drop_session,
    eventually,
    in_threads,
    parked,
    policy_of,
    raises,
    raising,
    rows_in,
    run_child,
)
from onewriter import AsyncDbWriter, DbWriter, Transaction, TransactionClosedError
from onewriter.core import Core


def test_a_gateway_that_is_dropped_without_close_warns_writes_what_it_accepted_and_ends_its_threads(
    table: Path,
) -> None:
    code = """
import gc, warnings

at_start = set(threading.enumerate())
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    db = DbWriter(path, label="ledger")
    db.read("SELECT * FROM t")
    for n in range(100):
        db.enqueue(INSERT, (n,))
    del db
    gc.collect()
    for thread in set(threading.enumerate()) - at_start:
        thread.join(30)
left = sorted(thread.name for thread in set(threading.enumerate()) - at_start)
told = [warning.category.__name__ for warning in caught]
print(json.dumps({"left": left, "told": told}))
"""
    child = run_child(child_code(table, code))
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout)
    assert found["left"] == []
    assert found["told"] == ["ResourceWarning"]
    assert rows_in(table) == list(range(100))


def test_a_ticket_of_a_dropped_gateway_still_gets_its_outcome(table: Path) -> None:
    code = """
import warnings

warnings.simplefilter("ignore", ResourceWarning)
db = DbWriter(path)
ticket = db.enqueue("INSERT INTO t VALUES (1) RETURNING n")
del db
print(ticket.result(timeout=30).rows)
"""
    child = run_child(child_code(table, code))
    assert child.returncode == 0, child.stderr
    assert child.stdout.strip() == "[(1,)]"


@pytest.mark.parametrize("name", [":memory:", ""])
def test_a_private_database_is_a_file_that_close_removes(name: str) -> None:
    with DbWriter(name) as db:
        file = Path(db.path)
        db.run("CREATE TABLE t (n INTEGER)")
        db.run("INSERT INTO t VALUES (1)")
        assert in_threads(*[lambda: db.read("SELECT n FROM t")] * 4) == [[(1,)]] * 4
        assert file.exists()
    assert not file.parent.exists()


def test_closing_says_what_it_withdrew_and_nothing_if_that_is_nothing(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    DbWriter(path).close(drain=False)
    assert caplog.messages == []
    db = DbWriter(path)
    with parked(db) as release:
        db.enqueue("SELECT 1").add_done_callback(lambda _: release.set())  # as soon as it is withdrawn
        report = db.close(drain=False)
    assert report.cancelled == 1
    assert [message for message in caplog.messages if "withdrew" in message] == ["app.db: close withdrew 1 queued jobs"]


@pytest.mark.parametrize("name", [":memory:", "", b":memory:", b""])
@pytest.mark.parametrize("inline", [False, True])
def test_a_private_database_that_cannot_be_opened_leaves_no_folder(
    name: Any, inline: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(LookupError):
        DbWriter(name, on_connect=raises(LookupError()), inline=inline)
    assert os.listdir(tmp_path) == []
    with DbWriter(name) as first, DbWriter(name) as second:
        first.run("CREATE TABLE t (n)")
        assert len(os.listdir(tmp_path)) == 2
        with pytest.raises(sqlite3.OperationalError, match="no such table"):
            second.read("SELECT * FROM t")
    assert os.listdir(tmp_path) == []


def test_a_private_database_whose_gateway_was_not_built_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("onewriter.core.check", raising(LookupError))
    with pytest.raises(LookupError):
        DbWriter(":memory:")
    assert os.listdir(tmp_path) == []


def test_a_file_that_somebody_has_open_in_wal_mode_is_not_opened_in_another(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("PRAGMA journal_mode = WAL")
        other.execute("CREATE TABLE t (n)")
        with pytest.raises(sqlite3.OperationalError, match="cannot open"):
            DbWriter(path, journal_mode="DELETE", lock_timeout=0.05)


def test_a_file_that_was_switched_from_wal_is_switched_back_as_soon_as_nobody_reads_it(path: Path) -> None:
    with DbWriter(path, lock_timeout=DEADLINE) as db:
        db.run("CREATE TABLE t (n)")
        drop_session(db)
        with contextlib.closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
            assert other.execute("PRAGMA journal_mode = DELETE").fetchone() == ("delete",)
            other.execute("BEGIN")
            other.execute("SELECT * FROM t").fetchall()
            ticket = db.enqueue("INSERT INTO t VALUES (1)")
            eventually(lambda: policy_of(db).attempts > 1)
            other.execute("ROLLBACK")
            ticket.result(DEADLINE)
        assert db.read_value("PRAGMA journal_mode") == "wal"


@pytest.mark.parametrize("kind", ["transaction", "savepoint"])
@pytest.mark.parametrize("inline", [False, True])
def test_close_waits_for_no_part_of_a_block_that_a_generator_keeps_behind_its_end(
    path: Path, kind: str, inline: bool
) -> None:
    def inside(tx: Transaction) -> Iterator[None]:
        with db.transaction() if kind == "transaction" else tx.savepoint():
            yield

    db = DbWriter(path, inline=inline)
    db.run("CREATE TABLE t (n)")
    with db.transaction() as tx:
        generator = inside(tx)
        next(generator)
    assert db.close().committed == 2  # without a timeout: it would be refused, if it waited for this thread
    with pytest.raises(TransactionClosedError):
        next(generator)


def test_no_interrupt_is_lost_as_a_closed_gateway_is_collected(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python discards what is raised in ``__del__``: nothing is called there that could be interrupted."""
    lost: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lost.append)
    monkeypatch.setattr(Core, "drop", raising(KeyboardInterrupt))

    async def main() -> None:
        async with AsyncDbWriter(path):
            pass

    DbWriter(path).close()
    asyncio.run(main())
    gc.collect()
    assert lost == []
