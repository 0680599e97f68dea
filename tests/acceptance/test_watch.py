"""Live queries across threads, tasks and processes: in order, nothing lost at the end, whoever is killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from aio_helpers import run
from helpers import DEADLINE, child_code, in_threads
from onewriter import AsyncDbWriter, DbWriter

COUNT = "SELECT count(*) FROM t"
WRITE_ON = """
with DbWriter(path) as db:
    print("open", flush=True)
    for n in range(1_000_000):
        db.run(INSERT, (n,))
"""
FOLLOW = """
with DbWriter(path) as db, db.watch("SELECT n FROM t ORDER BY n", every=0) as live:
    for rows in live:
        print(json.dumps([n for n, in rows]), flush=True)
        if len(rows) == 5:
            break
"""


@contextlib.contextmanager
def child(path: Path, code: str) -> Any:
    command = [sys.executable, "-c", child_code(path, code)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def in_order(counts: list[int]) -> bool:
    return counts == sorted(set(counts))


@pytest.mark.parametrize("inline", [False, True], ids=["thread", "inline"])
def test_a_writer_of_another_process_is_followed_until_it_is_killed(path: Path, inline: bool) -> None:
    with DbWriter(path, inline=inline) as db:
        db.run("CREATE TABLE t (n)")
        with db.watch(COUNT, every=0) as live, child(path, WRITE_ON) as other:
            counts = [live.next()[0][0]]
            while counts[-1] < 200:
                counts.append(live.next(DEADLINE)[0][0])
            other.send_signal(signal.SIGKILL)
            other.wait(DEADLINE)
            left = db.read_value(COUNT)
            while counts[-1] != left:
                counts.append(live.next(DEADLINE)[0][0])
            db.run("INSERT INTO t VALUES (-1)")
            counts.append(live.next(DEADLINE)[0][0])
            assert in_order(counts)
            assert counts[-1] == left + 1


def test_another_process_follows_this_one(path: Path) -> None:
    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")
        with child(path, FOLLOW) as other:
            got = [json.loads(other.stdout.readline())]
            for n in range(5):
                db.run("INSERT INTO t VALUES (?)", (n,))
                got.append(json.loads(other.stdout.readline()))
            assert got == [list(range(n)) for n in range(6)]
            assert other.wait(DEADLINE) == 0


def test_many_writers_and_many_watches_end_with_the_last_state(path: Path) -> None:
    """Of two gateways on one file, in threads and tasks; writers of all kinds."""
    watching = threading.Barrier(9)
    with DbWriter(path, synchronous="OFF") as db, DbWriter(path, synchronous="OFF", label="second") as second:
        db.run("CREATE TABLE t (n INTEGER)")

        def write(db: DbWriter) -> None:
            watching.wait(DEADLINE)
            for n in range(100):
                db.run("INSERT INTO t VALUES (?)", (n,))
                db.enqueue(lambda tx: tx.execute("INSERT INTO t VALUES (0)")).result(DEADLINE)
                with db.transaction() as tx:
                    tx.connection.execute("INSERT INTO t VALUES (1)")

        def follow(db: DbWriter, every: float) -> list[int]:
            counts = []
            with db.watch(COUNT, every=every) as live:
                counts.append(live.next()[0][0])
                watching.wait(DEADLINE)
                for ((count,),) in live:
                    counts.append(count)
                    if count == 1200:
                        return counts
            return counts

        def follow_in_a_task(db: DbWriter) -> list[int]:
            async def main() -> list[int]:
                counts = []
                async with AsyncDbWriter.wrap(db) as tasks, tasks.watch(COUNT, every=0.001) as live:
                    counts.append((await live.next())[0][0])
                    await asyncio.to_thread(watching.wait, DEADLINE)
                    async for ((count,),) in live:
                        counts.append(count)
                        if count == 1200:
                            break
                return counts

            return run(main)  # type: ignore[no-any-return]

        found = in_threads(
            *(lambda db=db: write(db) for db in (db, db, second, second)),
            lambda: follow(db, 0),
            lambda: follow(db, 0.01),
            lambda: follow(second, 0),
            lambda: follow_in_a_task(db),
            lambda: follow_in_a_task(second),
        )
        for counts in found[4:]:
            assert isinstance(counts, list)
            assert in_order(counts)
            assert (counts[0], counts[-1]) == (0, 1200)
