"""How large things may be before a promise fails or a cost grows: ``python tests/bench/limits.py [--quick]``.

Each size of each row runs in a process of its own, for at most five minutes, and checks what was promised: that all
rows are there, in order, that nobody was refused, and that the gateway goes on afterwards. ``CPU of one`` is the time
that all threads together use on a processor for one job, row, reader and so on; where it is more than twice that of a
smaller size, also when it is tried again, the line says so. Times in the last column are those of a clock.

The database of 50 GB is made of free pages, as after a large DELETE: the file is valid, and has holes where they are.
"""

from __future__ import annotations

import argparse
import array
import asyncio
import contextlib
import functools
import json
import logging
import math
import os
import platform
import resource
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import monotonic, perf_counter, process_time
from typing import Any, NamedTuple

from onewriter import AsyncDbWriter, DbWriter, QueueFullError, Transaction

TIME_LIMIT = 300.0  # seconds for one size of one row
SLOW = 2.0  # times the cost of one at a smaller size
KB, MB, GB = 1_000, 1_000_000, 1_000_000_000
CREATE = "CREATE TABLE t (id INTEGER PRIMARY KEY, n)"
INSERT = "INSERT INTO t (n) VALUES (?)"
INSERT_A_MB = "INSERT INTO t (n) VALUES (zeroblob(999000))"
IN_ORDER = "SELECT count(*), sum(id = n + 1) FROM t"
LENGTH_LIMIT = GB  # https://www.sqlite.org/limits.html: of a string, BLOB or row
PAGE = 4096
COPY = 10.0  # seconds after which a copy is given up
LOCK_BYTE = 2**30  # SQLite uses no page there


class Found(NamedTuple):
    """What was measured.

    Attributes:
        seconds: of a processor, for one.
        besides: other figures.
    """

    seconds: float
    besides: str = ""


class NotTriedError(Exception):
    """This machine has no room for it."""


def check(is_so: bool, promise: str) -> None:
    if not is_so:
        raise AssertionError(promise)


@contextlib.contextmanager
def gateway(folder: Path, **options: Any) -> Iterator[DbWriter]:
    with DbWriter(folder / "app.db", lock_timeout=10.0, **options) as db:
        db.run(CREATE)
        yield db


@contextlib.contextmanager
def held(db: DbWriter) -> Iterator[None]:
    """For the ``with`` block the writer is busy, so that jobs wait in the queue."""
    entered, release = threading.Event(), threading.Event()

    def hold(tx: Transaction) -> None:
        entered.set()
        release.wait()

    db.enqueue(hold)
    entered.wait()
    try:
        yield
    finally:
        release.set()


def seconds_of(call: Callable[[], object]) -> float:
    began = perf_counter()
    call()
    return perf_counter() - began


def cpu_of(call: Callable[[], object]) -> float:
    """Seconds of all threads together, which other programs on the machine hardly change."""
    began = process_time()
    call()
    return process_time() - began


