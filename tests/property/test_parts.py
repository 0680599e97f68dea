"""Savepoints and nested blocks, in each other in any way: what fails is undone, as a whole and alone."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onewriter import AsyncDbWriter, DbWriter

INSERT = "INSERT INTO t DEFAULT VALUES"


class FailError(Exception):
    pass


@dataclasses.dataclass(frozen=True)
class Write:
    """A row, by the transaction so many parts further out than the innermost, or, if there is none, by the gateway."""

    outwards: int


@dataclasses.dataclass(frozen=True)
class Part:
    """A savepoint or a nested block, in which it all happens; if it fails, that is caught right around it."""

    is_nested: bool
    steps: list[Any]
    fails: bool


STEPS = st.recursive(
    st.builds(Write, st.integers(0, 3)),
    lambda step: st.builds(Part, st.booleans(), st.lists(step, max_size=3), st.booleans()),
    max_leaves=8,
)


def rows_of(steps: list[Any]) -> int:
    return sum(1 if isinstance(step, Write) else 0 if step.fails else rows_of(step.steps) for step in steps)


def chosen(transactions: list[Any], step: Write) -> Any:
    return transactions[-1 - step.outwards] if step.outwards < len(transactions) else None


def in_thread(db: DbWriter, steps: list[Any], transactions: list[Any]) -> None:
    for step in steps:
        if isinstance(step, Write):
            tx = chosen(transactions, step)
            db.run(INSERT) if tx is None else tx.execute(INSERT)
            continue
        part = db.transaction() if step.is_nested else transactions[-1].savepoint()
        with contextlib.suppress(FailError), part as inner:
            in_thread(db, step.steps, [*transactions, inner or transactions[-1]])
            if step.fails:
                raise FailError


async def in_task(db: AsyncDbWriter, steps: list[Any], transactions: list[Any]) -> None:
    for step in steps:
        if isinstance(step, Write):
            tx = chosen(transactions, step)
            await (db.run(INSERT) if tx is None else tx.execute(INSERT))
            continue
        part = db.transaction() if step.is_nested else transactions[-1].savepoint()
        with contextlib.suppress(FailError):
            async with part as inner:
                await in_task(db, step.steps, [*transactions, inner or transactions[-1]])
                if step.fails:
                    raise FailError


@pytest.mark.parametrize("way", ["block", "function", "task"])
def test_what_fails_inside_is_undone_alone(way: str) -> None:
    def block(db: DbWriter, steps: list[Any]) -> None:
        with db.transaction() as tx:
            in_thread(db, steps, [tx])

    def function(db: DbWriter, steps: list[Any]) -> None:
        db.run(lambda tx: in_thread(db, steps, [tx]))

    def task(db: DbWriter, steps: list[Any]) -> None:
        async def main() -> None:
            async with AsyncDbWriter.wrap(db) as tasks_db, tasks_db.transaction() as tx:
                await in_task(tasks_db, steps, [tx])

        asyncio.run(main())

    act = {"block": block, "function": function, "task": task}[way]
    with tempfile.TemporaryDirectory() as folder, DbWriter(Path(folder) / "test.db", synchronous="OFF") as db:
        db.run("CREATE TABLE t (n INTEGER PRIMARY KEY)")

        @settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
        @given(st.lists(STEPS, max_size=4))
        def check(steps: list[Any]) -> None:
            db.run("DELETE FROM t")
            act(db, steps)
            assert db.read_value("SELECT count(*) FROM t") == rows_of(steps)

        check()
