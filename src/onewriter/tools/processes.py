"""The processes that put the load of ``bench`` on a file: they are started, told to begin, and report."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from types import TracebackType

from onewriter.tools.load import Share, Task


class LoadError(Exception):
    """A process of the load could not do its part."""


class Process:
    """One process of the load, which ends with the ``with`` block at the latest.

    Threads: ``ready``, ``calls``, ``share`` and ``error`` are written by the thread that hears it, and read by the
    main one; ``share`` and ``error`` after ``has_ended``.
    """

    def __init__(self, task: Task) -> None:
        self.calls = 0
        self.share: Share | None = None
        self.error = ""
        self.ready = threading.Event()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "onewriter.tools.load", json.dumps(dataclasses.asdict(task))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # Ctrl-C is for the bench, which ends them
        )
        self._hearing = threading.Thread(target=self._hear, daemon=True)
        self._hearing.start()

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._hearing.join()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()

    def begin(self) -> None:
        """Once it is ready, have it begin."""
        self.ready.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: ``result`` says why
            self._process.stdin.write(b"!")
            self._process.stdin.flush()

    def has_ended(self, wait: float) -> bool:
        """Whether all that it had to say is heard; waits up to ``wait`` seconds for that."""
        self._hearing.join(wait)
        return not self._hearing.is_alive()

    def result(self) -> Share:
        """Once it has ended. Raises LoadError."""
        self._hearing.join()
        if self.share is None:
            raise LoadError(self.error or "a process of the load has ended too early")
        return self.share

    def _hear(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message = json.loads(line)
            self.calls = message.get("calls", self.calls)
            self.error = message.get("error", self.error)
            if "share" in message:
                self.share = Share(**message["share"])
            if "ready" in message:
                self.ready.set()
        self.ready.set()  # nobody waits for one that has ended


def begin_together(processes: Sequence[Process]) -> None:
    for process in processes:
        process.ready.wait()
    for process in processes:
        process.begin()


def merged(shares: Iterable[Share]) -> Share:
    """What all of them did, at the same time."""
    whole = Share()
    for share in shares:
        whole.seconds = max(whole.seconds, share.seconds)
        whole.latencies += share.latencies
        whole.refused += share.refused
        whole.locked += share.locked
        whole.others += share.others
    return whole
