"""A long run: threads, tasks and processes; memory, descriptors, threads and the log stay as they are."""

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
from pathlib import Path
from time import monotonic

from experiments import HANG, Outcome, child, environment, integrity
from onewriter import AsyncDbWriter, DbWriter

THREADS, TASKS, PROCESSES = 16, 64, 2  # processes beside this one
ROWS = 2000
INSERT = "INSERT INTO t VALUES (?, ?)"
UPDATE = "UPDATE t SET text = ? WHERE id = ?"
WAL_LIMIT = 2**20
OTHER = """
import sys, time
from onewriter import DbWriter
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
    added = [0] * (THREADS + 1)
    # Waits of run() in tenths of milliseconds, how many of each: of a thread, in the first half and in the second.
    # Counted, for a list of each would grow for as long as this lasts.
    waits = [(Counter[int](), Counter[int]()) for _ in range(THREADS)]
    errors: list[BaseException] = []
    with DbWriter(path, wal_limit=WAL_LIMIT, slow_after=60) as db:
        db.run("CREATE TABLE t (id INTEGER PRIMARY KEY, text TEXT)")
        db.run("CREATE TABLE counter (n INTEGER)")
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
                        db.run("UPDATE counter SET n = n + 1")
                        added[number] += 1
                        ended = monotonic()
                        waits[number][ended > middle][round((ended - asked) * 1e4)] += 1
                    elif way < 0.9:
                        with db.transaction() as tx:
                            tx.execute("UPDATE counter SET n = n + 1")
                        added[number] += 1
                    else:
                        db.read("SELECT * FROM t WHERE id BETWEEN ? AND ?", (number, number + 50))
            except BaseException as error:
                errors.append(error)

        async def tasks() -> None:
            shared = AsyncDbWriter.wrap(db)

            async def task(number: int) -> None:
                while not stop.is_set():
                    await shared.run("UPDATE counter SET n = n + 1")
                    added[THREADS] += 1
                    await shared.read_value("SELECT text FROM t WHERE id = ?", (number,))
                    await asyncio.sleep(0.02)

            await asyncio.gather(*[task(number) for number in range(TASKS)])

        def loop() -> None:
            try:
                asyncio.run(tasks())
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=write, args=(number,)) for number in range(THREADS)]
        threads.append(threading.Thread(target=loop))
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
