"""Savepoints, nested blocks and jobs, in each other in any way: what fails is undone, as a whole and alone."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onewriter import AsyncDbWriter, DbWriter, Transaction

INSERT = "INSERT INTO t DEFAULT VALUES"


class FailError(Exception):
    pass


@dataclasses.dataclass(frozen=True)
class Write:
    """A row, by the transaction so many parts further out than the innermost, or, if there is none, by the gateway."""

    outwards: int


@dataclasses.dataclass(frozen=True)
class Keep:
    """A callback of each kind, by the transaction so many parts further out, or by the outermost one."""

    outwards: int


@dataclasses.dataclass(frozen=True)
class Part:
    """What has an end of its own, in which it all happens; if it fails, that is caught right around it."""

    kind: str
    steps: list[Any]
    fails: bool


STEPS = st.recursive(
    st.builds(Write, st.integers(0, 3)) | st.builds(Keep, st.integers(0, 3)),
    lambda step: st.builds(
        Part, st.sampled_from(["savepoint", "block", "job"]), st.lists(step, max_size=3), st.booleans()
    ),
    max_leaves=8,
)


class Story:
    """What happens, numbered; and which of it must be found at the end."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []
        self._number = 0

    def chosen(self, transactions: list[Any], step: Write | Keep) -> Any:
        return transactions[-1 - step.outwards] if step.outwards < len(transactions) else None

    def keep(self, transactions: list[Any], step: Keep) -> None:
        tx, self._number = self.chosen(transactions, step) or transactions[0], self._number + 1
        tx.on_commit(functools.partial(self.told.append, ("committed", self._number)))
        tx.on_rollback(functools.partial(self.told.append, ("rolled back", self._number)))


def expected(steps: list[Any]) -> tuple[int, list[tuple[str, int]]]:
    """How many rows there are then, and which callbacks were called: those of what was undone first."""
    number, rows = 0, 0
    undone: list[tuple[str, int]] = []
    kept: list[tuple[str, int]] = []

    def follow(steps: list[Any]) -> None:
        nonlocal number, rows
        for step in steps:
            if isinstance(step, Write):
                rows += 1
            elif isinstance(step, Keep):
                number += 1
                kept.append(("committed", number))
            else:
                before, begun = rows, len(kept)
                follow(step.steps)
                if step.fails:
                    rows = before
                    undone.extend(("rolled back", one) for _, one in kept[begun:])
                    del kept[begun:]

    follow(steps)
    return rows, [*undone, *kept]


def in_thread(db: DbWriter, story: Story, steps: list[Any], transactions: list[Any]) -> None:
    for step in steps:
        if isinstance(step, Keep):
            story.keep(transactions, step)
            continue
        if isinstance(step, Write):
            tx = story.chosen(transactions, step)
            db.run(INSERT) if tx is None else tx.execute(INSERT)
            continue
        with contextlib.suppress(FailError):
            if step.kind == "job":
                db.run(functools.partial(as_job, db, story, step))
                continue
            with db.transaction() if step.kind == "block" else transactions[-1].savepoint() as inner:
                in_thread(db, story, step.steps, [*transactions, inner or transactions[-1]])
                if step.fails:
                    raise FailError


def as_job(db: DbWriter, story: Story, step: Part, tx: Transaction) -> None:
    in_thread(db, story, step.steps, [tx])
    if step.fails:
        raise FailError


async def in_task(
    db: AsyncDbWriter, threads_db: DbWriter, story: Story, steps: list[Any], transactions: list[Any]
) -> None:
    for step in steps:
        if isinstance(step, Keep):
            story.keep(transactions, step)
            continue
        if isinstance(step, Write):
            tx = story.chosen(transactions, step)
            await (db.run(INSERT) if tx is None else tx.execute(INSERT))
            continue
        with contextlib.suppress(FailError):
            if step.kind == "job":
                await db.run(functools.partial(as_job, threads_db, story, step))
                continue
            async with db.transaction() if step.kind == "block" else transactions[-1].savepoint() as inner:
                await in_task(db, threads_db, story, step.steps, [*transactions, inner or transactions[-1]])
                if step.fails:
                    raise FailError


@pytest.mark.parametrize("way", ["block", "function", "task"])
def test_what_fails_inside_is_undone_alone(way: str) -> None:
    def block(db: DbWriter, story: Story, steps: list[Any]) -> None:
        with db.transaction() as tx:
            in_thread(db, story, steps, [tx])

    def function(db: DbWriter, story: Story, steps: list[Any]) -> None:
        db.run(lambda tx: in_thread(db, story, steps, [tx]))
        db.flush()  # its callbacks run behind it

    def task(db: DbWriter, story: Story, steps: list[Any]) -> None:
        async def main() -> None:
            async with AsyncDbWriter.wrap(db) as tasks_db, tasks_db.transaction() as tx:
                await in_task(tasks_db, db, story, steps, [tx])

        asyncio.run(main())

    act = {"block": block, "function": function, "task": task}[way]
    with tempfile.TemporaryDirectory() as folder, DbWriter(Path(folder) / "test.db", synchronous="OFF") as db:
        db.run("CREATE TABLE t (n INTEGER PRIMARY KEY)")

        @settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
        @given(st.lists(STEPS, max_size=4))
        def check(steps: list[Any]) -> None:
            db.run("DELETE FROM t")
            story = Story()
            act(db, story, steps)
            assert (db.read_value("SELECT count(*) FROM t"), story.told) == expected(steps)

        check()