def memory() -> int:
    """The most that this process has had, in bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def descriptors() -> int:
    return len(os.listdir("/dev/fd"))


def in_threads(count: int, work: Callable[[int], float]) -> list[float]:
    """What each thread returned; one that raised is missing."""
    found: list[float] = []
    threads = [threading.Thread(target=lambda n=n: found.append(work(n))) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def check_rows(db: DbWriter, size: int) -> None:
    check(db.read(IN_ORDER, timeout=None) == [(size, size)], "every row is there, in order")


# Writes ---------------------------------------------------------------------------------------------------------------


def queue(folder: Path, size: int) -> Found:
    with gateway(folder, maxsize=size) as db:
        before, began = memory(), process_time()
        with held(db):
            for n in range(size):
                db.enqueue(INSERT, (n,))
            kept = memory() - before
            try:
                db.enqueue(INSERT, (0,), timeout=0)
                check(False, "a full queue refuses")
            except QueueFullError:
                pass
        drained = seconds_of(db.flush)
        took = process_time() - began
        check_rows(db, size)
    return Found(took / size, f"{kept / size:.0f} bytes each, drained in {drained:.1f} s")


def cancelled(folder: Path, size: int) -> Found:
    with gateway(folder, maxsize=size) as db:
        with held(db):
            tickets = [db.enqueue(INSERT, (n,)) for n in range(size)]
            took = cpu_of(lambda: check(all(ticket.cancel() for ticket in tickets), "a queued job is withdrawn"))
        db.run(INSERT, (0,))
        check_rows(db, 1)
    return Found(took / size)


def run_many(folder: Path, size: int) -> Found:
    with gateway(folder) as db:
        before = memory()
        took = cpu_of(lambda: db.run_many(INSERT, ((n,) for n in range(size)), timeout=None))
        check_rows(db, size)
        return Found(took / size, f"{(memory() - before) / size:.0f} bytes each")


def enqueue_many(folder: Path, size: int) -> Found:
    with gateway(folder) as db:
        began = process_time()
        with held(db):
            ticket = db.enqueue_many(INSERT, ((n,) for n in range(size)))
            queued = process_time() - began
        check(ticket.result().rowcount == size, "the ticket tells how many rows")
        took = process_time() - began
        check_rows(db, size)
    return Found(took / size, f"of these the call {queued / size * 1e6:.1f} µs")


def block(folder: Path, size: int) -> Found:
    def work() -> None:
        with db.transaction() as tx:
            for n in range(size):
                tx.execute(INSERT, (n,))

    with gateway(folder) as db:
        took = cpu_of(work)
        check_rows(db, size)
    return Found(took / size)


def script(folder: Path, size: int) -> Found:
    statements = [f"INSERT INTO t (n) VALUES ({n:20});\n" for n in range(size // 46)]
    text = "".join(statements)
    with gateway(folder) as db:
        took = cpu_of(lambda: db.run_script(text, timeout=None))
        check_rows(db, len(statements))
    return Found(took / len(statements), f"{len(statements):,} statements")


def statement(folder: Path, size: int) -> Found:
    text = "x" * (size - 40)
    with gateway(folder) as db:
        took = cpu_of(lambda: db.run(f"INSERT INTO t (n) VALUES ('{text}')", timeout=None))
        check(db.read_value("SELECT n FROM t") == text, "the value is there")
    return Found(took / size)


def value(folder: Path, size: int) -> Found:
    if size > 100 * MB and os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 8 * GB:
        raise NotTriedError("less than 8 GB of memory are free")
    with gateway(folder) as db:
        data = b"0123456789abcdef" * (size // 16)
        took = cpu_of(lambda: db.run(INSERT, (data,), timeout=None))
        check(db.read_value("SELECT n FROM t") == data, "the value is there")
        check_refused(db, sqlite3.DataError, INSERT, (bytes(LENGTH_LIMIT + 1),))
        check_refused(db, sqlite3.DataError, f"INSERT INTO t (n) VALUES (zeroblob({LENGTH_LIMIT + 1}))")
    return Found(took / size, f"at most {memory() / MB:,.0f} MB of memory")


def check_refused(db: DbWriter, kind: type[sqlite3.Error], sql: str, params: Sequence[object] = ()) -> None:
    """With SQLite's own error, and the next job works."""
    before = db.read_value("SELECT count(*) FROM t")
    try:
        db.run(sql, params)
        check(False, "what is too large is refused")
    except sqlite3.Error as error:
        check(type(error) is kind, f"{kind.__name__} is raised, not {error!r}")
    db.run(INSERT, (0,))
    check(db.read_value("SELECT count(*) FROM t") == before + 1, "the next job works")


def parameters(folder: Path, size: int) -> Found:
    with gateway(folder) as db:
        most = db.read(lambda connection: connection.getlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER))
        if size > most:
            raise NotTriedError(f"this SQLite allows {most:,}")
        took = cpu_of(lambda: db.run(insert_of(size), range(size), timeout=None))
        check_rows(db, size)
        check_refused(db, sqlite3.OperationalError, insert_of(most + 1), range(most + 1))
    return Found(took / size)


def insert_of(rows: int) -> str:
    return f"{INSERT}{', (?)' * (rows - 1)}"


def savepoints(folder: Path, size: int) -> Found:
    def work() -> None:
        with db.transaction() as tx, contextlib.ExitStack() as stack:
            for n in range(size):
                stack.enter_context(tx.savepoint())
                tx.execute(INSERT, (n,))
            with contextlib.suppress(KeyError), tx.savepoint():
                tx.execute(INSERT, (-1,))
                raise KeyError

    with gateway(folder) as db:
        took = cpu_of(work)
        check_rows(db, size)
    return Found(took / size)


