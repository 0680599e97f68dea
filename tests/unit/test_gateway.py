"""DbWriter as an object, and what its calls refuse."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import inspect
import logging
import pickle
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from helpers import DEADLINE, attaching, eventually, in_threads, raises, state_of
from onewriter import AsyncDbWriter, DbWriter, Transaction, WriterClosedError
from onewriter.options import Options


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


def test_a_second_gateway_on_the_file_warns_and_works(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with DbWriter(path) as first, DbWriter(path) as second:
        first.run("CREATE TABLE t (n)")
        in_threads(*[lambda db=db: [db.run("INSERT INTO t VALUES (1)") for _ in range(50)] for db in (first, second)])
        assert first.read_value("SELECT count(*) FROM t") == 100
    assert [record.levelno for record in caplog.records if "another DbWriter" in record.getMessage()] == [
        logging.WARNING
    ]


def test_a_gateway_is_not_pickled(db: DbWriter) -> None:
    with pytest.raises(TypeError, match="pickle"):
        pickle.dumps(db)


def test_a_gateway_shows_its_state(path: Path) -> None:
    db = DbWriter(path, label="ledger")
    assert "ok" in repr(db)
    assert db.path == str(path)
    db.close()
    assert "closed" in repr(db)
    assert db.stats().as_dict()["committed"] == 0


def test_a_function_takes_no_parameters_however_empty(new_db: DbWriter) -> None:
    empty: list[Any] = [[], {}, None]
    for nothing in empty:
        with pytest.raises(TypeError, match="closure"):
            new_db.enqueue(lambda tx: None, nothing)  # type: ignore[call-overload]


def test_sql_must_be_text(any_db: DbWriter) -> None:
    calls: list[Any] = [
        lambda: any_db.run(b"SELECT 1"),  # type: ignore[call-overload]
        lambda: any_db.run_many(None, []),  # type: ignore[arg-type]
        lambda: any_db.run_script(3),  # type: ignore[arg-type]
        lambda: any_db.run_without_transaction(3),  # type: ignore[call-overload]
        lambda: any_db.enqueue(None),  # type: ignore[call-overload]
        lambda: any_db.run(lambda tx: tx.execute(3)),  # type: ignore[arg-type]
        lambda: any_db.run(lambda tx: tx.on_commit(3)),  # type: ignore[arg-type]
        lambda: any_db.run(lambda tx: 1, (1,)),  # type: ignore[call-overload]
        lambda: any_db.run("SELECT 1", label=3),  # type: ignore[call-overload]
        lambda: any_db.run("SELECT 1", timeout="3"),  # type: ignore[call-overload]
        lambda: any_db.run_script("SELECT 1", foreign_keys=0),  # type: ignore[arg-type]
        lambda: any_db.transaction(label=3),  # type: ignore[arg-type]
    ]
    for call in calls:
        with pytest.raises(TypeError):
            call()
    assert any_db.run("SELECT 1").rows == [(1,)]


def test_functions_that_only_make_something_to_run_are_refused(any_db: DbWriter) -> None:
    async def coroutine(tx: object) -> None:
        pass

    def generator(tx: object) -> Iterator[int]:
        yield 1

    async def both(tx: object) -> Any:
        yield 1

    class Callable:
        async def __call__(self, tx: object) -> None:
            pass

    for function in (coroutine, generator, both, Callable()):
        for call in (any_db.run, any_db.enqueue, any_db.read):
            with pytest.raises(TypeError, match="plain functions"):
                call(function)


def test_a_gateway_closed_before_is_no_second_gateway(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        with DbWriter(path) as db:
            db.run("CREATE TABLE IF NOT EXISTS t (n)")
    with contextlib.suppress(LookupError):
        DbWriter(path, on_connect=raises(LookupError()))
    DbWriter(path).close()
    assert caplog.records == []


def test_a_second_gateway_through_a_link_warns_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "link.db").symlink_to(tmp_path / "app.db")
    with DbWriter(tmp_path / "app.db"), DbWriter(tmp_path / "link.db"):
        pass
    assert len([record for record in caplog.records if "another DbWriter" in record.getMessage()]) == 1


@pytest.mark.parametrize("is_first", [False, True])
def test_a_second_gateway_on_an_attached_file_warns_too(
    path: Path, other: Path, caplog: pytest.LogCaptureFixture, is_first: bool
) -> None:
    with contextlib.ExitStack() as stack:
        for attaches in (is_first, not is_first):
            target, hook = (path, attaching(other)) if attaches else (other, None)
            stack.enter_context(DbWriter(target, on_connect=hook))
    assert [record.args[1] for record in caplog.records if "another DbWriter" in record.getMessage()] == [str(other)]  # type: ignore[index]


def test_the_defaults_are_the_same_for_threads_and_tasks() -> None:
    """``AsyncDbWriter`` takes those of ``Options``."""
    signature = inspect.signature(DbWriter).parameters
    options = {field.name: field.default for field in dataclasses.fields(Options)}
    assert {name: signature[name].default for name in options} == options


def test_a_function_reads_in_another_context_while_a_thread_waits_for_its_block(db: DbWriter) -> None:
    def function(tx: Transaction) -> list[Any]:
        waiting.append(pool.submit(db.transaction().__enter__))
        eventually(lambda: state_of(db).entering)

        def read() -> list[Any]:
            with db.reader():
                return db.read("SELECT 1")

        return contextvars.Context().run(read)

    waiting: list[Future[Any]] = []
    with ThreadPoolExecutor(1) as pool:
        assert db.run(function) == [(1,)]
        waiting[0].result(DEADLINE)


@pytest.mark.parametrize("value", [None, 0, ""])
def test_what_is_no_bool_is_not_taken_for_one(path: Path, value: Any) -> None:
    for name in ("inline", "auto_checkpoint", "foreign_keys"):
        with pytest.raises(TypeError, match=f"{name} must be a bool"):
            DbWriter(path, **{name: value})
