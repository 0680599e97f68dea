"""A long run of everything at once: memory, descriptors, threads and the log stay as they are.

Threads, tasks and other processes write; blocks, readers and lent connections go from hand to hand; live queries are
opened, read and left; the schema's history and a backup are asked for again and again.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import sqlite3
import statistics
import subprocess
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic

from experiments import HANG, Outcome, child, environment, integrity
from onewriter import AsyncDbWriter, DbWriter

THREADS, TASKS, PROCESSES = 16, 64, 2  # processes beside this one
WATCHES = 8  # that stay; others come and go
ROWS = 2000
INSERT = "INSERT INTO t VALUES (?, ?)"
UPDATE = "UPDATE t SET text = ? WHERE id = ?"
WAL_LIMIT = 2**20
ADD = "UPDATE counter SET n = n + 1"
STEPS = ["CREATE TABLE t (id INTEGER PRIMARY KEY, text TEXT)", "CREATE TABLE counter (n INTEGER)"]
OTHER = """
import logging, sys, time
from onewriter import DbWriter
logging.disable()
with DbWriter(sys.argv[1], slow_after=60) as db:
    until, n = time.monotonic() + float(sys.argv[2]), 0
    while time.monotonic() < until:
        db.run("UPDATE counter SET n = n + 1", timeout=None)
        n += 1
        time.sleep(0.005)
print(n)
"""


def _threads() -> int:
    """Without the one that writes the log, which begins with its first line."""
    return sum(not thread.name.endswith("-log") for thread in threading.enumerate())


def _resident() -> int:
    """Bytes of memory."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _slope(places: list[float], values: list[float]) -> float:
    return statistics.linear_regression(places, values).slope if len(set(places)) > 1 else 0.0


