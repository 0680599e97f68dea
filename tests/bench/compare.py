"""Side by side: the gateway, plain sqlite3, and what others make of it. ``python tests/bench/compare.py --help``.

Contestants take turns within a round, and a figure is the median of the rounds. A ratio compares two figures of one
run; figures of two runs, or of two machines, say nothing about each other.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import importlib
import importlib.util
import json
import logging
import os
import platform
import queue
import sqlite3
import statistics
import sys
import tempfile
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

from onewriter import AsyncDbWriter, DbWriter, Transaction

CREATE = "CREATE TABLE t (id INTEGER PRIMARY KEY, n INTEGER, text TEXT)"
INSERT = "INSERT INTO t (n, text) VALUES (?, ?)"
SELECT = "SELECT * FROM t WHERE id = ?"
ROW = (1, "one row")
LITE_INSERT, LITE_ROW = "INSERT INTO t (n, text) VALUES (:n, :text)", {"n": 1, "text": "one row"}
Measure = Callable[[Path, str, int], float]  # folder, synchronous, how many → operations per second


def plain(folder: Path, synchronous: str) -> sqlite3.Connection:
    path = folder / "plain.db"
    new = not path.exists()
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute(f"PRAGMA synchronous = {synchronous}")
    if new:
        connection.execute(CREATE)
    return connection


@contextlib.contextmanager
def gateway(folder: Path, synchronous: Any, **options: Any) -> Iterator[DbWriter]:
    with DbWriter(folder / "gateway.db", synchronous=synchronous, **options) as db:
        db.run(CREATE)
        yield db


def timed(count: int, function: Callable[[], object]) -> float:
    gc.collect()
    began = perf_counter()
    function()
    return count / (perf_counter() - began)


def in_threads(threads: int, count: int, work: Callable[[int], object]) -> Callable[[], None]:
    def run() -> None:
        workers = [threading.Thread(target=work, args=(count // threads,)) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    return run


def raw_transaction(folder: Path, synchronous: str, count: int) -> float:
    with contextlib.closing(plain(folder, synchronous)) as connection:

        def work() -> None:
            connection.execute("BEGIN IMMEDIATE")
            for _ in range(count):
                connection.execute(INSERT, ROW)
            connection.execute("COMMIT")

        return timed(count, work)


def autocommit(folder: Path, synchronous: str, count: int) -> float:
    with contextlib.closing(plain(folder, synchronous)) as connection:
        return timed(count, lambda: [connection.execute(INSERT, ROW) and None for _ in range(count)])


def raw_block(folder: Path, synchronous: str, count: int) -> float:
    with contextlib.closing(plain(folder, synchronous)) as connection:

        def work() -> None:
            for _ in range(count):
                connection.execute("BEGIN IMMEDIATE")
                for _ in range(3):
                    connection.execute(INSERT, ROW)
                connection.execute("COMMIT")

        return timed(count, work)


def one_and_a_lock(threads: int) -> Measure:
    def measure(folder: Path, synchronous: str, count: int) -> float:
        lock = threading.Lock()
        with contextlib.closing(plain(folder, synchronous)) as connection:

            def work(each: int) -> None:
                for _ in range(each):
                    with lock:
                        connection.execute(INSERT, ROW)

            return timed(count, in_threads(threads, count, work))

    return measure


def connection_each(threads: int) -> Measure:
    def measure(folder: Path, synchronous: str, count: int) -> float:
        plain(folder, synchronous).close()

        def work(each: int) -> None:
            with contextlib.closing(plain(folder, synchronous)) as connection:
                connection.execute("PRAGMA busy_timeout = 60000")
                for _ in range(each):
                    connection.execute(INSERT, ROW)

        return timed(count, in_threads(threads, count, work))

    return measure


def run(threads: int, write: Callable[[DbWriter], object] = lambda db: db.run(INSERT, ROW)) -> Measure:
    def measure(folder: Path, synchronous: str, count: int) -> float:
        with gateway(folder, synchronous) as db:

            def work(each: int) -> None:
                for _ in range(each):
                    write(db)

            return timed(count, in_threads(threads, count, work))

    return measure


def insert(tx: Transaction) -> None:
    tx.execute(INSERT, ROW)


def enqueue(maxsize: int) -> Measure:
    def measure(folder: Path, synchronous: str, count: int) -> float:
        with gateway(folder, synchronous, maxsize=maxsize) as db:

            def work() -> None:
                for _ in range(count):
                    db.enqueue(INSERT, ROW)
                db.flush()

            return timed(count, work)

    return measure


def enqueue_function(folder: Path, synchronous: str, count: int) -> float:
    with gateway(folder, synchronous) as db:

        def work() -> None:
            for _ in range(count):
                db.enqueue(insert)
            db.flush()

        return timed(count, work)


def run_many(folder: Path, synchronous: str, count: int) -> float:
    rows = [ROW] * count
    with gateway(folder, synchronous) as db:
        return timed(count, lambda: db.run_many(INSERT, rows))


def block(folder: Path, synchronous: str, count: int) -> float:
    with gateway(folder, synchronous) as db:

        def work() -> None:
            for _ in range(count):
                with db.transaction() as tx:
                    for _ in range(3):
                        tx.execute(INSERT, ROW)

        return timed(count, work)


def await_run(tasks: int, *job: Any) -> Measure:
    def measure(folder: Path, synchronous: Any, count: int) -> float:
        async def task(db: AsyncDbWriter, each: int) -> None:
            for _ in range(each):
                await db.run(*job)

        async def work() -> float:
            async with AsyncDbWriter(folder / "gateway.db", synchronous=synchronous) as db:
                await db.run(CREATE)
                began = perf_counter()
                await asyncio.gather(*[task(db, count // tasks) for _ in range(tasks)])
                return count / (perf_counter() - began)

        return asyncio.run(work())

    return measure


@contextlib.contextmanager
def writing(write: Callable[[], object], is_on: bool) -> Iterator[None]:
    """Another thread writes a row every millisecond."""
    stop = threading.Event()

    def work() -> None:
        while not stop.wait(0.001):
            write()

    thread = threading.Thread(target=work)
    if is_on:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        if is_on:
            thread.join()


def bare_read(beside_writes: bool) -> Measure:
    def measure(folder: Path, synchronous: str, count: int) -> float:
        raw_transaction(folder, synchronous, 1000)
        with contextlib.ExitStack() as stack:
            connection, writer = (stack.enter_context(contextlib.closing(plain(folder, synchronous))) for _ in "12")
            stack.enter_context(writing(lambda: writer.execute(INSERT, ROW), beside_writes))
            return timed(
                count, lambda: [connection.execute(SELECT, (n % 1000,)).fetchall() and None for n in range(count)]
            )

    return measure


def read(beside_writes: bool) -> Measure:
    def measure(folder: Path, synchronous: str, count: int) -> float:
        with gateway(folder, synchronous) as db:
            db.run_many(INSERT, [ROW] * 1000)
            with writing(lambda: db.run(INSERT, ROW), beside_writes):
                return timed(count, lambda: [db.read(SELECT, (n % 1000,)) and None for n in range(count)])

    return measure


@contextlib.contextmanager
def peewee(folder: Path, synchronous: str) -> Iterator[Any]:
    from playhouse.sqliteq import SqliteQueueDatabase  # type: ignore[import-not-found,import-untyped,unused-ignore]

    pragmas = {"journal_mode": "wal", "synchronous": synchronous}
    db = SqliteQueueDatabase(str(folder / "peewee.db"), pragmas=pragmas, use_gevent=False)
    db.execute_sql(CREATE)
    try:
        yield db
    finally:
        db.stop()


def peewee_queue(folder: Path, synchronous: str, count: int) -> float:
    with peewee(folder, synchronous) as db:

        def work() -> None:
            for cursor in [db.execute_sql(INSERT, ROW) for _ in range(count)]:
                cursor._wait()

        return timed(count, work)


def peewee_waiting(folder: Path, synchronous: str, count: int) -> float:
    with peewee(folder, synchronous) as db:

        def work(each: int) -> None:
            for _ in range(each):
                db.execute_sql(INSERT, ROW)._wait()

        return timed(count, in_threads(16, count, work))


def aiosqlite_tasks(folder: Path, synchronous: str, count: int) -> float:
    import aiosqlite  # type: ignore[import-not-found,unused-ignore]

    async def work() -> float:
        async with aiosqlite.connect(folder / "aio.db", isolation_level=None) as connection:
            await connection.execute("PRAGMA journal_mode = WAL")
            await connection.execute(f"PRAGMA synchronous = {synchronous}")
            await connection.execute(CREATE)

            async def task(each: int) -> None:
                for _ in range(each):
                    await connection.execute(INSERT, ROW)

            began = perf_counter()
            await asyncio.gather(*[task(count // 64) for _ in range(64)])
            return count / (perf_counter() - began)

    return asyncio.run(work())


def litewriter_queue(folder: Path, synchronous: str, count: int) -> float:
    from litewriter import LiteWriter  # type: ignore[import-not-found,unused-ignore]

    with LiteWriter(folder / "lite.db", schema=CREATE, hz=0) as db:

        def job(tx: Any) -> None:
            tx.execute(LITE_INSERT, **LITE_ROW)

        def work() -> None:
            for _ in range(count):
                db.push(job)
            db.submit(job).result()

        return timed(count, work)


def litewriter_tasks(folder: Path, synchronous: str, count: int) -> float:
    from litewriter import LiteWriter  # type: ignore[import-not-found,unused-ignore]

    def job(tx: Any) -> None:
        tx.execute(LITE_INSERT, **LITE_ROW)

    async def work() -> float:
        async with LiteWriter(folder / "lite.db", schema=CREATE, hz=0) as db:

            async def task(each: int) -> None:
                for _ in range(each):
                    await db.write(job)

            began = perf_counter()
            await asyncio.gather(*[task(count // 64) for _ in range(64)])
            return count / (perf_counter() - began)

    return asyncio.run(work())


def datasette_tasks(folder: Path, synchronous: str, count: int) -> float:
    from datasette.app import Datasette  # type: ignore[import-not-found,unused-ignore]
    from datasette.database import Database  # type: ignore[import-not-found,unused-ignore]

    def prepare(connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(f"PRAGMA synchronous = {synchronous}")

    async def work() -> float:
        datasette = Datasette()
        db = datasette.add_database(Database(datasette, path=str(folder / "datasette.db"), is_mutable=True))
        await db.execute_write_fn(prepare)
        await db.execute_write(CREATE)

        async def task(each: int) -> None:
            for _ in range(each):
                await db.execute_write(INSERT, ROW)

        began = perf_counter()
        await asyncio.gather(*[task(count // 64) for _ in range(64)])
        return count / (perf_counter() - began)

    return asyncio.run(work())


def apsw_plain(folder: Path, synchronous: str) -> Any:
    apsw: Any = importlib.import_module("apsw")
    connection = apsw.Connection(str(folder / "apsw.db"))
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute(f"PRAGMA synchronous = {synchronous}")
    connection.execute(CREATE)
    return connection


def apsw_transaction(folder: Path, synchronous: str, count: int) -> float:
    with contextlib.closing(apsw_plain(folder, synchronous)) as connection:

        def work() -> None:
            with connection:
                for _ in range(count):
                    connection.execute(INSERT, ROW)

        return timed(count, work)


def apsw_and_a_lock(folder: Path, synchronous: str, count: int) -> float:
    lock = threading.Lock()
    with contextlib.closing(apsw_plain(folder, synchronous)) as connection:

        def work(each: int) -> None:
            for _ in range(each):
                with lock:
                    connection.execute(INSERT, ROW)

        return timed(count, in_threads(16, count, work))


def ping_pong(folder: Path, synchronous: str, count: int) -> float:
    """Two threads that wake each other, and do nothing else: what a write through another thread costs at least."""
    return hops(count, lambda: None)


def bare_hop(folder: Path, synchronous: str, count: int) -> float:
    """The same, and the other one writes a row."""
    with contextlib.closing(plain(folder, synchronous)) as connection:

        def write() -> None:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(INSERT, ROW)
            connection.execute("COMMIT")

        return hops(count, write)


def bare_queue(threads: int) -> Measure:
    """The least that a writer thread can do which shares commits: what Python itself allows. No errors, no time limits,
    no order but that of the queue.
    """

    def measure(folder: Path, synchronous: str, count: int) -> float:
        jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def write() -> None:
            while (taken := [jobs.get()]) != [None]:
                while not jobs.empty():
                    taken.append(jobs.get())
                connection.execute("BEGIN IMMEDIATE")
                for _ in taken:
                    connection.execute(INSERT, ROW)
                connection.execute("COMMIT")
                for wakeup in taken:
                    wakeup.release()

        def work(each: int) -> None:
            for _ in range(each):
                wakeup = threading.Lock()
                wakeup.acquire()
                jobs.put(wakeup)
                wakeup.acquire()

        with contextlib.closing(plain(folder, synchronous)) as connection:
            writer = threading.Thread(target=write)
            writer.start()
            try:
                return timed(count, in_threads(threads, count, work))
            finally:
                jobs.put(None)
                writer.join()

    return measure


def hops(count: int, write: Callable[[], None]) -> float:
    here, there = threading.Lock(), threading.Lock()
    here.acquire()
    there.acquire()

    def other() -> None:
        for _ in range(count):
            there.acquire()
            write()
            here.release()

    thread = threading.Thread(target=other)
    thread.start()

    def work() -> None:
        for _ in range(count):
            there.release()
            here.acquire()

    try:
        return timed(count, work)
    finally:
        thread.join()


# name, measure, operations at --scale 1, name of what it is compared with, needs
CONTESTANTS: list[tuple[str, Measure, int, str, str]] = [
    ("one raw transaction", raw_transaction, 100_000, "", ""),
    ("enqueue of SQL, maxsize 100,000", enqueue(100_000), 100_000, "one raw transaction", ""),
    ("enqueue of SQL", enqueue(10_000), 100_000, "one raw transaction", ""),
    ("enqueue of a function", enqueue_function, 30_000, "one raw transaction", ""),
    ("run_many", run_many, 100_000, "one raw transaction", ""),
    ("peewee's queue", peewee_queue, 3_000, "one raw transaction", "playhouse.sqliteq"),
    ("one raw transaction with APSW", apsw_transaction, 100_000, "one raw transaction", "apsw"),
    ("two threads that only wake each other", ping_pong, 5_000, "", ""),
    ("autocommit", autocommit, 2_000, "", ""),
    ("two threads that wake each other and write", bare_hop, 2_000, "autocommit", ""),
    ("run, 1 thread", run(1), 2_000, "autocommit", ""),
    ("a bare queue, 1 thread", bare_queue(1), 2_000, "run, 1 thread", ""),
    ("run of a function, 1 thread", run(1, lambda db: db.run(insert)), 2_000, "run, 1 thread", ""),
    ("BEGIN, 3 INSERTs, COMMIT", raw_block, 1_000, "", ""),
    ("transaction() with 3 INSERTs", block, 1_000, "BEGIN, 3 INSERTs, COMMIT", ""),
    ("one connection and a lock, 16 threads", one_and_a_lock(16), 2_000, "", ""),
    ("connection per thread, 16 threads", connection_each(16), 2_000, "one connection and a lock, 16 threads", ""),
    ("APSW and a lock, 16 threads", apsw_and_a_lock, 2_000, "one connection and a lock, 16 threads", "apsw"),
    ("run, 16 threads", run(16), 8_000, "one connection and a lock, 16 threads", ""),
    ("a bare queue, 16 threads", bare_queue(16), 8_000, "run, 16 threads", ""),
    ("peewee's queue, 16 threads that wait", peewee_waiting, 2_000, "run, 16 threads", "playhouse.sqliteq"),
    ("one connection and a lock, 64 threads", one_and_a_lock(64), 2_000, "", ""),
    ("run, 64 threads", run(64), 12_800, "one connection and a lock, 64 threads", ""),
    ("a bare queue, 64 threads", bare_queue(64), 12_800, "run, 64 threads", ""),
    ("aiosqlite, 64 tasks", aiosqlite_tasks, 3_200, "", "aiosqlite"),
    ("Datasette's write thread, 64 tasks", datasette_tasks, 1_280, "aiosqlite, 64 tasks", "datasette"),
    ("await run, 64 tasks", await_run(64, INSERT, ROW), 25_600, "aiosqlite, 64 tasks", ""),
    ("await run, 256 tasks", await_run(256, INSERT, ROW), 25_600, "aiosqlite, 64 tasks", ""),
    ("await run of a function, 64 tasks", await_run(64, insert), 12_800, "aiosqlite, 64 tasks", ""),
    ("litewriter, queued function", litewriter_queue, 30_000, "enqueue of a function", "litewriter"),
    ("litewriter, 64 tasks", litewriter_tasks, 12_800, "await run of a function, 64 tasks", "litewriter"),
    ("bare read of one row by key", bare_read(False), 20_000, "", ""),
    ("read of one row by key", read(False), 20_000, "bare read of one row by key", ""),
    ("bare read beside a writer", bare_read(True), 20_000, "", ""),
    ("read beside a writer", read(True), 20_000, "bare read beside a writer", ""),
]


def bytes_per_job() -> float:
    with tempfile.TemporaryDirectory() as folder, gateway(Path(folder), "OFF", maxsize=10**7) as db:
        release = threading.Event()
        db.enqueue(lambda tx: release.wait() and None)
        parameters = [(n, n + 1) for n in range(50_000)]
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        tickets = [db.enqueue(INSERT, parameter) for parameter in parameters]
        used = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        release.set()
        return used / len(tickets) + sys.getsizeof(parameters[0])


def cost_per_job(count: int) -> float:
    """Microseconds for each of ``count`` jobs that wait together."""
    with tempfile.TemporaryDirectory() as folder, gateway(Path(folder), "NORMAL", maxsize=10**7) as db:
        release = threading.Event()
        db.enqueue(lambda tx: release.wait() and None)
        began = perf_counter()
        for n in range(count):
            db.enqueue(INSERT, (n, "text"))
        release.set()
        db.flush()
        return (perf_counter() - began) / count * 1e6


def latencies(disturb: Callable[[DbWriter, threading.Event], object] | None, seconds: float) -> list[float]:
    """p50, p99 and the longest of ``run`` in milliseconds, while another thread disturbs."""
    with tempfile.TemporaryDirectory() as folder, gateway(Path(folder), "FULL") as db:
        stop = threading.Event()
        thread = threading.Thread(target=disturb, args=(db, stop)) if disturb else None
        if thread:
            thread.start()
        taken, end = [], perf_counter() + seconds
        while (began := perf_counter()) < end:
            db.run(INSERT, ROW)
            taken.append((perf_counter() - began) * 1e3)
        stop.set()
        if thread:
            thread.join()
    taken.sort()
    return [statistics.median(taken), taken[int(len(taken) * 0.99)], taken[-1]]


def beside_backups(rounds: int, megabytes: int = 50, writes: int = 200) -> tuple[float, float]:
    """p99 in milliseconds of 200 writes a second, alone and beside a backup; the median of interleaved rounds."""
    alone: list[float] = []
    beside: list[float] = []
    with tempfile.TemporaryDirectory() as folder, gateway(Path(folder), "FULL") as db:
        db.run_many(INSERT, [(n, "x" * 10_000) for n in range(megabytes * 100)])
        for _ in range(rounds):
            for found in (alone, beside):
                thread = threading.Thread(target=db.backup, args=[Path(folder) / "copy.db"])
                if found is beside:
                    thread.start()
                taken = []
                for _ in range(writes * 2):
                    began = perf_counter()
                    db.run(INSERT, ROW)
                    taken.append(perf_counter() - began)
                    sleep(max(0.0, 1 / writes - taken[-1]))
                if found is beside:
                    thread.join()
                    with contextlib.closing(sqlite3.connect(Path(folder) / "copy.db")) as copy:
                        assert copy.execute("PRAGMA integrity_check").fetchone() == ("ok",)
                taken.sort()
                found.append(taken[int(len(taken) * 0.99)] * 1e3)
    return statistics.median(alone), statistics.median(beside)


def flood(db: DbWriter, stop: threading.Event) -> None:
    while not stop.is_set():
        db.enqueue(INSERT, ROW)


def compute(db: DbWriter, stop: threading.Event) -> None:
    n = 0
    while not stop.is_set():
        n += 1


def fsync_ms(folder: Path) -> float:
    times = []
    with (folder / "sync").open("wb", buffering=0) as file:
        for _ in range(50):
            file.write(b"x" * 4096)
            began = perf_counter()
            os.fsync(file.fileno())
            times.append((perf_counter() - began) * 1e3)
    return statistics.median(times)


def is_here(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # of the package around it
        return False


def compare(synchronous: str, rounds: int, scale: float, only: str) -> dict[str, float]:
    taking_part = [
        (name, measure, count)
        for name, measure, count, _, needs in CONTESTANTS
        if only in name
        and (not needs or is_here(needs))
        and (synchronous == "NORMAL" or needs != "litewriter")  # which knows no other
    ]
    found: dict[str, list[float]] = {name: [] for name, _, _ in taking_part}
    for number in range(rounds):
        for name, measure, count in taking_part:
            if sys.stderr.isatty():
                print(
                    f"\r{synchronous}, round {number + 1} of {rounds}: {name:<50}", end="", file=sys.stderr, flush=True
                )
            with tempfile.TemporaryDirectory() as folder:
                found[name].append(measure(Path(folder), synchronous, max(64, int(count * scale))))
    if sys.stderr.isatty():
        print("\r" + " " * 90 + "\r", end="", file=sys.stderr)
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    logging.disable()  # full queues and slow jobs are what is measured
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of operations")
    parser.add_argument("--only", default="", help="contestants whose name has this in it")
    parser.add_argument("--quick", action="store_true", help="leave out memory, backlogs and latencies")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        disk = fsync_ms(Path(folder))
    print(f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}, {platform.system()}", end=", ")
    if importlib.util.find_spec("apsw"):
        print(f"APSW with SQLite {importlib.import_module('apsw').sqlite_lib_version()}", end=", ")
    print(f"{os.cpu_count()} cores, fsync {disk:.3f} ms; median of {arguments.rounds} rounds\n")
    figures: dict[str, Any] = {"python": platform.python_version(), "sqlite": sqlite3.sqlite_version, "fsync_ms": disk}
    absent = sorted({needs for *_, needs in CONTESTANTS if needs and not is_here(needs)})
    if absent:
        print(f"not in this environment, so not measured: {', '.join(absent)}\n")
    for synchronous in ("FULL", "NORMAL"):
        found = compare(synchronous, arguments.rounds, arguments.scale, arguments.only)
        figures[synchronous] = found
        print(f"{'synchronous=' + synchronous:<42}{'per second':>12}{'ratio':>8}  to")
        for name, _, _, base, _ in CONTESTANTS:
            if name in found:
                ratio = f"{found[name] / found[base]:8.2f}  {base}" if base in found else ""
                print(f"{name:<42}{found[name]:>12,.0f}{ratio}")
        print()
    if not arguments.quick:
        figures["bytes_per_job"] = bytes_per_job()
        print(f"memory of a queued statement with two small parameters: {figures['bytes_per_job']:.0f} bytes")
        costs = {count: cost_per_job(count) for count in (10_000, 100_000, int(1_000_000 * arguments.scale))}
        figures["microseconds_per_job"] = costs
        print("µs per job that waits with others: " + ", ".join(f"{n:,}: {cost:.2f}" for n, cost in costs.items()))
        disturbances = {"alone": None, "beside a flood of enqueue": flood, "beside a thread that computes": compute}
        for name, disturb in disturbances.items():
            p50, p99, longest = figures[name] = latencies(disturb, 3 * arguments.scale)
            print(f"run {name}: p50 {p50:.2f} ms, p99 {p99:.2f} ms, longest {longest:.1f} ms")
        alone, beside = figures["p99 beside a backup"] = beside_backups(arguments.rounds)
        print(f"200 writes a second: p99 {alone:.2f} ms alone, {beside:.2f} ms beside a backup of 50 MB")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