def labels(folder: Path, size: int) -> Found:
    jobs, label = 20, "x" * size
    with gateway(folder) as db:
        began = process_time()
        for n in range(jobs):
            db.enqueue(INSERT, (n,), label=label)
        db.flush()
        took = process_time() - began
        check_rows(db, jobs)
        try:
            db.run("INSERT INTO nowhere VALUES (1)", label=label)
            check(False, "the job fails")
        except sqlite3.OperationalError as error:
            told = len("".join(error.__notes__))
        check(db.close().failed == 1, "the report counts it")
    return Found(took / jobs, f"{told:,} characters in the note of an error")


def callbacks(folder: Path, size: int) -> Found:
    called: list[int] = []

    def note(number: int, _: object) -> None:
        called.append(number)

    with gateway(folder) as db:
        began = process_time()
        with held(db):
            ticket = db.enqueue(INSERT, (0,))
            for n in range(size):
                ticket.add_done_callback(functools.partial(note, n))
        db.flush()
        took = process_time() - began
    check(called == list(range(size)), "each was called once, in order")
    return Found(took / size)


# Reads ----------------------------------------------------------------------------------------------------------------


def rows_of_a_read(folder: Path, size: int) -> Found:
    with gateway(folder) as db:
        before = memory()
        sql = "WITH RECURSIVE c(n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM c LIMIT ?) SELECT n, 'a text' FROM c"
        began = process_time()
        rows = db.read(sql, (size,), timeout=None)
        took = process_time() - began
        check(len(rows) == size and rows[-1][0] == size - 1, "all rows are there")
        return Found(took / size, f"{(memory() - before) / size:.0f} bytes each")


def readers(folder: Path, size: int) -> Found:
    with gateway(folder, readers=size) as db:
        before, opened = descriptors(), threading.Barrier(size + 1)
        written = threading.Event()

        def work(_: int) -> float:
            with db.reader(timeout=None) as connection:
                connection.execute("SELECT count(*) FROM t").fetchone()
                opened.wait()
                written.wait()
                check(connection.execute("SELECT count(*) FROM t").fetchone() == (0,), "it sees the state of its entry")
            return 0.0

        found: list[float] = []
        reading = threading.Thread(target=lambda: found.extend(in_threads(size, work)))
        began = process_time()
        reading.start()
        opened.wait()
        took = process_time() - began
        used, wrote = descriptors() - before, seconds_of(lambda: db.run(INSERT, (0,)))
        written.set()
        reading.join()
        check(len(found) == size, "every reader had its snapshot")
        check_rows(db, 1)
    return Found(took / size, f"{used / size:.1f} descriptors each, a write beside them {wrote * 1e3:.1f} ms")


def reading_threads(folder: Path, size: int) -> Found:
    reads = 20
    with gateway(folder, readers=4) as db:
        db.run_many(INSERT, [(n,) for n in range(1000)])

        def work(number: int) -> float:
            longest = 0.0
            for n in range(number, number + reads):
                began = perf_counter()
                check(db.read("SELECT n FROM t WHERE id = ?", (n % 1000 + 1,)) == [(n % 1000,)], "the row is found")
                longest = max(longest, perf_counter() - began)
            return longest

        began = process_time()
        longest = in_threads(size, work)
        took = process_time() - began
        check(len(longest) == size, "every thread read what it asked for")
    return Found(took / size / reads, f"longest read {max(longest):.2f} s")


def watching_tasks(folder: Path, size: int) -> Found:
    """For one of the tasks, at each commit."""
    rounds = 5

    async def follow(db: AsyncDbWriter, number: int, given: asyncio.Queue[int]) -> None:
        async with db.watch("SELECT count(*) FROM t WHERE n <> ?", (-number,), every=0) as live:
            async for rows in live:
                given.put_nowait(rows[0][0])

    async def work() -> tuple[float, list[float]]:
        async with AsyncDbWriter(folder / "app.db") as db:
            await db.run(CREATE)
            given = asyncio.Queue[int]()
            tasks = [asyncio.create_task(follow(db, number + 1, given)) for number in range(size)]
            check([await given.get() for _ in tasks] == [0] * size, "each gets the rows as they are")
            delays, cpu = [], process_time()
            for number in range(1, rounds + 1):
                began = perf_counter()
                await db.run(INSERT, (number,))
                await until_each_has(given, number, size)
                delays.append(perf_counter() - began)
            cpu = process_time() - cpu
        await asyncio.gather(*tasks)  # which end with the gateway
        return cpu, delays

    cpu, delays = asyncio.run(work())
    return Found(cpu / rounds / size, f"after {min(delays) * 1e3:,.1f} ms all have the rows")


