"""Blocks and readers as FastAPI's `yield` dependencies and as pytest's fixtures, with the real libraries.

FastAPI enters, uses and leaves a plain dependency in different threads of a pool, and serves others in them meanwhile.
"""

# Without `from __future__ import annotations`: FastAPI reads the annotations of functions that are made in a function.
import asyncio
import collections
import itertools
import os
import random
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from pathlib import Path
from time import monotonic
from typing import Annotated, Any

import httpx
import pytest
from fastapi import Depends, FastAPI, HTTPException

from helpers import DEADLINE
from onewriter import AsyncDbWriter, AsyncTransaction, DbWriter, Transaction

SECONDS = float(os.environ.get("FASTAPI_SECONDS", "2"))
CLIENTS = (
    16  # fewer than the threads of its pool: when all wait for their turn, nobody is left to end the one who has it
)
INSERT = "INSERT INTO t VALUES (?, ?)"
COUNT = "SELECT count(*) FROM t"


class RefusedError(Exception):
    pass


def application(db: DbWriter, shared: AsyncDbWriter) -> FastAPI:
    """Each route writes two rows of its number; ``?fails=1`` has it fail in between or at the end."""
    app = FastAPI()

    def block() -> Iterator[Transaction]:
        with db.transaction() as tx:
            yield tx

    def reader() -> Iterator[sqlite3.Connection]:
        with db.reader() as connection:
            yield connection

    async def tasks_block() -> AsyncIterator[AsyncTransaction]:
        async with shared.transaction() as tx:
            yield tx

    async def tasks_reader() -> AsyncIterator[Any]:
        async with shared.reader() as lent:
            yield lent

    function = {"scope": "function"}  # the dependency ends, and commits, before the answer goes out

    def in_block(n: int, tx: Annotated[Transaction, Depends(block, **function)], fails: bool = False) -> int:
        tx.execute(INSERT, (n, "block"))
        if fails:
            raise HTTPException(409)
        with tx.savepoint():
            tx.connection.execute(INSERT, (n, "block"))
        return n

    async def in_tasks_block(
        n: int, tx: Annotated[AsyncTransaction, Depends(tasks_block, **function)], fails: bool = False
    ) -> int:
        await tx.execute(INSERT, (n, "task"))
        await asyncio.sleep(0)
        if fails:
            raise HTTPException(409)
        await shared.run(INSERT, (n, "task"))  # in the block of its task
        return n

    def plain(n: int, fails: bool = False) -> int:
        def both(tx: Transaction) -> None:
            tx.execute(INSERT, (n, "plain"))
            if fails:
                raise HTTPException(409)
            tx.execute(INSERT, (n, "plain"))

        db.run(both)
        return n

    async def awaited(n: int, fails: bool = False) -> int:
        await shared.run_many(INSERT, [(n, "awaited"), (None if fails else n, "awaited")])
        return n

    def in_reader(
        n: int, connection: Annotated[sqlite3.Connection, Depends(reader, **function)], fails: bool = False
    ) -> int:
        before = connection.execute(COUNT).fetchone()
        db.run_many(INSERT, [(n, "reader"), (n, "reader")])
        assert connection.execute(COUNT).fetchone() == before
        if fails:
            raise RefusedError  # what it has written was a write of its own
        return n

    async def in_tasks_reader(
        n: int, lent: Annotated[Any, Depends(tasks_reader, **function)], fails: bool = False
    ) -> int:
        before = (await lent.execute(COUNT)).rows
        await shared.run_many(INSERT, [(n, "reader"), (n, "reader")])
        assert await shared.read(COUNT) == (await lent.execute(COUNT)).rows == before
        if fails:
            raise RefusedError
        return n

    views: dict[str, Callable[..., Any]] = {
        "/block/{n}": in_block,
        "/tasks/{n}": in_tasks_block,
        "/plain/{n}": plain,
        "/awaited/{n}": awaited,
        "/reader/{n}": in_reader,
        "/tasks_reader/{n}": in_tasks_reader,
    }
    for route, view in views.items():
        app.post(route)(view)  # not as decorators, which have no types where FastAPI is not installed
    return app


ROUTES = ("block", "tasks", "plain", "awaited", "reader", "tasks_reader")


async def load(app: FastAPI, seconds: float) -> tuple[set[int], set[int], set[int]]:
    """The numbers of the requests that were answered well, and of those that failed without and with a write."""
    numbers, choose = itertools.count(1), random.Random(1)
    good: set[int] = set()
    failed: dict[bool, set[int]] = {False: set(), True: set()}
    until = monotonic() + seconds

    async def client(http: httpx.AsyncClient) -> None:
        while monotonic() < until:
            n, route, fails = next(numbers), choose.choice(ROUTES), choose.random() < 0.3
            answer = await http.post(f"/{route}/{n}", params={"fails": fails}, timeout=DEADLINE)
            assert (answer.status_code == 200) is not fails, answer.text
            (failed["reader" in route] if fails else good).add(n)

    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        await asyncio.gather(*[client(http) for _ in range(CLIENTS)])
    return good, failed[False], failed[True]


