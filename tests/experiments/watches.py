"""Live queries while this gateway, another one and plain sqlite3 write, each of the last two in a process of its own.

Each writer counts in a row of its own, and in pairs. So whatever a watch gives must have risen, and its pairs agree.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from experiments import HANG, Outcome, child, environment, integrity
from onewriter import AsyncDbWriter, DbWriter

ROWS = "SELECT who, n FROM a ORDER BY who"
PAIRS = "SELECT a.n, b.n FROM a JOIN b USING (who) ORDER BY who"
WRITERS = 4  # threads of this gateway
GATEWAY, PLAIN = WRITERS, WRITERS + 1  # the rows of the two processes
BOTH = ("UPDATE a SET n = n + 1 WHERE who = ?", "UPDATE b SET n = n + 1 WHERE who = ?")
OTHER = f"""
import random, sqlite3, sys
from onewriter import DbWriter

path, who, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
chance = random.Random(seed)
if who == {GATEWAY}:
    db = DbWriter(path, slow_after=60)
    def both(fails):
        def job(tx):
            for sql in {BOTH!r}:
                tx.execute(sql, (who,))
            if fails:
                raise LookupError
        db.run(job, timeout=None)
else:
    plain = sqlite3.connect(path, isolation_level=None, timeout=60)
    def both(fails):
        plain.execute("BEGIN IMMEDIATE")
        for sql in {BOTH!r}:
            plain.execute(sql, (who,))
        plain.execute("ROLLBACK" if fails else "COMMIT")
for line in sys.stdin:
    for _ in range(int(line)):
        try:
            both(chance.random() < 0.2)
        except LookupError:
            pass
    print("done", flush=True)
"""


class Watcher:
    """What one live query has given. Threads: written by the one that watches, read by any."""

    def __init__(self, name: str, outcome: Outcome, as_pairs: bool) -> None:
        self.name, self.outcome, self.as_pairs = name, outcome, as_pairs
        self.last: list[Any] = []
        self.seen = self.ended = 0

    def take(self, rows: list[Any]) -> None:
        numbers = [row[1] for row in rows]
        if rows == self.last:
            self.outcome.find(f"{self.name}: the same rows twice in a row")
        if any(now < before for now, before in zip(numbers, [row[1] for row in self.last], strict=False)):
            self.outcome.find(f"{self.name}: {rows} after {self.last}")
        if self.as_pairs and any(a != b for a, b in rows):
            self.outcome.find(f"{self.name}: half a transaction: {rows}")
        self.last, self.seen = rows, self.seen + 1


def watch(db: DbWriter, watcher: Watcher, every: float, seed: int, what: Any) -> None:
    chance = random.Random(seed)
    with db.watch(what, every=every) as live:
        for rows in live:
            watcher.take(rows)
            if every and chance.random() < 0.1:  # a slow one gets the newest then
                time.sleep(0.01)
    watcher.ended = 1


def watch_as_task(db: DbWriter, watcher: Watcher) -> None:
    async def main() -> None:
        async with AsyncDbWriter.wrap(db).watch(ROWS, every=0.0) as live:
            async for rows in live:
                watcher.take(rows)

    asyncio.run(main())
    watcher.ended = 1


def burst(db: DbWriter, who: int, seed: int, count: int) -> None:
    """Writes of one thread, by several ways; some are undone."""
    chance = random.Random(seed)

    def both(tx: Any, fails: bool) -> None:
        for sql in BOTH:
            tx.execute(sql, (who,))
        if fails:
            raise LookupError

    for _ in range(count):
        fails = chance.random() < 0.2
        with contextlib.suppress(LookupError):
            way = chance.randrange(3)
            if way == 0:
                db.run(functools.partial(both, fails=fails), timeout=HANG)
            elif way == 1:
                with db.transaction(timeout=HANG) as tx:
                    both(tx, fails)
            else:
                db.enqueue(functools.partial(both, fails=False))


@contextlib.contextmanager
def others(path: Path, seed: int) -> Iterator[list[subprocess.Popen[str]]]:
    options: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(subprocess.Popen(child(OTHER, path, who, seed), env=environment(), **options))
            for who in (GATEWAY, PLAIN)
        ]


def start(function: Callable[..., object], *arguments: Any) -> threading.Thread:
    thread = threading.Thread(target=function, args=arguments, daemon=True)
    thread.start()
    return thread


def in_time(condition: Callable[[], object]) -> bool:
    until = time.monotonic() + HANG
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.001)
    return True


def run(size: int, seed: int, folder: Path) -> Outcome:
    """``size`` bursts, each followed by a pause in which every watch must come to the last state."""
    outcome, path, chance = Outcome(), folder / "app.db", random.Random(seed)
    with DbWriter(path, readers=3, slow_after=60) as db:
        db.run_script("CREATE TABLE a (who INTEGER PRIMARY KEY, n); CREATE TABLE b (who INTEGER PRIMARY KEY, n)")
        for table in "ab":
            db.run_many(f"INSERT INTO {table} VALUES (?, 0)", [(who,) for who in range(PLAIN + 1)])
        rows = [Watcher(name, outcome, False) for name in ("at once", "now and then", "a task")]
        pairs = [Watcher(name, outcome, True) for name in ("pairs", "a function")]
        threads = [
            start(watch, db, rows[0], 0.0, seed, ROWS),
            start(watch, db, rows[1], 0.02, seed, ROWS),
            start(watch_as_task, db, rows[2]),
            start(watch, db, pairs[0], 0.0, seed, PAIRS),
            start(watch, db, pairs[1], 0.01, seed, lambda connection: connection.execute(PAIRS).fetchall()),
        ]
        with others(path, seed) as processes:
            for number in range(size):
                writing = [
                    start(burst, db, who, seed * 10_000 + number * 10 + who, chance.randrange(8))
                    for who in range(WRITERS)
                    if chance.random() < 0.6
                ]
                told = [process for process in processes if chance.random() < 0.6]
                for process in told:
                    assert process.stdin is not None
                    process.stdin.write(f"{chance.randrange(1, 8)}\n")
                    process.stdin.flush()
                for process in told:
                    assert process.stdout is not None
                    process.stdout.readline()
                for thread in writing:
                    thread.join(HANG)
                db.flush()
                outcome.trials += 1
                _settled(path, [*rows, *pairs], outcome, f"burst {number}")
            for process in processes:
                process.communicate()
        outcome.acknowledged = db.read_value("SELECT sum(n) FROM a")
        report = db.close(HANG)
    for thread in threads:
        thread.join(HANG)
    for watcher in (*rows, *pairs):
        outcome.notes[watcher.name] = watcher.seen
        if not watcher.ended:
            outcome.hung += 1
            outcome.find(f"{watcher.name}: its loop did not end with the gateway: {report}")
    integrity(path, outcome, "watches")
    return outcome


def _has(watcher: Watcher, rows: list[Any]) -> bool:
    return watcher.last == rows


def _settled(path: Path, watchers: list[Watcher], outcome: Outcome, what: str) -> None:
    """Whether each has the last state."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        expected = {as_pairs: connection.execute(PAIRS if as_pairs else ROWS).fetchall() for as_pairs in (False, True)}
    for watcher in watchers:
        if not in_time(functools.partial(_has, watcher, expected[watcher.as_pairs])):
            outcome.find(f"{what}: {watcher.name} has {watcher.last}, not {expected[watcher.as_pairs]}")
