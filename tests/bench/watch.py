"""What a watch costs and how soon it tells: ``python tests/bench/watch.py [--quick]``, with the package on the path.

1. From the end of a job, before its COMMIT, to the new rows in the loop of another thread; and the same for a plain
   connection of another process, whose commits are looked for 20 times a second.
2. A thousand watches, of tasks, beside 10,000 writes a second: on the table that is written, and on another one.
3. A lone ``run`` without a watch, beside one on another table, and beside one on its own.
4. Bytecodes of each operation with no watch open: ``bytecodes.py``.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onewriter import AsyncDbWriter, DbWriter

SCHEMA = "CREATE TABLE t (id INTEGER PRIMARY KEY, k INTEGER, v); CREATE INDEX t_k ON t (k); CREATE TABLE other (v)"
INSERT = "INSERT INTO t (k, v) VALUES (?, ?)"
LAST = "SELECT v FROM t ORDER BY id DESC LIMIT 1"
WATCHES, RATE, SLICE = 1000, 10_000, 0.01  # SLICE: seconds between two portions of writes

STRANGER = """
import sqlite3, sys, time
connection = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=10)
connection.execute("PRAGMA synchronous = NORMAL")
for line in sys.stdin:
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("INSERT INTO t (k, v) VALUES (0, ?)", (time.monotonic(),))
    connection.execute("COMMIT")
"""


def told(what: str, seconds: list[float]) -> None:
    ordered = sorted(1000 * value for value in seconds)
    p50, p99 = statistics.median(ordered), ordered[int(0.99 * (len(ordered) - 1))]
    print(f"{what:58} p50 {p50:8.2f} ms   p99 {p99:8.2f} ms", flush=True)


def delays(db: DbWriter, count: int, commit: Callable[[], object]) -> list[float]:
    """Of a loop in a thread of its own, for ``count`` commits, each made when the one before was seen."""
    found: list[float] = []
    with db.watch(LAST, every=0) as live:
        live.next()
        for _ in range(count):
            waiter = threading.Thread(target=lambda: found.append(measure(live)))
            waiter.start()
            time.sleep(0.002 + random.random() / 20)  # the looks for others come every 50 ms
            commit()
            waiter.join()
    return found


def measure(live: Any) -> float:
    ((committed,),) = live.next(10)
    return time.monotonic() - float(committed)


def measure_delays(folder: Path, count: int) -> None:
    path = folder / "delays.db"
    with DbWriter(path, synchronous="NORMAL") as db:
        db.run_script(SCHEMA)
        told("commit of another thread, to its rows", delays(db, count, lambda: db.run(insert_the_time)))
        with subprocess.Popen([sys.executable, "-c", STRANGER, str(path)], stdin=subprocess.PIPE, text=True) as other:
            assert other.stdin is not None
            stdin = other.stdin

            def commit() -> None:
                stdin.write("go\n")
                stdin.flush()

            told("commit of another process, to its rows", delays(db, count // 4, commit))
            stdin.close()


def insert_the_time(tx: Any) -> None:
    tx.execute(INSERT, (0, time.monotonic()))


async def measure_many(folder: Path, query: str, watches: int, seconds: float, what: str) -> None:
    async with AsyncDbWriter(folder / f"many-{what}-{watches}.db", synchronous="NORMAL", maxsize=RATE) as db:
        await db.run_script(SCHEMA)
        given = [0]
        live = [asyncio.create_task(follow(db, query, number, given)) for number in range(watches)]
        while given[0] < watches:
            await asyncio.sleep(0.01)
        given[0], late = 0, []
        cpu, began = time.process_time(), time.monotonic()
        written = 0
        while (now := time.monotonic()) < began + seconds:
            due = int((now - began) * RATE)
            tickets = [db.enqueue(INSERT, (n % WATCHES, n)) for n in range(written, due)]
            written = due
            if tickets:
                await tickets[-1]
                late.append(time.monotonic() - now)
            await asyncio.sleep(max(0.0, SLICE - (time.monotonic() - now)))
        took = time.monotonic() - began
        cpu = time.process_time() - cpu
        print(
            f"{watches:5} watches on {what:17} {written / took:7,.0f} writes/s, {given[0] / took:7,.0f} results/s, "
            f"{100 * cpu / took:4.0f} % of a core",
            flush=True,
        )
        told("    100 writes at once, to the last COMMIT", late)
        for task in live:
            task.cancel()
        await asyncio.gather(*live, return_exceptions=True)


async def follow(db: AsyncDbWriter, query: str, number: int, given: list[int]) -> None:
    async with db.watch(query, (number,)) as live:
        async for _ in live:
            given[0] += 1


def measure_run(folder: Path, count: int) -> None:
    for what, query in {
        "no watch": None,
        "a watch on another table": "SELECT v FROM other",
        "one on its own": LAST,
    }.items():
        with DbWriter(folder / f"run-{what}.db", synchronous="NORMAL") as db:
            db.run_script(SCHEMA)
            took = []
            with db.watch(query or "SELECT 1", every=0.05) as live:
                if query is None:
                    live.close()
                reading = threading.Thread(target=lambda: [None for _ in live])
                reading.start()
                for n in range(count):
                    began = time.perf_counter()
                    db.run(INSERT, (n, n))
                    took.append(time.perf_counter() - began)
            reading.join()
            told(f"lone run, synchronous=NORMAL, {what}", took)


def main() -> None:
    parser = argparse.ArgumentParser(description="What a watch costs, and how soon it tells.")
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as name:
        folder, seconds = Path(name), 2.0 if quick else 10.0
        measure_delays(folder, 200 if quick else 1000)
        for watches in (0, WATCHES):
            for what, query in {
                "the written table": "SELECT count(*) FROM t WHERE k = ?",
                "another table": "SELECT count(*) FROM other WHERE v = ?",
            }.items():
                asyncio.run(measure_many(folder, query, watches, seconds, what))
        measure_run(folder, 2000 if quick else 20_000)
    subprocess.run([sys.executable, str(Path(__file__).with_name("bytecodes.py"))], check=True)


if __name__ == "__main__":
    main()