async def until_each_has(given: asyncio.Queue[int], number: int, size: int) -> None:
    for _ in range(size):
        check(await given.get() == number, "each gets the newest rows, once")


def watching_threads(folder: Path, size: int) -> Found:
    rounds = 5
    with gateway(folder) as db:
        got = threading.Barrier(size + 1)
        wrong: list[object] = []

        def work(number: int) -> float:
            with db.watch("SELECT count(*) FROM t WHERE n <> ?", (-number - 1,), every=0) as live:
                for expected in range(rounds + 1):
                    rows = live.next()
                    if rows != [(expected,)]:
                        wrong.append(rows)
                    got.wait()
            return 0.0

        reading = threading.Thread(target=in_threads, args=(size, work))
        reading.start()
        got.wait()
        delays, cpu = [], process_time()
        for number in range(rounds):
            began = perf_counter()
            db.run(INSERT, (number + 1,))
            got.wait()
            delays.append(perf_counter() - began)
        cpu = process_time() - cpu
        reading.join()
    check(not wrong, f"each gets the newest rows, once, not {wrong[:3]}")
    return Found(cpu / rounds / size, f"after {min(delays) * 1e3:,.1f} ms all have the rows")


# Threads, tasks, processes, files -------------------------------------------------------------------------------------


def tasks(folder: Path, size: int) -> Found:
    async def work() -> float:
        async with AsyncDbWriter(folder / "app.db") as db:
            await db.run("CREATE TABLE t (id INTEGER PRIMARY KEY, n)")
            began = process_time()
            await asyncio.gather(*[db.run(INSERT, (n,), timeout=None) for n in range(size)])
            took = process_time() - began
            check((await db.read(IN_ORDER)) == [(size, size)], "every row is there, in order")
            return took

    before = memory()
    return Found(asyncio.run(work()) / size, f"{(memory() - before) / size:,.0f} bytes each")


def awaiting_tasks(folder: Path, size: int) -> Found:
    async def work() -> float:
        async with AsyncDbWriter(folder / "app.db") as db:
            await db.run(CREATE)
            release = threading.Event()
            ticket = db.enqueue(lambda _: release.wait())
            began = process_time()
            waiting = [asyncio.create_task(wait_for(ticket)) for _ in range(size)]
            await asyncio.sleep(0)
            release.set()
            check(all(await asyncio.gather(*waiting)), "each of them gets the result")
            return process_time() - began

    async def wait_for(ticket: Any) -> Any:
        return await ticket

    return Found(asyncio.run(work()) / size)


def threads(folder: Path, size: int) -> Found:
    writes = 5
    with gateway(folder) as db:

        def work(number: int) -> float:
            return max(seconds_of(lambda: db.run(INSERT, (number,), timeout=None)) for _ in range(writes))

        began = process_time()
        longest = in_threads(size, work)
        took = process_time() - began
        check(db.read_value("SELECT count(*) FROM t") == writes * size, "every row is there")
    return Found(took / size / writes, f"longest wait {max(longest):.2f} s")


def processes(folder: Path, size: int) -> Found:
    """Each of them reads a counter and writes one more, for three seconds."""
    with gateway(folder) as db:
        db.run(INSERT, (0,))
    command = [sys.executable, __file__, "--counts", str(folder / "app.db")]
    running = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(size)]
    for process in running:
        assert process.stdout is not None
        process.stdout.readline()  # it is ready
    for process in running:
        assert process.stdin is not None
        process.stdin.close()
    counts, waits, cpu = [], [], 0.0
    for process in running:
        assert process.stdout is not None
        jobs, longest, used = json.loads(process.stdout.read())
        counts.append(jobs)
        waits.append(longest)
        cpu += used
        check(process.wait() == 0, "none is refused within lock_timeout")
    with DbWriter(folder / "app.db") as db:
        check(db.read_value("SELECT n FROM t") == sum(counts), "no update is lost")
    besides = f"longest wait {max(waits):.2f} s, fewest / most jobs {min(counts):,} / {max(counts):,} in 3 s"
    return Found(cpu / sum(counts), besides)