def run(seconds: float, seed: int, folder: Path) -> Outcome:
    """Everything at once for ``seconds``; the first third is for warming up."""
    outcome, path = Outcome(), folder / "app.db"
    stop = threading.Event()
    added = [0] * (THREADS + 3)
    # Waits of run() in tenths of milliseconds, how many of each: of a thread, in the first half and in the second.
    # Counted, for a list of each would grow for as long as this lasts.
    waits = [(Counter[int](), Counter[int]()) for _ in range(THREADS)]
    errors: list[BaseException] = []
    with DbWriter(path, wal_limit=WAL_LIMIT, slow_after=60) as db:
        db.migrate(STEPS)
        db.run("INSERT INTO counter VALUES (0)")
        db.run_many(INSERT, [(n, "x" * 100) for n in range(ROWS)])

        def write(number: int) -> None:
            chance = random.Random(seed + number)
            try:
                while not stop.is_set():
                    asked = monotonic()
                    way = chance.random()
                    if way < 0.4:
                        for _ in range(20):
                            db.enqueue(UPDATE, ("y" * chance.randrange(200), chance.randrange(ROWS)))
                    elif way < 0.8:
                        db.run(ADD)
                        added[number] += 1
                        ended = monotonic()
                        waits[number][ended > middle][round((ended - asked) * 1e4)] += 1
                    elif way < 0.9:
                        with db.transaction() as tx:
                            tx.execute(ADD)
                        added[number] += 1
                    else:
                        db.read("SELECT * FROM t WHERE id BETWEEN ? AND ?", (number, number + 50))
            except BaseException as error:
                errors.append(error)

        def hands() -> None:
            """Blocks and readers that one thread enters, others use, and yet another leaves; lent connections."""
            chance, rounds = random.Random(seed), 0
            with ThreadPoolExecutor(3) as pool:
                while not stop.is_set():
                    rounds += 1
                    block = db.transaction()
                    tx = pool.submit(block.__enter__).result(HANG)
                    pool.submit(tx.execute, ADD).result(HANG)
                    lent = tx.connection
                    pool.submit(lent.execute, UPDATE, ("z", chance.randrange(ROWS))).result(HANG)
                    if chance.random() < 0.3:
                        pool.submit(lent.rollback).result(HANG)  # of what it has done itself
                    added[THREADS + 1] += 1
                    pool.submit(block.__exit__, None, None, None).result(HANG)
                    reader = db.reader()
                    connection = pool.submit(reader.__enter__).result(HANG)
                    cursor = pool.submit(connection.execute, "SELECT * FROM t LIMIT 20").result(HANG)
                    pool.submit(cursor.fetchmany, 5).result(HANG)
                    pool.submit(reader.__exit__, None, None, None).result(HANG)
                    dropped = db.transaction()
                    dropped.__enter__().execute(UPDATE, ("never", 0))
                    del dropped
                    if rounds % 50 == 0:
                        db.migrate(STEPS)
                        db.backup(folder / "backup.db")
                    stop.wait(0.02)

        def watch() -> None:
            """Live queries that come and go."""
            while not stop.is_set():
                with db.watch("SELECT n FROM counter", every=0.01) as live:
                    db.run(ADD)
                    added[THREADS + 2] += 1
                    last = -1
                    for _ in range(5):
                        ((n,),) = live.next(HANG)
                        assert n >= last, "an older state after a newer one"
                        last = n
                        db.run(ADD)
                        added[THREADS + 2] += 1
                stop.wait(0.02)

        def guarded(function: Callable[[], None]) -> Callable[[], None]:
            def call() -> None:
                try:
                    function()
                except BaseException as error:
                    errors.append(error)

            return call

        async def tasks() -> None:
            shared = AsyncDbWriter.wrap(db)

            async def task(number: int) -> None:
                while not stop.is_set():
                    await shared.run(ADD)
                    added[THREADS] += 1
                    await shared.read_value("SELECT text FROM t WHERE id = ?", (number,))
                    await asyncio.sleep(0.02)

            async def watching() -> None:
                async with shared.watch("SELECT count(*) FROM t WHERE text LIKE 'y%'") as live:
                    while not stop.is_set():
                        with contextlib.suppress(TimeoutError):
                            await live.next(0.5)

            async def streaming() -> None:
                while not stop.is_set():
                    async with shared.reader() as reader:
                        async for _ in reader.stream("SELECT * FROM t"):
                            break
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(0.002), shared.transaction() as tx:
                            await tx.execute(UPDATE, ("never", 1))
                            await asyncio.sleep(HANG)
                    await asyncio.sleep(0.05)

            others = [*[watching() for _ in range(WATCHES)], streaming(), streaming()]
            await asyncio.gather(*[task(number) for number in range(TASKS)], *others)

        threads = [threading.Thread(target=write, args=(number,)) for number in range(THREADS)]
        threads += [threading.Thread(target=guarded(work)) for work in (hands, watch, lambda: asyncio.run(tasks()))]
        others = [
            subprocess.Popen(child(OTHER, path, seconds), stdout=subprocess.PIPE, text=True, env=environment())
            for _ in range(PROCESSES)
        ]
        samples: list[tuple[float, float, int, int, int]] = []
        began = monotonic()
        middle = began + seconds / 2
        for thread in threads:
            thread.start()
        while (now := monotonic() - began) < seconds and not errors:
            if now > seconds / 3:
                gc.collect()
                stats = db.stats()
                descriptors = len(os.listdir("/proc/self/fd"))
                samples.append((stats.committed / 1e6, _resident(), descriptors, _threads(), stats.wal_bytes))
            stop.wait(min(1.0, seconds / 20))
        stop.set()
        for thread in threads:
            thread.join(HANG)
            outcome.hung += thread.is_alive()
        expected = sum(added) + sum(int(process.communicate(timeout=HANG)[0]) for process in others)
        outcome.trials = outcome.acknowledged = db.stats().committed
    for error in errors:
        outcome.find(f"an error: {error!r}")
    integrity(path, outcome, "soak")
    with contextlib.closing(sqlite3.connect(path)) as connection:
        found = connection.execute("SELECT n FROM counter").fetchone()[0]
    if found != expected:
        outcome.lost += abs(expected - found)
        outcome.find(f"the counter is {found}, not {expected}")
    jobs, memory = [sample[0] for sample in samples], [sample[1] for sample in samples]
    outcome.notes["jobs"] = outcome.trials
    outcome.notes["kB more per million jobs"] = round(_slope(jobs, memory) / 1024)
    outcome.notes["kB grown in all"] = round((memory[-1] - memory[0]) / 1024)
    outcome.notes["descriptors more"] = samples[-1][2] - samples[0][2]
    outcome.notes["threads more"] = samples[-1][3] - samples[0][3]
    outcome.notes["largest log, kB"] = max(sample[4] for sample in samples) // 1024
    for half, name in enumerate(("first", "second")):
        counted = sum((of[half] for of in waits), Counter[int]())
        if counted:
            outcome.notes[f"median of run, {name} half, µs"] = round(statistics.median(counted.elements()) * 100)
    # Tasks get another thread to read in when they first need it, which may be late.
    if outcome.notes["descriptors more"] > 4 or outcome.notes["threads more"] > 4:
        outcome.find(f"descriptors or threads grow: {dict(outcome.notes)}")
    if outcome.notes["kB grown in all"] > 40_000:
        outcome.find(f"memory grows: {dict(outcome.notes)}")
    if outcome.notes["largest log, kB"] > 20 * WAL_LIMIT // 1024:
        outcome.find(f"the log grows: {dict(outcome.notes)}")
    return outcome
