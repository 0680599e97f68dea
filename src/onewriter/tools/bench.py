"""The same load on plain sqlite3 and on the gateway: ``python -m onewriter bench``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import math
import os
import platform
import sqlite3
import sys
import tempfile
import threading
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, TextIO

from onewriter.base.log import logger
from onewriter.errors import OneWriterError
from onewriter.tools.contestants import (
    COMPARED_WITH,
    CONTESTANTS,
    CREATE,
    JOURNAL_MODE,
    SYNCHRONOUS,
    Contestant,
    Write,
    connect,
)
from onewriter.tools.disk import FSYNCS, fsync_ms

MOST_THREADS = 1000
IN_MEMORY_MS = 0.02  # no disk that keeps its word syncs faster than that
TICK = 0.1  # seconds between two updates of the progress line
PAUSE = 0.01  # seconds that a program waits after it was refused, before it goes on
FAILED = 1  # exit code


@dataclass(frozen=True)
class Setup:
    """What was measured, and where."""

    python: str
    sqlite: str
    journal_mode: str
    synchronous: str
    threads: int
    seconds: float
    fsync_ms: float


@dataclass(frozen=True)
class Outcome:
    """What one contestant did. Latencies are those of every call, failed ones too, in milliseconds."""

    key: str
    name: str
    gateway: bool
    writes_per_second: float
    p50_ms: float
    p99_ms: float
    max_ms: float
    locked_errors: int
    other_errors: int
    first_other_error: str | None
    acknowledged: int
    found: int

    @property
    def lost(self) -> int:
        return max(0, self.acknowledged - self.found)


def _prepare(path: Path) -> None:
    with contextlib.closing(connect(path)) as connection:
        mode = connection.execute(f"PRAGMA journal_mode = {JOURNAL_MODE}").fetchone()[0]
        if mode.upper() != JOURNAL_MODE:
            raise OSError(f"the file system of {path.parent} does not allow journal mode {JOURNAL_MODE}")
        connection.execute(CREATE)


class Worker:
    """One thread's share of the load.

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

    def work(self, until: float, stop: threading.Event) -> None:
        for row in self._rows:
            began = perf_counter()
            if began >= until or stop.is_set():
                return
            error = self._attempt(row)
            self.latencies.append(perf_counter() - began)
            if error is not None:
                self.failures.append((row, error))
                if not is_locked(error):
                    return
                stop.wait(PAUSE)

    def _attempt(self, row: int) -> BaseException | None:
        try:
            self._write(row)
        except Exception as error:
            return error
        return None