def test_dependencies_that_hold_a_block_or_reader_lose_nothing_and_take_nobody_with_them(path: Path) -> None:
    async def main() -> tuple[set[int], set[int], set[int]]:
        with DbWriter(path, readers=CLIENTS) as db:
            db.run("CREATE TABLE t (n INTEGER NOT NULL, route TEXT)")
            shared = AsyncDbWriter.wrap(db)
            try:
                return await load(application(db, shared), SECONDS)
            finally:
                await shared.close()

    good, undone, kept = asyncio.run(main())
    with closing(sqlite3.connect(path)) as connection:
        found = collections.Counter(n for (n,) in connection.execute("SELECT n FROM t"))
    assert len(good) > 10 * SECONDS
    assert {n for n in good | kept if found[n] != 2} == set(), "acknowledged, and lost"
    assert {n for n in undone if found[n]} == set(), "failed, and written"


def test_a_plain_dependencys_block_is_left_though_its_client_is_gone(path: Path) -> None:
    async def main() -> None:
        with DbWriter(path) as db:
            db.run("CREATE TABLE t (n INTEGER NOT NULL, route TEXT)")
            shared = AsyncDbWriter.wrap(db)
            app = application(db, shared)
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
                for route in ROUTES:
                    request = asyncio.create_task(http.post(f"/{route}/1"))
                    for _ in range(3):
                        await asyncio.sleep(0)
                    request.cancel()
                    await asyncio.gather(request, return_exceptions=True)
                await shared.run(INSERT, (2, "after"), timeout=DEADLINE)
            await shared.close()
            found = collections.Counter(n for (n,) in db.read("SELECT n FROM t"))
        assert found.pop(2) == 1
        assert found.get(1, 0) % 2 == 0

    asyncio.run(main())


FIXTURES = """
import asyncio, sqlite3
import pytest, pytest_asyncio
from onewriter import AsyncDbWriter, DbWriter, WriteTimeoutError

@pytest.fixture(scope="session")
def db(tmp_path_factory):
    with DbWriter(tmp_path_factory.mktemp("db") / "app.db") as db:
        db.run("CREATE TABLE t (n)")
        yield db

@pytest.fixture
def undone(db):
    class Undo(Exception):
        pass
    try:
        with db.transaction() as tx:
            yield tx
            raise Undo
    except Undo:
        pass

@pytest.mark.parametrize("n", [1, 2])
def test_the_code_under_test_is_inside_the_fixtures_block(undone, db, n):
    db.run("INSERT INTO t VALUES (?)", (n,))
    undone.execute("INSERT INTO t VALUES (?)", (n,))
    assert db.read("SELECT n FROM t") == [(n,), (n,)]

@pytest_asyncio.fixture
async def shared(tmp_path):
    async with AsyncDbWriter(tmp_path / "app.db") as shared:
        await shared.run("CREATE TABLE t (n)")
        yield shared

@pytest_asyncio.fixture
async def tx(shared):
    async with shared.transaction() as tx:
        yield tx
    assert await shared.read_value("SELECT count(*) FROM t") == 1

@pytest_asyncio.fixture
async def reader(shared):
    async with shared.reader() as reader:
        yield reader

@pytest.mark.asyncio
async def test_a_task_uses_the_block_that_a_fixture_holds(shared, tx):
    await tx.execute("INSERT INTO t VALUES (1)")
    assert await shared.read_value("SELECT count(*) FROM t") == 0
    with pytest.raises(WriteTimeoutError, match="transaction"):
        await shared.run("INSERT INTO t VALUES (2)", timeout=0.0)

@pytest.mark.asyncio
async def test_a_task_uses_the_reader_that_a_fixture_holds(shared, reader):
    await shared.run("INSERT INTO t VALUES (1)")
    assert (await reader.execute("SELECT count(*) FROM t")).rows == [(0,)]
    assert await shared.read_value("SELECT count(*) FROM t") == 1
"""


@pytest.mark.parametrize("scope", ["function", "session"])
def test_fixtures_that_hold_a_block_or_a_reader_work(tmp_path: Path, scope: str) -> None:
    """``scope``: whether they and the test have a loop together."""
    (tmp_path / "test_app.py").write_text(FIXTURES)
    command = [sys.executable, "-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_app.py"]
    for name in ("fixture", "test"):
        command += ["-o", f"asyncio_default_{name}_loop_scope={scope}"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    found = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=4 * DEADLINE, check=False
    )
    assert "4 passed" in found.stdout, found.stdout + found.stderr
