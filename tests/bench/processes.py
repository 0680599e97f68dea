"""Several processes write one file as fast as they can: who gets how much. ``python tests/bench/processes.py --help``.

Each process has a gateway of its own. ``fewest / most`` compares the processes that do the same; the last line of each
table is the same load on plain ``sqlite3`` with its own busy handler.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import platform
import sqlite3
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic

from onewriter import DbWriter

CREATE = "CREATE TABLE t (who INTEGER, n INTEGER)"
INSERT = "INSERT INTO t VALUES (?, ?)"
THREADS = 16


def by_gateway(path: str, who: int, rows: int, seconds: float, floods: bool, threads: int = 1) -> tuple[int, float]:
    """Jobs written, and the longest wait for one."""
    with DbWriter(path, lock_timeout=60.0) as db:
        until = monotonic() + seconds

        def write(_: int) -> tuple[int, float]:
            jobs, longest = 0, 0.0
            while (began := monotonic()) < until:
                if floods:
                    db.enqueue(INSERT, (who, 1))
                else:
                    db.run_many(INSERT, [(who, n) for n in range(rows)], timeout=None)
                    longest = max(longest, monotonic() - began)
                jobs += 1
            return jobs, longest

        with ThreadPoolExecutor(threads) as pool:
            outcomes = list(pool.map(write, range(threads)))
    return sum(jobs for jobs, _ in outcomes), max(longest for _, longest in outcomes)


def by_threads(path: str, who: int, rows: int, seconds: float, floods: bool) -> tuple[int, float]:
    return by_gateway(path, who, rows, seconds, floods, THREADS)


def by_sqlite3(path: str, who: int, rows: int, seconds: float, floods: bool) -> tuple[int, float]:
    jobs, longest = 0, 0.0
    with contextlib.closing(sqlite3.connect(path, timeout=60.0, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = FULL")
        until = monotonic() + seconds
        while (began := monotonic()) < until:
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(INSERT, [(who, n) for n in range(rows)])
            connection.execute("COMMIT")
            longest = max(longest, monotonic() - began)
            jobs += 1
    return jobs, longest


KINDS = {"gateway": by_gateway, "threads": by_threads, "sqlite3": by_sqlite3}
HOW = {"threads": f" x {THREADS} threads"}


def compete(kind: str, processes: int, rows: int, seconds: float, flood: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "app.db")
        with DbWriter(path) as db:
            db.run(CREATE)
        running = []
        for who in range(processes):
            floods = flood and who == 0
            command = [sys.executable, __file__, "--child", kind, path, str(who), str(rows), str(seconds), str(floods)]
            running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        told = [process.communicate()[0].split() for process in running]
        assert all(process.returncode == 0 for process in running)
        jobs, waits = [int(words[0]) for words in told], [float(words[1]) for words in told]
        with contextlib.closing(sqlite3.connect(path)) as connection:
            found = dict(connection.execute("SELECT who, count(*) FROM t GROUP BY who"))
        written = [rows * count for count in jobs]
        if flood:
            written[0] = jobs[0]
        assert [found.get(who, 0) for who in range(processes)] == written, "rows are missing"
        equals = jobs[1:] if flood else jobs
        how = f"{processes} process{'es' if processes > 1 else ''}{', one floods' if flood else HOW.get(kind, '')}"
        print(
            f"{kind:8} {how:30} {rows:5} rows a job: "
            f"{min(equals):6,} / {max(equals):6,} = {min(equals) / max(equals):.2f}, "
            f"longest wait {max(waits):.2f} s, {sum(written) / seconds:9,.0f} rows/s"
        )


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        logging.disable()  # that one waits is the point
        kind, path, who, size, seconds, floods = sys.argv[2:]
        print(*KINDS[kind](path, int(who), int(size), float(seconds), floods == "True"))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0)
    arguments = parser.parse_args()
    print(f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}, synchronous=FULL")
    for rows in (1, 200, 5000):
        for kind in ("gateway", "sqlite3"):
            compete(kind, 1, rows, arguments.seconds, flood=False)
        for processes in (4, 8):
            compete("threads", processes, rows, arguments.seconds, flood=False)
            compete("gateway", processes, rows, arguments.seconds, flood=False)
            compete("gateway", processes, rows, arguments.seconds, flood=True)
            compete("sqlite3", processes, rows, arguments.seconds, flood=False)


if __name__ == "__main__":
    main()
