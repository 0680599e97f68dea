"""The same load on plain sqlite3 and on the gateway: ``python -m onewriter bench``."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sqlite3
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, TextIO

from onewriter.tools import contestants
from onewriter.tools.contestants import CREATE, JOURNAL_MODE, Contestant, connect
from onewriter.tools.disk import fsync_ms
from onewriter.tools.figures import Outcome, Setup, describe, outcome, table, write_json
from onewriter.tools.load import Share, Task
from onewriter.tools.processes import LoadError, Process, begin_together, merged

MOST_THREADS = 1000
PROCESSES = 4
HOLD = 6.0  # seconds for which a slow writer holds the lock: longer than sqlite3's default timeout
AFTER = 0.5  # seconds of load after that
TICK = 0.1  # seconds between two updates of the progress line
START = 0.4  # seconds that it takes to begin and to end with a contestant
FAILED = 1  # exit code


@dataclass(frozen=True)
class Load:
    """The load for each contestant: one after the other, or all at once where they only wait."""

    name: str
    contestants: Sequence[Contestant]
    threads: int  # of each process
    seconds: float
    processes: int = 1
    hold: float = 0.0

    @property
    def turns(self) -> list[Sequence[Contestant]]:
        return [self.contestants] if self.hold else [[one] for one in self.contestants]


def loads(threads: int, seconds: float) -> list[Load]:
    each = max(1, threads // PROCESSES)
    return [
        Load(_threads_in_words(threads), contestants.THREADS, threads, seconds),
        Load(
            f"{PROCESSES} processes with {_threads_in_words(each)} each",
            contestants.PROCESSES,
            each,
            seconds,
            PROCESSES,
        ),
        Load(
            f"{_threads_in_words(threads)}, while another process holds SQLite's write lock for {HOLD:g} s",
            contestants.BESIDE_A_SLOW_WRITER,
            threads,
            HOLD + AFTER,
            hold=HOLD,
        ),
    ]


def _threads_in_words(count: int) -> str:
    return f"{count} thread{'s' * (count != 1)}"


class Progress:
    """Shows the progress: one line that is rewritten on a terminal, one line for each turn elsewhere."""

    def __init__(self, stream: TextIO, turns: int) -> None:
        self._stream = stream
        self._live = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._turns = turns
        self._turn = 0
        self._name = ""

    def begin(self, name: str) -> None:
        self._turn += 1
        self._name = f"[{self._turn} of {self._turns}] {name}"
        if not self._live:
            self._say(f"{self._name} ...\n")

    def update(self, elapsed: float, calls: int) -> None:
        if self._live:
            self._say(f"\r{self._name}: {elapsed:.1f} s, {calls:,} writes\x1b[K")

    def clear(self) -> None:
        if self._live:
            self._say("\r\x1b[K")

    def _say(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def _prepare(path: Path) -> None:
    with contextlib.closing(connect(path)) as connection:
        mode = connection.execute(f"PRAGMA journal_mode = {JOURNAL_MODE}").fetchone()[0]
        if mode.upper() != JOURNAL_MODE:
            raise OSError(f"the file system of {path.parent} does not allow journal mode {JOURNAL_MODE}")
        connection.execute(CREATE)


def measure(load: Load, turn: Sequence[Contestant], folder: Path, progress: Progress) -> list[Outcome]:
    """Put the load on the contestants of this turn, each in a new file, and count what is there after reopening it."""
    progress.begin(", ".join(f"({one.key}) {one.name}" for one in turn))
    paths = [folder / f"{one.key}.db" for one in turn]
    with contextlib.ExitStack() as stack:
        running = []
        for contestant, path in zip(turn, paths, strict=True):
            _prepare(path)
            running.append([stack.enter_context(Process(task)) for task in _tasks(load, contestant, path)])
        holding = [stack.enter_context(Process(Task(str(path), hold=load.hold))) for path in paths if load.hold]
        at_work = [process for processes in running for process in processes]
        begin_together([*holding, *at_work])
        _hear(at_work, progress)
        shares = [merged(process.result() for process in processes) for processes in running]
        for process in holding:
            process.result()
    return [
        outcome(contestant, load.name, share, _count_rows(path, share))
        for contestant, path, share in zip(turn, paths, shares, strict=True)
    ]


def _tasks(load: Load, contestant: Contestant, path: Path) -> list[Task]:
    task = Task(
        str(path),
        contestant.open.__module__,
        contestant.open.__name__,
        load.threads,
        load.seconds,
        stride=load.threads * load.processes,
        timeout=contestants.TIMEOUT,
    )
    return [replace(task, first=number * load.threads) for number in range(load.processes)]


def _hear(processes: Sequence[Process], progress: Progress) -> None:
    began = perf_counter()
    for process in processes:
        while not process.has_ended(TICK):
            progress.update(perf_counter() - began, sum(one.calls for one in processes))
    progress.clear()


def _count_rows(path: Path, share: Share) -> int:
    """Rows in the file, without those of writes that reported an error (an error may come after the fact)."""
    with contextlib.closing(connect(path)) as connection:
        count: int = connection.execute("SELECT count(*) FROM load").fetchone()[0]
        for row in share.refused:
            count -= connection.execute("SELECT count(*) FROM load WHERE id = ?", (row,)).fetchone()[0]
        return count


def run(arguments: argparse.Namespace) -> int:
    """Measure all contestants, print the table, and return the exit code."""
    try:
        setup, outcomes = _measure_all(arguments)
        print(table(outcomes), flush=True)
        if arguments.json is not None:
            write_json(arguments.json, setup, outcomes)
    except BrokenPipeError:  # the output was closed: the command line handles it
        raise
    except (OSError, sqlite3.Error, LoadError) as error:
        print(f"onewriter bench failed: {error}", file=sys.stderr)
        return FAILED
    return FAILED if any(o.other_errors or (o.gateway and o.lost) for o in outcomes) else 0


def _measure_all(arguments: argparse.Namespace) -> tuple[Setup, list[Outcome]]:
    turns = [(load, turn) for load in loads(arguments.threads, arguments.seconds) for turn in load.turns]
    with tempfile.TemporaryDirectory(prefix="onewriter-bench-", dir=arguments.path, ignore_cleanup_errors=True) as name:
        setup = Setup(arguments.threads, arguments.seconds, fsync_ms(Path(name)))
        takes = sum(load.seconds + START for load, _ in turns)
        print(describe(setup), f"It takes about {takes:.0f} s.\n", sep="\n", flush=True)
        progress = Progress(sys.stderr, len(turns))
        try:
            measured = [measure(load, turn, Path(name), progress) for load, turn in turns]
        finally:
            progress.clear()
    return setup, [one for outcomes in measured for one in outcomes]


def add_command(subparsers: Any) -> None:
    """Add ``bench`` to the command line."""
    parser = subparsers.add_parser(
        "bench",
        help="compare plain sqlite3 with the gateway on this machine",
        description="Put the same load on plain sqlite3 and on the gateway, from threads and from processes, in a "
        "temporary folder, and compare. "
        "Exit codes: 0 done; 1 the gateway lost an acknowledged write, or the load met an error other than "
        '"database is locked"; '
        "2 bad arguments; 130 interrupted.",
    )
    parser.add_argument(
        "--path", type=_folder, metavar="DIR", help="folder to write to (default: the system's temporary folder)"
    )
    parser.add_argument("--threads", type=_threads, default=16, metavar="N", help="threads that write (default: 16)")
    parser.add_argument(
        "--seconds",
        type=_seconds,
        default=2.0,
        metavar="S",
        help=f"seconds for each load (default: 2); with a slow writer: {HOLD + AFTER:g}",
    )
    parser.add_argument("--json", type=_file, metavar="FILE", help="also write the figures to this file")
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
