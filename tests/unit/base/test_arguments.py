"""A callback that nobody would run is refused when it is given; a text of a subclass runs no code of its own."""

from __future__ import annotations

import asyncio
import enum
import functools
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from onewriter import AsyncDbWriter, DbWriter


@pytest.fixture
def db(any_db: DbWriter) -> DbWriter:
    any_db.run("CREATE TABLE t (n INTEGER PRIMARY KEY)")
    return any_db


async def coroutine(*_: Any) -> None: ...


async def async_generator(*_: Any) -> AsyncIterator[None]:
    yield


def generator(*_: Any) -> Iterator[None]:
    yield


class Awaited:
    async def __call__(self, *_: Any) -> None: ...


NOBODY_RUNS_IT = [coroutine, async_generator, generator, functools.partial(coroutine, 1), Awaited(), Awaited().__call__]


@pytest.mark.parametrize("callback", NOBODY_RUNS_IT)
@pytest.mark.filterwarnings("error")
def test_a_callback_that_nobody_would_run_is_refused(db: DbWriter, path: Path, callback: Any) -> None:
    with db.transaction() as tx:
        for keep in (tx.on_commit, tx.on_rollback):
            with pytest.raises(TypeError, match="async or generator function"):
                keep(callback)
    for hook in ("on_error", "on_event", "on_connect"):
        with pytest.raises(TypeError, match=f"{hook} .* is an async or generator function"):
            DbWriter(path, **{hook: callback})
    with pytest.raises(TypeError, match="async or generator function"):
        db.enqueue("SELECT 1").add_done_callback(callback)
    with pytest.raises(TypeError, match=r"progress .* is an async or generator function"):
        db.backup(path.with_name("copy.db"), progress=callback)
    assert not path.with_name("copy.db").exists()


def test_a_callback_of_a_task_that_nobody_would_run_is_refused(path: Path) -> None:
    async def main() -> None:
        async with AsyncDbWriter(path) as db, db.transaction() as tx:
            for keep in (tx.on_commit, tx.on_rollback):
                with pytest.raises(TypeError, match="async or generator function"):
                    keep(coroutine)

    asyncio.run(main())


class Factory:
    """A class: to call it makes an instance, and that is what a row factory does."""

    def __init__(self, cursor: sqlite3.Cursor, row: tuple[Any, ...]) -> None:
        self.row = row

    async def __call__(self) -> None: ...


def test_a_class_is_a_plain_function(path: Path) -> None:
    with DbWriter(path, row_factory=Factory) as db:
        assert db.read("SELECT 1")[0].row == (1,)


class Odd(str):
    """A text whose methods run code that nobody expects on the writer thread."""

    def _fail(self, *_: object) -> Any:
        raise LookupError("a method of the caller's text was called")

    __eq__ = __len__ = __bool__ = __getitem__ = __repr__ = __str__ = __format__ = __contains__ = _fail
    __hash__ = None  # type: ignore[assignment]
    startswith = lower = upper = _fail


class Word(str, enum.Enum):  # noqa: UP042 - a StrEnum is formatted as its text, and this as "Word.NAME"
    NORMAL = "NORMAL"
    TRUNCATE = "TRUNCATE"
    ROWS = "INSERT INTO t VALUES (1)"
    MEMORY = "MEMORY"
    NAME = "t"


@pytest.mark.parametrize("text", [Odd, str])
def test_texts_of_a_subclass_are_plain_ones_before_they_reach_the_writer(db: DbWriter, text: type[str]) -> None:
    insert, name = text("INSERT INTO t VALUES (?)"), text("a label")
    count = int(db.read_value("SELECT count(*) FROM t"))
    db.run(insert, (1,), label=name)
    db.enqueue(insert, (2,), label=name).result()
    db.run_many(insert, [(3,), (4,)], label=name)
    db.enqueue_many(insert, [(5,)]).result()
    db.run_script(text("INSERT INTO t VALUES (6)"), label=name)
    db.run_without_transaction(text("PRAGMA optimize"), label=name)
    db.run(lambda tx: [tx.execute(insert, (7,)), tx.executemany(insert, [(8,)])], label=name)
    db.run(lambda tx: tx.executescript(text("INSERT INTO t VALUES (9)")))
    db.run(lambda tx: tx.connection.execute(insert, (10,)).fetchall())
    db.migrate([text("INSERT INTO t VALUES (11)")])
    with db.transaction(label=name) as tx:
        tx.execute(insert, (12,))
    failed = db.enqueue(text("INSERT INTO none VALUES (1)"), label=name)
    assert failed.exception() is not None
    assert db.read(text("SELECT count(*) FROM t")) == [(count + 12,)]
    with db.watch(text("SELECT count(*) FROM t")) as live:
        assert live.next() == [(count + 12,)]
    assert db.health == "ok"
    assert type(failed.label) is str


@pytest.mark.parametrize("text", [Odd, str])
def test_texts_of_a_subclass_given_by_tasks_are_plain_ones_too(path: Path, text: type[str]) -> None:
    async def main() -> None:
        async with AsyncDbWriter(path) as db:
            insert, name = text("INSERT INTO t VALUES (?)"), text("a label")
            await db.run_script(text("CREATE TABLE t (n)"))
            await db.run(insert, (1,), label=name)
            await db.run_many(insert, [(2,)], label=name)
            async with db.transaction(label=name) as tx:
                await tx.execute(insert, (3,))
                await tx.executemany(insert, [(4,)])
                await tx.executescript(text("INSERT INTO t VALUES (5)"))
            async with db.reader() as reader:
                assert (await reader.execute(text("SELECT count(*) FROM t"))).rows == [(5,)]

    asyncio.run(main())


def test_options_may_be_members_of_an_enumeration_of_strings(path: Path) -> None:
    settings: Any = {"synchronous": Word.NORMAL, "journal_mode": Word.TRUNCATE, "label": Word.NAME}
    with DbWriter(path, pragmas={"temp_store": Word.MEMORY}, **settings) as db:
        db.run("CREATE TABLE t (n)")
        db.run(Word.ROWS)
        assert db.read("SELECT * FROM t") == [(1,)]
        assert db.run("PRAGMA journal_mode").fetchone() == ("truncate",)


LABELLED: list[Callable[[Any], object]] = [
    lambda db: db.run("SELECT 1", label=5),
    lambda db: db.run(lambda tx: None, label=5),
    lambda db: db.enqueue("SELECT 1", label=5),
    lambda db: db.run_many("SELECT ?", [(1,)], label=5),
    lambda db: db.enqueue_many("SELECT ?", [(1,)], label=5),
    lambda db: db.run_script("SELECT 1", label=5),
    lambda db: db.run_without_transaction("SELECT 1", label=5),
    lambda db: db.migrate(["SELECT 1"], label=5),
    lambda db: db.transaction(label=5),
    lambda db: db.read("SELECT 1", label=5),
    lambda db: db.read(lambda connection: None, label=5),
    lambda db: db.reader(label=5),
    lambda db: db.watch("SELECT 1", label=5),
]


@pytest.mark.parametrize("call", LABELLED)
def test_a_label_is_a_str(path: Path, call: Callable[[Any], object]) -> None:
    async def main() -> None:
        async with AsyncDbWriter(path) as db:
            with pytest.raises(TypeError, match="label must be a str"):
                call(db)

    with DbWriter(path) as db, pytest.raises(TypeError, match="label must be a str"):
        call(db)
    asyncio.run(main())
