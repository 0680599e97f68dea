"""How many bytecodes an operation executes, in all threads together: a cost that a noisy machine cannot change.

``python tests/bench/bytecodes.py [--where OPERATION]``, with the package to measure on the path. Python code alone is
counted, nothing inside SQLite; the median of several groups of calls. ``--where`` lists the functions and parts of the
operations whose names contain that text. After an fsync a bytecode takes about three times as long as one in a loop.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import logging
import statistics
import sys
import tempfile
import threading
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

INSERT = "INSERT INTO t (k, v) VALUES (?, ?)"
SELECT = "SELECT v FROM t WHERE id = ?"
ROUNDS = 5
CALLS, BACKLOG, TASKS, CALLS_OF_A_TASK = 100, 1000, 64, 10
MOST_FUNCTIONS = 25
PARTS = {
    "the call": ("gateway", "aio", "core", "jobs", "ticket", "block", "parameters", "arguments", "call_site"),
    "its turn": ("queue", "waiting", "driver", "entry", "own_turn", "calls", "threads"),
    "the batch": ("batch", "writer"),
    "lock and file": ("lock", "file"),
    "statements": ("execute", "statement", "result", "loan", "function_loan", "transaction", "session", "scopes"),
    "the outcome": ("outcomes", "tally"),
    "supervision": ("state", "checkpoint", "pool", "places", "clock", "log"),
    "the event loop": ("base_events", "events", "selectors", "selector_events", "unix_events", "tasks", "futures"),
}


class Meter:
    """Counts bytecodes and calls in each thread that starts after ``install``."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._is_on = False
        self._bytecodes: Counter[types.CodeType] = Counter()
        self._calls: Counter[types.CodeType] = Counter()

    def install(self) -> None:
        threading.settrace(self._trace)
        sys.settrace(self._trace)

    def uninstall(self) -> None:
        threading.settrace(None)
        sys.settrace(None)

    def _trace(self, frame: types.FrameType, event: str, _: object) -> Any:
        code = frame.f_code
        if code.co_filename == __file__:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if self._is_on and event == "opcode":
            self._bytecodes[code] += 1
        elif self._is_on and event == "call":
            self._calls[code] += 1
        return self._trace

    def begin(self) -> None:
        self._bytecodes.clear()
        self._calls.clear()
        self._is_on = True

    def end(self) -> int:
        self._is_on = False
        return self._bytecodes.total()

    def report(self, operation: str, found: list[int], calls: int) -> None:
        """``found`` are bytecodes of groups of ``calls`` calls; of the last one it also knows where they were."""
        figure = statistics.median(found) / calls
        print(f"{operation:46} {figure:8,.0f}   ({self._calls.total() / calls:.1f} calls)", flush=True)
        if self._where and self._where in operation:
            for code, count in self._bytecodes.most_common(MOST_FUNCTIONS):
                place = f"{Path(code.co_filename).name}:{code.co_qualname}"
                print(f"    {count / calls:8.1f}  {self._calls[code] / calls:6.2f} calls  {place}", flush=True)
            parts = Counter({part: 0 for part in (*PARTS, "the rest")})
            for code, count in self._bytecodes.items():
                name = Path(code.co_filename).stem
                parts[next((part for part, files in PARTS.items() if name in files), "the rest")] += count
            for part, count in parts.items():
                print(f"    {count / calls:8.0f}  {part}", flush=True)


def insert(tx: Any) -> None:
    tx.execute(INSERT, (1, "x"))


def insert_ten(tx: Any) -> None:
    for _ in range(10):
        tx.execute(INSERT, (1, "x"))


def lone_calls(db: Any) -> dict[str, Callable[[], object]]:
    row = itertools.count(1)

    def block() -> None:
        with db.transaction() as tx:
            for _ in range(3):
                tx.execute(INSERT, (1, "x"))

    return {
        "run of a statement, alone": lambda: db.run(INSERT, (1, "x")),
        "run of a function with 1 statement, alone": lambda: db.run(insert),
        "run of a function with 10 statements, alone": lambda: db.run(insert_ten),
        "transaction() block with 3 statements": block,
        "read of one row": lambda: db.read(SELECT, (next(row),)),
    }


def measure_lone(meter: Meter, db: Any) -> None:
    calls = lone_calls(db)
    for call in calls.values():
        repeat(call, CALLS)
    for operation, call in calls.items():
        found = []
        for _ in range(ROUNDS):
            meter.begin()
            repeat(call, CALLS)
            found.append(meter.end())
        meter.report(operation, found, CALLS)


def repeat(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()


def measure_backlog(meter: Meter, db: Any, operation: str, call: Callable[[], object]) -> None:
    """The writer is held while jobs are queued, so that it drains them as one backlog, in full batches."""
    put: list[int] = []
    drained: list[int] = []
    held, go = threading.Event(), threading.Event()

    def hold(tx: Any) -> None:
        held.set()
        go.wait()

    for _ in range(1 + ROUNDS):
        held.clear()
        go.clear()
        holder = threading.Thread(target=db.run, args=[hold])
        holder.start()
        held.wait()
        meter.begin()
        repeat(call, BACKLOG)
        put.append(meter.end())
        meter.begin()
        go.set()
        db.flush()
        drained.append(meter.end())
        holder.join()
    print(f"{operation:46} {statistics.median(put[1:]) / BACKLOG:8,.0f}", flush=True)
    meter.report("  the same, in the writer, of a backlog", drained[1:], BACKLOG)


async def measure_tasks(meter: Meter, path: Path) -> None:
    from onewriter import AsyncDbWriter

    async with AsyncDbWriter(path, synchronous="OFF") as db:

        async def worker() -> None:
            for _ in range(CALLS_OF_A_TASK):
                await db.run(INSERT, (1, "x"))

        async def load() -> None:
            await asyncio.gather(*[worker() for _ in range(TASKS)])

        await load()
        found = []
        for _ in range(ROUNDS):
            meter.begin()
            await load()
            found.append(meter.end())
        meter.report(f"await run of a statement, {TASKS} tasks", found, TASKS * CALLS_OF_A_TASK)


def main() -> None:
    parser = argparse.ArgumentParser(description="How many bytecodes an operation executes.")
    parser.add_argument("--where", default="", metavar="OPERATION", help="a part of its name: list its functions")
    meter = Meter(parser.parse_args().where)
    meter.install()  # before the gateway's threads start
    from onewriter import DbWriter

    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bytecodes.db"
        with DbWriter(path, synchronous="OFF", maxsize=2 * BACKLOG) as db:
            db.run("CREATE TABLE t (id INTEGER PRIMARY KEY, k, v)")
            measure_lone(meter, db)
            measure_backlog(meter, db, "enqueue of a statement", lambda: db.enqueue(INSERT, (1, "x")))
            measure_backlog(meter, db, "enqueue of a function with 1 statement", lambda: db.enqueue(insert))
        asyncio.run(measure_tasks(meter, path))
    meter.uninstall()


if __name__ == "__main__":
    main()