def count_for_three_seconds(path: str) -> None:
    """One of the processes."""

    def count(tx: Transaction) -> None:
        ((n,),) = tx.execute("SELECT n FROM t")
        tx.execute("UPDATE t SET n = ?", (n + 1,))

    with DbWriter(path, lock_timeout=10.0) as db:
        print("ready", flush=True)
        sys.stdin.read()
        jobs, longest, until, cpu = 0, 0.0, monotonic() + 3.0, process_time()
        while monotonic() < until:
            longest = max(longest, seconds_of(lambda: db.run(count)))
            jobs += 1
        cpu = process_time() - cpu
    print(json.dumps([jobs, longest, cpu]))


def attached(folder: Path, size: int) -> Found:
    def attach_all(count: int, connection: sqlite3.Connection, readonly: bool) -> None:
        for n in range(count):
            connection.execute(f"ATTACH ? AS a{n}", (str(folder / f"a{n}.db"),))

    def write(tx: Transaction) -> None:
        for n in range(size):
            tx.execute(f"INSERT INTO a{n}.u VALUES (1)")

    def fail(tx: Transaction) -> None:
        write(tx)
        raise KeyError

    jobs, before = 50, descriptors()
    with gateway(folder, on_connect=functools.partial(attach_all, size)) as db:
        for n in range(size):
            db.run(f"CREATE TABLE a{n}.u (n)")
        took = cpu_of(lambda: [db.run(write) for _ in range(jobs)])
        with contextlib.suppress(KeyError):
            db.run(fail)
        used = descriptors() - before
        for n in range(size):
            check(db.read_value(f"SELECT count(*) FROM a{n}.u") == jobs, "a job is in all files or in none")
        most = db.read(lambda connection: connection.getlimit(sqlite3.SQLITE_LIMIT_ATTACHED))
    try:
        with DbWriter(folder / "app.db", on_connect=functools.partial(attach_all, most + 1)):
            check(False, "one more than SQLite allows is refused")
    except sqlite3.OperationalError as error:
        check("too many attached databases" in str(error), f"SQLite's error is raised, not {error!r}")
    return Found(took / jobs / (size + 1), f"{used} descriptors")


def gateways(folder: Path, size: int) -> Found:
    before, kept = descriptors(), memory()
    began = process_time()
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(DbWriter(folder / f"{n}.db")) for n in range(size)]
        for db in opened:
            db.run(CREATE)
        used, kept = descriptors() - before, memory() - kept
        running = threading.active_count()
    took = process_time() - began
    check(threading.active_count() == 1 and descriptors() == before, "close leaves no thread and no descriptor")
    check(not list(folder.glob("*-wal")), "close leaves no log")
    besides = f"{used / size:.1f} descriptors, {running / size:.1f} threads, {kept / size / KB:.0f} kB each"
    return Found(took / size, besides)


