"""Tests that have been collected, run in a fork for each mutant: importing and collecting them takes longer than most.

``python -m collected SECONDS ARGUMENTS`` is pytest up to where the tests would run, and says so in a line. Each line of
its input, a JSON list of a file, its text, a mutant's, and the ids of tests, is answered with a line: whether these
pass, each within ``SECONDS``, with the functions of the mutant (``true``, ``false``), or ``null`` if more than
functions would change. The file itself has to be changed too, for tests that start another interpreter or read the
source.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import sys
from collections.abc import Iterable
from io import FileIO
from time import monotonic, sleep
from types import CodeType, FunctionType

import pytest

LOOK = 0.01  # seconds between two looks at whether they have ended
Changes = list[tuple[CodeType, CodeType]]


class Collected:
    """The plugin."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._requests = os.fdopen(os.dup(0))
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what pytest prints is no answer

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        functions: dict[CodeType, list[FunctionType]] = {}
        for found in gc.get_objects():
            if isinstance(found, FunctionType):
                functions.setdefault(found.__code__, []).append(found)
        gc.collect()
        gc.freeze()  # or each fork copies, when it collects, what it never uses
        print("collected", file=self._answers, flush=True)
        for line in self._requests:
            file, text, mutant, names = json.loads(line)
            changes = _changes(compile(text, file, "exec"), compile(mutant, file, "exec"))
            known = changes is not None and all(code in functions for code, _ in changes)
            tests = [items[name] for name in names if name in items]  # others are not there any more
            answer = self._passes(session, tests, changes or [], functions) if known else None
            print(json.dumps(answer), file=self._answers, flush=True)
        return True

    def _passes(
        self,
        session: pytest.Session,
        items: list[pytest.Item],
        changes: Changes,
        functions: dict[CodeType, list[FunctionType]],
    ) -> bool:
        beats, beat = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.setsid()
                for code, new in changes:
                    for function in functions[code]:
                        function.__code__ = new
                status = not _run(session, items, beat)
            finally:
                os._exit(status)
        os.close(beat)
        with os.fdopen(beats, "rb", buffering=0) as told:
            ended, status = self._watch(child, told)
        try:
            os.killpg(child, signal.SIGKILL)
        except ProcessLookupError:
            pass
        if not ended:
            os.waitpid(child, 0)
        return status == 0

    def _watch(self, child: int, beats: FileIO) -> tuple[int, int]:
        """Wait until it ends, as ``os.waitpid`` does, or begins no further test for too long."""
        until = monotonic() + self._seconds
        while monotonic() < until:
            if select.select([beats], [], [], LOOK)[0]:
                if beats.read(4096):
                    until = monotonic() + self._seconds
                else:  # it has closed its end
                    sleep(LOOK)
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return ended, status
        return 0, 1


def _run(session: pytest.Session, items: Iterable[pytest.Item], beat: int) -> bool:
    """Whether all pass; ends with the first that does not. ``beat`` is told of each."""
    ordered = list(items)
    for item, following in zip(ordered, [*ordered[1:], None], strict=True):
        os.write(beat, b".")
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.testsfailed:
            return False
    return True


def _changes(old: CodeType, new: CodeType) -> Changes | None:
    """The outermost functions whose code is another; None if other code than that of functions is."""
    if old.co_code != new.co_code or old.co_names != new.co_names or len(old.co_consts) != len(new.co_consts):
        return None
    found: Changes = []
    for before, after in zip(old.co_consts, new.co_consts, strict=True):
        if not isinstance(before, CodeType):
            if before != after:
                return None
        elif before.co_flags & 2:  # CO_NEWLOCALS: a function
            if before != after:
                found.append((before, after))
        else:
            inner = _changes(before, after)
            if inner is None:
                return None
            found += inner
    return found


if __name__ == "__main__":
    sys.exit(pytest.main(sys.argv[2:], plugins=[Collected(float(sys.argv[1]))]))
