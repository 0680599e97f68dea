"""What messages say, and what is refused because it would be ignored without a word."""

from __future__ import annotations

import asyncio
import functools
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import DEADLINE, holding_lock, in_threads
from onewriter import AsyncDbWriter, DbWriter, Transaction, WriterClosedError, WriteTimeoutError

LONG = "INSERT INTO t VALUES (1) -- a text that is longer than sixty characters are"


@pytest.fixture
def db(any_db: DbWriter) -> DbWriter:
    any_db.run("CREATE TABLE t (n INTEGER PRIMARY KEY)")
    return any_db


def notes_of(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", ()))


def test_attempts_are_told_from_the_second_on(db: DbWriter, path: Path) -> None:
    db.run("INSERT INTO t VALUES (1)")
    with pytest.raises(sqlite3.IntegrityError) as caught:
        db.run("INSERT INTO t VALUES (1)")
    assert "job 'INSERT INTO t VALUES (1)' (called from test_words.py" in notes_of(caught.value)
    assert "attempts to get" not in notes_of(caught.value)
    with DbWriter(path, lock_timeout=0.05) as other, holding_lock(path):
        with pytest.raises(sqlite3.OperationalError) as busy:
            other.run("INSERT INTO t VALUES (2)")
        assert "attempts to get SQLite's lock: " in notes_of(busy.value)


@pytest.mark.parametrize(
    "run",
    [
        lambda db: db.run(LONG),
        lambda db: db.run_many(LONG, [()]),
        lambda db: db.run_script(LONG),
        lambda db: db.run_without_transaction(LONG),
    ],
)
def test_a_label_that_is_cut_says_so_in_messages(db: DbWriter, run: Callable[[DbWriter], object]) -> None:
    db.run("INSERT INTO t VALUES (1)")
    with pytest.raises(sqlite3.IntegrityError) as caught:
        run(db)
    assert f"{LONG[:60]}…' (called from" in notes_of(caught.value)


def test_a_label_itself_is_the_first_sixty_characters(db: DbWriter) -> None:
    assert db.enqueue(LONG).label == LONG[:60]
    assert "…" not in db.enqueue("SELECT 1").describe()
    assert db.enqueue("SELECT 1", label="x" * 70).describe().startswith(f"'{'x' * 70}' ")


@pytest.mark.parametrize(
    "run",
    [
        lambda db: db.run("VACUUM"),
        lambda db: db.run("vacuum -- now"),
        lambda db: db.run_script("VACUUM"),
        lambda db: db.run(lambda tx: tx.execute("VACUUM")),
        lambda db: db.enqueue("VACUUM").result(DEADLINE),
    ],
)
def test_vacuum_in_a_transaction_points_at_the_call_for_it(db: DbWriter, run: Callable[[DbWriter], object]) -> None:
    with pytest.raises(sqlite3.OperationalError) as caught:
        run(db)
    assert "use run_without_transaction" in notes_of(caught.value)
    db.run_without_transaction("VACUUM")


def in_a_block(db: DbWriter) -> None:
    with db.transaction():
        db.read("DELETE FROM t")


def in_a_reader(db: DbWriter) -> None:
    with db.reader() as connection:
        connection.execute("INSERT INTO t VALUES (1)")


@pytest.mark.parametrize(
    "read",
    [
        lambda db: db.read("INSERT INTO t VALUES (1)"),
        lambda db: db.read_one("INSERT INTO t VALUES (1) RETURNING n"),
        lambda db: db.read_value("CREATE TEMP TABLE x (n)"),
        lambda db: db.read(lambda connection: connection.execute("DELETE FROM t")),
        in_a_block,
        in_a_reader,
    ],
)
def test_a_read_that_would_write_points_at_run(db: DbWriter, read: Callable[[DbWriter], object]) -> None:
    with pytest.raises(sqlite3.OperationalError) as caught:
        read(db)
    assert notes_of(caught.value).count("use run") == 1


def test_a_closed_gateway_is_not_entered(path: Path) -> None:
    db = DbWriter(path)
    with db:
        pass
    with pytest.raises(WriterClosedError), db:
        pass

    async def enter(gateway: AsyncDbWriter) -> None:
        async with gateway:
            pass

    async def main() -> None:
        with pytest.raises(WriterClosedError):
            await enter(AsyncDbWriter.wrap(db))
        gateway = AsyncDbWriter(path)
        await enter(gateway)
        with pytest.raises(WriterClosedError):
            await enter(gateway)

    asyncio.run(main())


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


CONNECTIONS = ["row_factory", "text_factory", "isolation_level", "autocommit"]


@pytest.mark.parametrize("name", [*CONNECTIONS, "maxsize", "whatever"])
def test_what_a_gateway_or_transaction_would_ignore_is_refused(db: DbWriter, path: Path, name: str) -> None:
    def refuses(thing: object) -> None:
        with pytest.raises(AttributeError, match=name) as caught:
            setattr(thing, name, sqlite3.Row)
        if name in CONNECTIONS:
            assert "attribute of the connection" in str(caught.value)
        assert not hasattr(thing, name)

    refuses(db)
    db.run(refuses)
    with db.transaction() as tx:
        refuses(tx)

    async def main() -> None:
        async with AsyncDbWriter(path) as gateway, gateway.transaction() as tx:
            refuses(gateway)
            refuses(tx)

    asyncio.run(main())


def test_subclasses_have_attributes_of_their_own(path: Path) -> None:
    class Mine(DbWriter):
        def __init__(self, path: Path) -> None:
            self.name = "mine"
            super().__init__(path)

    with Mine(path) as db:
        assert db.name == "mine"
        with pytest.raises(AttributeError, match="argument of DbWriter"):
            db.row_factory = sqlite3.Row


def test_a_task_can_back_up_into_a_connection_of_its_thread(path: Path) -> None:
    async def main() -> None:
        target = sqlite3.connect(":memory:")
        async with AsyncDbWriter(path) as db:
            await db.run("CREATE TABLE t (n)")
            await db.run("INSERT INTO t VALUES (1)")
            await db.backup(target)
        assert target.execute("SELECT n FROM t").fetchall() == [(1,)]
        target.close()

    asyncio.run(main())


def test_a_setting_that_is_put_back_at_once_is_told(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with DbWriter(path, pragmas={"cache_size": -5000}) as db:
        for pragma in (
            "foreign_keys=OFF",
            "foreign_keys(0)",
            "main.synchronous = 1",
            "Synchronous=OFF",
            "cache_size=5",
        ):
            db.run_without_transaction(f"PRAGMA {pragma}")
            db.flush()
            assert "is put back at once" in caplog.text
            caplog.clear()
        assert db.run("PRAGMA cache_size").rows == [(-5000,)]
        assert db.run_without_transaction("PRAGMA foreign_keys").rows == [(1,)]
        for pragma in ("foreign_keys=ON", "synchronous=FULL", "cache_size=-5000", "user_version=7"):
            db.run_without_transaction(f"PRAGMA {pragma}")
        assert db.read_value("PRAGMA user_version") == 7
        db.flush()
        assert not caplog.records


def test_the_message_of_a_timeout_has_the_sign_of_a_cut_label(path: Path) -> None:
    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")
        with db.transaction(), pytest.raises(WriteTimeoutError, match="…' "):
            in_threads(lambda: db.run(LONG, timeout=0.01))


def test_a_transaction_is_made_without_a_dict(db: DbWriter) -> None:
    def look(tx: Transaction) -> bool:
        return hasattr(tx, "__dict__")

    assert not db.run(look)
