"""A callback that nobody would run is refused when it is given."""

from __future__ import annotations

import asyncio
import functools
import sqlite3
from collections.abc import AsyncIterator, Iterator
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
