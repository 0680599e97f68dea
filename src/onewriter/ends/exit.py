"""What happens to gateways that are still open when the interpreter ends."""

from __future__ import annotations

import atexit
import collections
import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from time import monotonic

from onewriter.base.log import report
from onewriter.ends.fork import forget_inherited, refuse_inherited
from onewriter.errors import ReentrantWriteError, closed_error
from onewriter.sqlite.file import FileMovedError, refuse_left_open
from onewriter.sqlite.path_checks import check_names
from onewriter.write.driver import Driver
from onewriter.write.writer import Writer

SLICE = 0.05  # seconds between two looks at whether jobs still finish
INTERRUPTS = 1000  # of the drain, by signal handlers, with which it goes on
HOOKS = 10  # each can be ended by one that comes between two bytecodes outside of its ``try``
_open: dict[Writer, Driver] = {}  # used in single steps: a lock could meet a signal handler that closes
_hooked = 0  # the process that has our hook in multiprocessing
_has_run = False  # the hook: nobody drains what is opened now


def drain_at_exit(writer: Writer, driver: Driver) -> None:
    _open[writer] = driver
    _hook_into_multiprocessing()


def _hook_into_multiprocessing() -> None:
    """Its children end by os._exit, without atexit, and have hooks of their own."""
    global _hooked
    process = sys.modules.get("multiprocessing.process")
    if process is not None and process.parent_process() is not None and _hooked != os.getpid():
        from multiprocessing.util import Finalize

        _hooked = os.getpid()
        for _ in range(HOOKS):
            Finalize(None, _drain_all, exitpriority=1)


def interpreter_ends() -> bool:
    """Whether the interpreter ends, and nobody would wait for a writer thread, if one could start at all."""
    return _has_run


def forget(writer: Writer) -> None:
    _open.pop(writer, None)


def others_on(path: str, mine: Writer | None = None) -> bool:
    """Whether another open gateway of this process has the same file, as its own or attached."""
    return any(writer is not mine for writer in _all_on(path))


def check_files(files: list[str], mine: Writer, read_only: Sequence[str] = ()) -> list[str]:
    """Raise if one of them must not be opened in this process; returns those that other gateways have open too."""
    for path in files:
        refuse_inherited(path)
    written = [path for path in files if path not in read_only]
    for path in written:
        check_names(path)
        _refuse_lost(path)
    return [path for path in written if others_on(path, mine)]


def _refuse_lost(path: str) -> None:
    """Raise FileMovedError if this process still has the file open with a log that is lost, which SQLite would go on
    using: it has one index of the log in memory for all connections of a process to a file.
    """
    refuse_left_open(path)
    for writer in _all_on(path):
        try:
            writer.file.check_logs()
        except FileMovedError as error:
            error.add_note(f"onewriter: it is still open in another DbWriter of this process, {writer.label}: close it")
            raise


def _all_on(path: str) -> list[Writer]:
    try:
        here = os.stat(path)
    except OSError:
        return []
    return [writer for writer in _open.copy() if writer.is_on(here)]


def _forget_in_child() -> None:
    inherited = _open.copy()
    _open.clear()
    forget_inherited(inherited)
    for driver in inherited.values():
        driver.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


def _drain_all() -> None:
    # The writers are daemon threads, because others are joined before any hook of ours runs: they would never be told
    # to end. They run on until atexit is through (https://docs.python.org/3/library/atexit.html).
    global _has_run
    _has_run = True
    todo, interrupt = _open.copy(), None
    for _ in range(INTERRUPTS):
        try:
            for writer in todo:
                writer.leaving = True
                writer.queue.refuse(closed_error())
            while todo:
                writer = next(iter(todo))
                _drain(writer, todo[writer])
                todo.pop(writer)
                _open.pop(writer, None)  # also one that was given up: the next hook has nothing to do
            break
        except BaseException as error:  # Ctrl-C, say; what was accepted is written all the same
            interrupt = error
    if interrupt is not None:
        raise interrupt


def _drain(writer: Writer, driver: Driver) -> None:
    """Wait while jobs finish; give up when none has finished for ``lock_timeout`` seconds."""
    with contextlib.suppress(ReentrantWriteError):  # this thread has left a block open
        driver.join(0.0)  # without a writer thread, only this writes what is queued
    finished, since, in_the_way = -1, monotonic(), ""
    while not writer.drained.wait(SLICE):
        writer.end_block_at_exit()
        if writer.state.waiting is not None:  # and after that the writer gives up
            in_the_way = writer.state.describe()
        now = writer.state.tally.finished
        if now != finished:
            finished, since = now, monotonic()
        elif monotonic() - since > writer.lock_timeout:
            break
    labels = writer.withdrawn + writer.queue.unfinished()
    if labels:
        counts = ", ".join(f"{count} × {label!r}" for label, count in collections.Counter(labels).most_common(20))
        text = "%s: %d jobs were not written at exit, since no job has finished for %s s: %s; %s"
        arguments = (writer.label, len(labels), writer.lock_timeout, counts, in_the_way or writer.state.describe())
        report(writer.state, logging.CRITICAL, text, *arguments)
    if writer.drained.is_set:
        writer.readers.stop_waiting()
        driver.join(writer.lock_timeout)


for _ in range(HOOKS):
    atexit.register(_drain_all)