def log(folder: Path, size: int) -> Found:
    if os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize < 3 * size:
        raise NotTriedError("the disk has no room")
    with gateway(folder) as db:
        db.run(INSERT, (-1,))
        with db.reader() as connection:
            check(connection.execute("SELECT count(*) FROM t").fetchone() == (1,), "the reader has its snapshot")
            began = process_time()
            taken = [seconds_of(lambda: db.run(INSERT_A_MB)) for _ in range(size // MB)]
            took = process_time() - began
            grown = db.stats().wal_bytes
            old = seconds_of(lambda: connection.execute("SELECT n FROM t WHERE id = 1").fetchone())
            check(connection.execute("SELECT count(*) FROM t").fetchone() == (1,), "the reader has its snapshot")
        new = seconds_of(lambda: db.read("SELECT id FROM t WHERE id = 2"))
        emptied = seconds_of(lambda: db.checkpoint(timeout=None))
        check(db.stats().wal_bytes == 0, "the log is emptied when the reader has ended")
    besides = f"log of {grown / MB:,.0f} MB, longest write {max(taken):.2f} s, a read {max(old, new) * 1e3:.1f} ms, "
    return Found(took / len(taken), f"{besides}checkpoint {emptied:.1f} s")


# A large file ---------------------------------------------------------------------------------------------------------


def make_large(path: Path, size: int) -> None:
    """A valid database of ``size`` bytes: all pages but a few are free, and the file has holes where they are.

    A trunk page lists free pages: https://www.sqlite.org/fileformat2.html#the_freelist. The last ones come first,
    so new rows are written there.
    """
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA page_size = {PAGE}")
        connection.execute(CREATE)
    used, count = path.stat().st_size // PAGE, size // PAGE
    listed = PAGE // 4 - 8  # older versions of SQLite use no more
    with path.open("r+b") as file:
        file.truncate(count * PAGE)
        first = free = 0
        for start in range(used + 1, count + 1, listed + 1):
            pages = range(start, min(start + listed + 1, count + 1))
            leaves = [number for number in pages[:-1] if number != LOCK_BYTE // PAGE + 1]
            file.seek((pages[-1] - 1) * PAGE)
            file.write(big_endian(first, len(leaves), *leaves))
            first, free = pages[-1], free + 1 + len(leaves)
        file.seek(28)  # https://www.sqlite.org/fileformat2.html#the_database_header
        file.write(big_endian(count, first, free))
        os.fsync(file.fileno())  # so that opening it does not do that


def big_endian(*numbers: int) -> bytes:
    found = array.array("I", numbers)
    assert found.itemsize == 4
    if sys.byteorder == "little":
        found.byteswap()
    return found.tobytes()


class EnoughError(Exception):
    """Of a copy."""


def large_file(folder: Path, size: int) -> Found:
    """One of some hundred writes; then what a copy, if need be the beginning of one, does to writes beside it."""
    path = folder / "app.db"
    make_large(path, size)
    if size <= 5 * GB:
        with contextlib.closing(sqlite3.connect(path)) as connection:
            check(connection.execute("PRAGMA integrity_check").fetchone() == ("ok",), "the file is valid")
    began = perf_counter()
    with DbWriter(path) as db:
        opened = perf_counter() - began
        before = process_time()
        taken = [seconds_of(functools.partial(db.run, INSERT, (n,))) for n in range(300)]
        took = (process_time() - before) / len(taken)
        check_rows(db, 300)
        check(not db.checkpoint().busy and path.stat().st_size >= size // PAGE * PAGE, "a checkpoint comes to its end")
        db.run_many(INSERT, [(n,) for n in range(300, 100_000)])
        emptied = seconds_of(db.checkpoint)
        check_rows(db, 100_000)
        copied, seconds, longest = copy_beside_writes(db, folder / "copy.db", COPY)
        check_rows(db, db.read_value("SELECT count(*) FROM t"))
        began = perf_counter()
    closed = perf_counter() - began
    besides = f"open {opened * 1e3:.0f} ms, run {statistics.median(taken) * 1e3:.1f} ms, "
    besides += f"checkpoint {emptied * 1e3:.0f} ms, close {closed * 1e3:.0f} ms; "
    besides += (
        f"copied {copied / MB:,.0f} MB, {copied / MB / seconds:,.0f} MB/s, longest write meanwhile {longest:.2f} s"
    )
    return Found(took, besides)


def copy_beside_writes(db: DbWriter, target: Path, most: float) -> tuple[int, float, float]:
    """Copy for ``most`` seconds; returns the bytes and seconds, and of 200 writes a second the longest."""
    stop, longest, done = threading.Event(), [0.0], [0]

    def write() -> None:
        n = db.read_value("SELECT count(*) FROM t")
        while not stop.wait(0.005):
            longest[0] = max(longest[0], seconds_of(functools.partial(db.run, INSERT, (n,))))
            n += 1

    def progress(status: int, remaining: int, total: int) -> None:
        done[0] = total - remaining
        if perf_counter() > began + most:
            raise EnoughError

    writing = threading.Thread(target=write)
    writing.start()
    began = perf_counter()
    try:
        db.backup(target, progress=progress, pages=32)
    except EnoughError:
        check(not list(target.parent.glob("copy.db*")), "of a copy that was given up nothing is left")
    else:
        with contextlib.closing(sqlite3.connect(target)) as copy:
            check(copy.execute(IN_ORDER).fetchone() == (100_000, 100_000), "the copy is the state of its beginning")
    finally:
        took = perf_counter() - began
        stop.set()
        writing.join()
    return done[0] * PAGE, took, longest[0]


# The table ------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """What is tried, and with which sizes; ``--quick``: the first."""

    what: str
    measure: Callable[[Path, int], Found]
    sizes: tuple[int, ...]


ROWS = (
    Row("queued jobs", queue, (1000, 100_000, 1_000_000)),
    Row("queued jobs, withdrawn one by one", cancelled, (1000, 10_000, 100_000)),
    Row("rows of one run_many", run_many, (10_000, 100_000, 1_000_000)),
    Row("rows of one enqueue_many", enqueue_many, (10_000, 100_000, 1_000_000)),
    Row("statements in one block", block, (1000, 100_000, 1_000_000)),
    Row("bytes of one value", value, (MB, 100 * MB, 999_999_984)),
    Row("bytes of one statement", statement, (100 * KB, MB, 10 * MB)),
    Row("bytes of one script", script, (100 * KB, MB, 10 * MB)),
    Row("parameters of one statement", parameters, (1000, 32_766, 250_000)),
    Row("nested savepoints", savepoints, (10, 100, 1000)),
    Row("characters of a label", labels, (10, KB, MB)),
    Row("callbacks of one ticket", callbacks, (1000, 10_000, 100_000)),
    Row("rows of one read", rows_of_a_read, (1000, 100_000, 1_000_000)),
    Row("readers open at once", readers, (4, 64, 256)),
    Row("threads that read with 4 connections", reading_threads, (4, 64, 500)),
    Row("tasks that watch one table", watching_tasks, (1, 100, 1000)),
    Row("threads that watch one table", watching_threads, (1, 100, 1000)),
    Row("tasks in run at once", tasks, (1000, 10_000, 100_000)),
    Row("tasks that await one ticket", awaiting_tasks, (100, 1000, 10_000)),
    Row("threads in run at once", threads, (10, 100, 1000)),
    Row("processes with a gateway each", processes, (4, 16, 32)),
    Row("attached databases", attached, (1, 5, 10)),
    Row("gateways in one process", gateways, (1, 10, 100)),
    Row("bytes in the log, kept by a reader", log, (10 * MB, 500 * MB, 2 * GB)),
    Row("bytes of the database", large_file, (50 * MB, 2 * GB, 50 * GB)),
)


def try_one(what: str, size: int) -> None:
    """In a process of its own."""
    (measure,) = (row.measure for row in ROWS if row.what == what)
    logging.disable()  # full queues, slow jobs and open readers are what is tried
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = measure(Path(folder), size)
        except NotTriedError as reason:
            found = Found(0.0, f"not tried: {reason}")
    print(json.dumps(found))


def outcome(row: Row, size: int) -> tuple[str, Found]:
    command = [sys.executable, __file__, "--one", row.what, str(size)]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return "NO", Found(0.0, f"not within {TIME_LIMIT:.0f} s")
    if ran.returncode != 0 or ran.stderr:
        return "NO", Found(0.0, (ran.stderr.strip() or f"exit code {ran.returncode}").splitlines()[-1])
    found = Found(*json.loads(ran.stdout.splitlines()[-1]))
    return ("yes" if found.seconds else "-"), found


def in_units(seconds: float) -> str:
    if not seconds:
        return ""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.1f} {unit}"
    return f"{seconds * 1e9:.1f} ns"


def fsync_ms() -> float:
    def sync() -> None:
        file.write(b"x" * PAGE)
        os.fsync(file.fileno())

    with tempfile.TemporaryFile(buffering=0) as file:
        return 1e3 * statistics.median(seconds_of(sync) for _ in range(50))


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        try_one(sys.argv[2], int(sys.argv[3]))
        return
    if sys.argv[1:2] == ["--counts"]:
        logging.disable()
        count_for_three_seconds(sys.argv[2])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest of each alone")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name has this in it")
    arguments = parser.parse_args()
    print(f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}, {platform.system()}", end=", ")
    print(f"{os.cpu_count()} cores, synchronous=FULL, fsync {fsync_ms():.1f} ms\n")
    print(f"{'':37}{'size':>14}  {'holds':5}  {'CPU of one':>10}  slow?   besides")
    for row in ROWS:
        least = math.inf
        for size in row.sizes[:1] if arguments.quick else row.sizes:
            if arguments.only in row.what:
                holds, found = outcome(row, size)
                if found.seconds > SLOW * least:  # or was it something else on this machine?
                    holds, found = min((holds, found), outcome(row, size), key=lambda other: other[1].seconds)
                slow = f"x {found.seconds / least:.1f}" if found.seconds > SLOW * least else ""
                least = min(least, found.seconds or math.inf)
                cost = in_units(found.seconds)
                print(f"{row.what:37}{size:14,}  {holds:5}  {cost:>10}  {slow:7} {found.besides}".rstrip(), flush=True)


if __name__ == "__main__":
    main()
