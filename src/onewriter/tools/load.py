"""The load of ``bench`` in one process, which the bench starts: ``python -m onewriter.tools.load TASK``.

It says what it does on standard output, a JSON object in each line: that it is ready, how many calls it has made, and
finally their results. It begins when it gets one byte on standard input, and ends with its parent.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import os
import sqlite3
import sys
import threading
from array import array
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter, sleep
from typing import Any, cast

from onewriter.base.log import logger
from onewriter.tools.contestants import TIMEOUT, Opener, Write, connect

TICK = 0.1  # seconds between two messages about the calls
PAUSE = 0.01  # seconds that a program waits after it was refused, before it goes on


@dataclass(frozen=True)
class Task:
    """What one process is to do. ``hold``: no load; it holds the write lock for so many seconds."""

    path: str
    module: str = ""  # of the opener,
    opener: str = ""  # which is a function there
    threads: int = 1
    seconds: float = 0.0
    first: int = 0  # the rows that it writes, each thread from one of its own,
    stride: int = 1  # and that many further
    timeout: float = TIMEOUT  # of plain connections
    hold: float = 0.0


@dataclass
class Share:
    """The result. ``latencies``: of every call, in milliseconds; ``refused``: rows whose call failed."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)
    locked: int = 0  # errors, those that come after the call (enqueue) too
    others: list[str] = field(default_factory=list)


class Worker:
    """One thread's part of the load.

    Threads: written by its own thread; ``calls`` is read by the main thread while it runs, the rest after the join.
    """

    def __init__(self, first: int, stride: int, write: Write) -> None:
        self._rows = range(first, sys.maxsize, stride)
        self._write = write
        self.latencies = array("d")
        self.failures: list[tuple[int, BaseException]] = []

    @property
    def calls(self) -> int:
        return len(self.latencies)

    def work(self, until: float) -> None:
        for row in self._rows:
            if self.latencies and perf_counter() >= until:  # one call at least, however busy the machine is
                return
            began = perf_counter()
            error = self._attempt(row)
            self.latencies.append(1000 * (perf_counter() - began))
            if error is not None:
                self.failures.append((row, error))
                if not is_locked(error):
                    return
                sleep(PAUSE)

    def _attempt(self, row: int) -> BaseException | None:
        try:
            self._write(row)
        except Exception as error:
            return error
        return None


def is_locked(error: BaseException | None) -> bool:
    """Whether it is what users know as "database is locked"."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def put(task: Task, ready: Callable[[], object], tell: Callable[[int], object]) -> Share:
    """Put the load on the file. ``ready`` returns when it may begin; ``tell`` gets the number of calls so far."""
    opener = cast(Opener, getattr(importlib.import_module(task.module), task.opener))
    with opener(Path(task.path), task.timeout) as session:
        workers = [Worker(task.first + n, task.stride, session.connect()) for n in range(task.threads)]
        ready()
        began = perf_counter()
        _run_all(workers, began + task.seconds, tell)
        session.finish()
        elapsed = perf_counter() - began
    failures = [failure for worker in workers for failure in worker.failures]
    errors = [error for _, error in failures] + session.failed
    others = [error for error in errors if not is_locked(error)]
    return Share(
        seconds=elapsed,
        latencies=[latency for worker in workers for latency in worker.latencies],
        refused=[row for row, _ in failures],
        locked=len(errors) - len(others),
        others=[f"{type(error).__name__}: {error}" for error in others],
    )


def _run_all(workers: list[Worker], until: float, tell: Callable[[int], object]) -> None:
    threads = [threading.Thread(target=worker.work, args=(until,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(TICK)
            tell(sum(worker.calls for worker in workers))


def hold(task: Task, ready: Callable[[], object]) -> Share:
    """A slow writer: it has the write lock before the load begins, and then keeps it."""
    with closing(connect(Path(task.path))) as connection:
        connection.execute("BEGIN IMMEDIATE")
        ready()
        sleep(task.hold)
        connection.execute("COMMIT")
    return Share()


def main(argument: str) -> int:
    logger.setLevel(logging.ERROR)  # a full queue is what the load is there for
    task = Task(**json.loads(argument))
    try:
        share = hold(task, _ready) if task.hold else put(task, _ready, lambda calls: _say(calls=calls))
    except Exception as error:
        _say(error=f"{type(error).__name__}: {error}")
        return 1
    _say(share=dataclasses.asdict(share))
    return 0


def _ready() -> None:
    _say(ready=True)
    if not os.read(sys.stdin.fileno(), 1):
        os._exit(1)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    # Not sys.stdin.read: its lock, held by a daemon thread, would be in the way of the interpreter's end.
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


def _say(**message: Any) -> None:
    try:
        print(json.dumps(message), flush=True)
    except BrokenPipeError:  # nobody waits for it any more
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
