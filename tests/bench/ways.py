"""The way of each operation through the source: ``python tests/bench/ways.py [SRC]``.

How many functions of ``src/onewriter`` are called, and in how many files, by one call on an idle gateway: in all
threads together, from the call to its return, and for ``enqueue`` to the result of its ticket. On the right, the files
that are entered three times or more, and how often: a file is entered by a call from another file, at first or again.

SRC is the ``src`` of another checkout: its figures come first, then those of this one. ``--all`` counts the functions
of the standard library too: what asyncio or a thread pool does for us, or what is done without them.
"""

from __future__ import annotations

import argparse
import asyncio
import dis
import functools
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

SRC = Path(__file__).parents[2] / "src"
INSERT = "INSERT INTO t VALUES (1)"
SELECT = "SELECT n FROM t LIMIT 1"
WARM_UP, ROUNDS = 5, 15
REST = 0.01  # seconds after which every thread is idle again; shorter than what makes the writer checkpoint
OFTEN = 3


class Way(NamedTuple):
    functions: int
    files: int
    often: dict[str, int]  # the files that are entered OFTEN times or more


class Trace:
    """Counts calls into one folder, in each thread that starts after ``install``."""

    def __init__(self, folder: Path, counts_all: bool) -> None:
        self._folder = f"{folder}{os.sep}"
        self._left_out = __file__ if counts_all else ""
        self._is_on = False
        self._functions = 0
        self._entries: Counter[str] = Counter()

    def install(self) -> None:
        threading.setprofile(self._profile)
        sys.setprofile(self._profile)

    def begin(self) -> None:
        self._functions, self._entries = 0, Counter()
        self._is_on = True

    def end(self) -> Way:
        self._is_on = False
        return Way(self._functions, len(self._entries), dict(self._entries))

    def _profile(self, frame: types.FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if not self._is_on or event != "call":
            return
        if code.co_filename == self._left_out or not (self._left_out or code.co_filename.startswith(self._folder)):
            return
        self._functions += frame.f_lasti <= begin_of(code)
        caller = frame.f_back
        if caller is None or caller.f_code.co_filename != code.co_filename:
            self._entries[code.co_filename.removeprefix(self._folder)] += 1


@functools.cache
def begin_of(code: types.CodeType) -> int:
    """Where a call of it begins; a generator or coroutine that is resumed is at a later instruction."""
    return next(instruction.offset for instruction in dis.get_instructions(code) if instruction.opname == "RESUME")


def shortest(ways: list[Way]) -> Way:
    """The others have in them what a thread does after the caller has its outcome: that is a race."""
    way = min(ways, key=lambda way: way.functions)
    return way._replace(often={name: count for name, count in sorted(way.often.items()) if count >= OFTEN})


def insert(tx: Any) -> None:
    tx.execute(INSERT)


def threads_ways(db: Any) -> dict[str, Callable[[], object]]:
    def block() -> None:
        with db.transaction() as tx:
            tx.execute(INSERT)

    def reader() -> None:
        with db.reader() as connection:
            connection.execute(SELECT).fetchall()

    return {
        "run(sql)": lambda: db.run(INSERT),
        "run(fn)": lambda: db.run(insert),
        "enqueue(sql)": lambda: db.enqueue(INSERT).result(),
        "enqueue(fn)": lambda: db.enqueue(insert).result(),
        "with transaction()": block,
        "read": lambda: db.read(SELECT),
        "with reader()": reader,
    }


def tasks_ways(db: Any) -> dict[str, Callable[[], Awaitable[object]]]:
    async def block() -> None:
        async with db.transaction() as tx:
            await tx.execute(INSERT)

    async def reader() -> None:
        async with db.reader() as snapshot:
            await snapshot.execute(SELECT)

    return {
        "await run(sql)": lambda: db.run(INSERT),
        "await run(fn)": lambda: db.run(insert),
        "async with transaction()": block,
        "await read": lambda: db.read(SELECT),
        "async with reader()": reader,
    }


def walk_threads(trace: Trace, path: Path) -> Iterator[tuple[str, Way]]:
    from onewriter import DbWriter

    with DbWriter(path, synchronous="OFF") as db:
        db.run_script(f"CREATE TABLE t (n); {INSERT}")
        for name, way in threads_ways(db).items():
            found = []
            for _ in range(WARM_UP + ROUNDS):
                time.sleep(REST)
                trace.begin()
                way()
                found.append(trace.end())
            yield name, shortest(found[WARM_UP:])


async def walk_tasks(trace: Trace, path: Path) -> dict[str, Way]:
    from onewriter import AsyncDbWriter

    walked = {}
    async with AsyncDbWriter(path, synchronous="OFF") as db:
        for name, way in tasks_ways(db).items():
            found = []
            for _ in range(WARM_UP + ROUNDS):
                await asyncio.sleep(REST)
                trace.begin()
                await way()
                found.append(trace.end())
            walked[name] = shortest(found[WARM_UP:])
    return walked


def walk_all(src: Path, counts_all: bool) -> dict[str, Way]:
    """The ways through ``src``, which this process must not have imported from elsewhere."""
    sys.path.insert(0, str(src))
    trace = Trace(src / "onewriter", counts_all)
    trace.install()
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ways.db"
        return {**dict(walk_threads(trace, path)), **asyncio.run(walk_tasks(trace, path))}


def walk_apart(src: Path, counts_all: bool) -> dict[str, Way]:
    command = [sys.executable, __file__, "--json", *["--all"] * counts_all, str(src)]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return {name: Way(*values) for name, values in found.items()}


def table(columns: list[dict[str, Way]]) -> Iterator[str]:
    yield f"{'':26}{' | '.join(['functions/files'] * len(columns))}   entered {OFTEN} times or more"
    for name in columns[-1]:
        ways = [column[name] for column in columns]
        often = ", ".join(f"{file} {count}" for file, count in ways[-1].often.items()) or "-"
        figures = " | ".join(f"{way.functions:>11}/{way.files:<3}" for way in ways)
        yield f"{name:26}{figures}   {often}"


def main() -> None:
    parser = argparse.ArgumentParser(description="The way of each operation through the source.")
    parser.add_argument("src", nargs="?", type=Path, help="the src of another checkout, to compare with")
    parser.add_argument("--all", action="store_true", help="count the functions of the standard library too")
    parser.add_argument("--json", action="store_true", help="that one alone, for programs")
    arguments = parser.parse_args()
    if arguments.json:
        print(json.dumps(walk_all((arguments.src or SRC).resolve(), arguments.all)))
    else:
        sources = [src.resolve() for src in (arguments.src, SRC) if src is not None]
        print("\n".join(table([walk_apart(src, arguments.all) for src in sources])))


if __name__ == "__main__":
    main()