def is_locked(error: BaseException | None) -> bool:
    """Whether it is what users know as "database is locked"."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


class Progress:
    """Says what is going on: one line that is rewritten on a terminal, one line for each contestant elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._live = stream.isatty()

    def begin(self, name: str) -> None:
        if not self._live:
            self._say(f"running {name} ...\n")

    def update(self, name: str, elapsed: float, calls: int) -> None:
        if self._live:
            self._say(f"\r{name}: {elapsed:.1f} s, {calls:,} writes\x1b[K")

    def clear(self) -> None:
        if self._live:
            self._say("\r\x1b[K")

    def _say(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def measure(contestant: Contestant, folder: Path, threads: int, seconds: float, progress: Progress) -> Outcome:
    """Put the load on one contestant, in a new file, and count what is there after reopening it."""
    path = folder / f"{contestant.key}.db"
    _prepare(path)
    progress.begin(contestant.name)
    with contestant.open(path) as session:
        workers = [Worker(number, threads, session.connect()) for number in range(threads)]
        began = perf_counter()
        _run_all(workers, began, seconds, lambda t, calls: progress.update(contestant.name, t, calls))
        session.finish()
        elapsed = perf_counter() - began
    progress.clear()
    return _outcome(contestant, workers, session.failed, elapsed, path)


def _run_all(workers: Sequence[Worker], began: float, seconds: float, tell: Callable[[float, int], object]) -> None:
    stop = threading.Event()
    # Daemons: a second Ctrl-C, during the join below, must not have to wait for a thread that SQLite keeps waiting.
    threads = [threading.Thread(target=w.work, args=(began + seconds, stop), daemon=True) for w in workers]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(TICK)
                tell(perf_counter() - began, sum(worker.calls for worker in workers))
    finally:
        stop.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()


def _outcome(
    contestant: Contestant, workers: Sequence[Worker], late: list[BaseException | None], elapsed: float, path: Path
) -> Outcome:
    latencies = sorted(1000 * latency for worker in workers for latency in worker.latencies)
    refused = [row for worker in workers for row, _ in worker.failures]
    errors = [error for worker in workers for _, error in worker.failures] + late
    others = [error for error in errors if not is_locked(error)]
    acknowledged = len(latencies) - len(errors)
    return Outcome(
        key=contestant.key,
        name=contestant.name,
        gateway=contestant.gateway,
        writes_per_second=acknowledged / elapsed,
        p50_ms=_percentile(latencies, 0.50),
        p99_ms=_percentile(latencies, 0.99),
        max_ms=_percentile(latencies, 1.0),
        locked_errors=len(errors) - len(others),
        other_errors=len(others),
        first_other_error=f"{type(others[0]).__name__}: {others[0]}" if others else None,
        acknowledged=acknowledged,
        found=_count_rows(path, refused),
    )


def _percentile(ordered: Sequence[float], share: float) -> float:
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


def _count_rows(path: Path, refused: Sequence[int]) -> int:
    """Rows in the file, without those of writes that reported an error (an error may come after the fact)."""
    with contextlib.closing(connect(path)) as connection:
        count: int = connection.execute("SELECT count(*) FROM load").fetchone()[0]
        for row in refused:
            count -= connection.execute("SELECT count(*) FROM load WHERE id = ?", (row,)).fetchone()[0]
        return count


COLUMNS: tuple[tuple[str, Callable[[Outcome, float], str]], ...] = (
    ("", lambda o, _: f"({o.key}) {o.name}"),
    ("writes/s", lambda o, _: f"{o.writes_per_second:,.0f}"),
    (f"vs ({COMPARED_WITH})", lambda o, base: f"{o.writes_per_second / base:.2f}x" if base else "-"),
    ("p50 ms", lambda o, _: f"{o.p50_ms:.3f}"),
    ("p99 ms", lambda o, _: f"{o.p99_ms:.3f}"),
    ("max ms", lambda o, _: f"{o.max_ms:.3f}"),
    ("locked errors", lambda o, _: f"{o.locked_errors:,}"),
    ("acknowledged", lambda o, _: f"{o.acknowledged:,}"),
    ("found again", lambda o, _: f"{o.found:,}"),
)


def describe(setup: Setup) -> str:
    """The lines above the table: what the figures depend on."""
    fast = "; faster than a disk: is the folder in memory? Try --path" if setup.fsync_ms < IN_MEMORY_MS else ""
    return (
        "onewriter bench: transactions that look, then write one row; one in 500 computes for 20 ms in between\n"
        f"Python {setup.python}, SQLite {setup.sqlite}, "
        f"journal mode {setup.journal_mode}, synchronous {setup.synchronous}\n"
        f"{setup.threads} threads, {setup.seconds:g} s each, "
        f"fsync of this disk {setup.fsync_ms:.3f} ms (median of {FSYNCS}{fast})\n"
    )


def table(outcomes: Sequence[Outcome]) -> str:
    """The figures, one row for each contestant, and what they mean."""
    base = next((o.writes_per_second for o in outcomes if o.key == COMPARED_WITH), 0.0)
    rows = [[title for title, _ in COLUMNS], *([cell(o, base) for _, cell in COLUMNS] for o in outcomes)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([*lines, "", *_remarks(outcomes)])


def _remarks(outcomes: Sequence[Outcome]) -> Iterator[str]:
    yield from _in_one_sentence({outcome.key: outcome for outcome in outcomes})
    yield 'locked errors: calls that failed with "database is locked". Latencies: all calls, failed ones too.'
    yield "(d): latency is that of the enqueue() call; writes/s count to the end of flush()."
    for outcome in outcomes:
        if outcome.other_errors:
            yield f"({outcome.key}): {outcome.other_errors:,} other errors; the first: {outcome.first_other_error}"
        if outcome.lost:
            yield f"({outcome.key}): LOST {outcome.lost:,} acknowledged writes"


def _in_one_sentence(outcomes: Mapping[str, Outcome]) -> Iterator[str]:
    """What the figures mean."""
    plain, gateway = outcomes.get("a"), outcomes.get("c")
    if plain is not None and gateway is not None:
        refused, calls = plain.locked_errors, plain.locked_errors + plain.acknowledged
        yield (
            f'With a connection for each thread sqlite3 refused {refused:,} of {calls:,} transactions ("database is '
            f'locked": the program has to begin anew); DbWriter.run refused {gateway.locked_errors:,}, and committed '
            f"{gateway.acknowledged:,} in the same time."
        )


def _write_json(file: Path, setup: Setup, outcomes: Sequence[Outcome]) -> None:
    numbers = {**dataclasses.asdict(setup), "contestants": [dataclasses.asdict(o) for o in outcomes]}
    file.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


def run(arguments: argparse.Namespace) -> int:
    """Run all contestants, print the table, and return the exit code."""
    level = logger.level
    logger.setLevel(logging.ERROR)  # a full queue is what the load is there for
    try:
        setup, outcomes = _measure_all(arguments)
        print(table(outcomes), flush=True)
        if arguments.json is not None:
            _write_json(arguments.json, setup, outcomes)
    except (OSError, RuntimeError, sqlite3.Error, OneWriterError) as error:
        print(f"onewriter bench failed: {error}", file=sys.stderr)
        return FAILED
    finally:
        logger.setLevel(level)
    return FAILED if any(o.other_errors or (o.gateway and o.lost) for o in outcomes) else 0


def _measure_all(arguments: argparse.Namespace) -> tuple[Setup, list[Outcome]]:
    threads, seconds = arguments.threads, arguments.seconds
    with tempfile.TemporaryDirectory(prefix="onewriter-bench-", dir=arguments.path, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        setup = Setup(
            python=platform.python_version(),
            sqlite=sqlite3.sqlite_version,
            journal_mode=JOURNAL_MODE,
            synchronous=SYNCHRONOUS,
            threads=threads,
            seconds=seconds,
            fsync_ms=fsync_ms(folder),
        )
        print(describe(setup), flush=True)
        progress = Progress(sys.stderr)
        try:
            return setup, [measure(c, folder, threads, seconds, progress) for c in CONTESTANTS]
        finally:
            progress.clear()


def add_command(subparsers: Any) -> None:
    """Add ``bench`` to the command line."""
    parser = subparsers.add_parser(
        "bench",
        help="compare plain sqlite3 with the gateway on this machine",
        description="Put the same load on plain sqlite3 and on the gateway, in a temporary folder, and compare. "
        "Exit codes: 0 done; 1 the gateway lost an acknowledged write, or the load met an error other than "
        '"database is locked"; '
        "2 bad arguments; 130 interrupted.",
    )
    parser.add_argument("--path", type=_folder, metavar="DIR", help="where to write (default: the temporary folder)")
    parser.add_argument("--threads", type=_threads, default=16, metavar="N", help="threads that write (default: 16)")
    parser.add_argument("--seconds", type=_seconds, default=3.0, metavar="S", help="seconds for each (default: 3)")
    parser.add_argument("--json", type=_file, metavar="FILE", help="write the same numbers there too")
    parser.set_defaults(run=run)


def _folder(text: str) -> Path:
    if not os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"there is no folder {text!r}")
    if not os.access(text, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"the folder {text!r} is not writable")
    return Path(text)


def _file(text: str) -> Path:
    if not text or os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a file")
    _folder(os.path.dirname(text) or ".")
    return Path(text)


def _threads(text: str) -> int:
    try:
        threads = int(text)
    except ValueError:
        threads = 0
    if not 1 <= threads <= MOST_THREADS:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to {MOST_THREADS}, not {text!r}")
    return threads


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, not {text!r}")
    return seconds
