"""The log, a warning, and the one way to call the user's code where no caller waits for its errors."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import queue
import sys
import threading
import traceback
import warnings
from asyncio import _get_running_loop
from collections.abc import Callable, Iterable
from threading import get_ident
from time import monotonic
from types import TracebackType
from typing import Any, Protocol

from onewriter.base.call_site import level_around
from onewriter.errors import forked_error

logger = logging.getLogger("onewriter")
INTERRUPTS = (KeyboardInterrupt, SystemExit)
PATIENCE = 2.0  # seconds without any line being logged, after which nothing waits for the log any more
MOMENT = 0.1  # seconds that a caller with an outcome waits until earlier failures are logged
MOST_LINES = 100_000  # that wait: a handler that hangs must not take all the memory


class State(Protocol):
    """Whose log it is, and which thread is its writer."""

    writer_thread: int
    forked: bool
    reporting: set[int]
    reporter: Reporter | None
    interrupt: BaseException | None


class Reporter:
    """Logs what the writer thread reports, in a thread of its own, which runs from the first line to ``close``.

    A handler may block, need a lock whose owner waits for the writer, or enqueue: the writer must not wait for it.

    Threads: ``say`` is called by the writer thread, also by a finalizer inside ``say``; ``wait`` by any.
    """

    def __init__(self, state: State, name: str) -> None:
        self._state = state
        self._name = name
        self._lines: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._reported = 0  # lines; by the writer thread
        self._logged = 0  # lines; by the reporter's
        self._dropped = 0
        self._stuck_at = -1  # so many were logged when a short wait was not enough

    @property
    def is_behind(self) -> bool:
        """Whether something is not logged yet."""
        return self._logged < self._reported

    def say(self, level: int, message: str, args: tuple[object, ...], error: BaseException | None) -> None:
        if self._reported - self._logged >= MOST_LINES and level < logging.CRITICAL:
            self._dropped += 1
            return
        self._reported += 1
        self._lines.put(functools.partial(self._tell, level, message, args, error))
        if self._thread is None:
            self._start()

    def wait(self, until: float = math.inf) -> None:
        """Wait until everything is logged, or a handler hangs."""
        if not self.is_behind or get_ident() in self._state.reporting:  # a handler waits for no handler
            return
        out, logged = threading.Lock(), -1
        out.acquire()
        self._lines.put(out.release)
        while logged != self._logged and monotonic() < until:
            logged = self._logged
            if out.acquire(timeout=max(0.0, min(PATIENCE, until - monotonic()))):
                return

    def catch_up(self) -> None:
        """Wait for a moment, so that a caller with a later job's outcome finds earlier failures in the log."""
        if self._stuck_at != self._logged:
            self.wait(monotonic() + MOMENT)
            self._stuck_at = self._logged if self.is_behind else -1

    def close(self) -> None:
        """The writer will report nothing more."""
        self.wait()
        if self._thread is not None:
            self._lines.put(None)
            self._thread.join(PATIENCE)

    def _start(self) -> None:
        self._thread = thread = threading.Thread(target=self._main, name=self._name, daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no more threads, as when the interpreter ends
            self._thread = None
            with contextlib.suppress(queue.Empty):
                while (line := self._lines.get_nowait()) is not None:
                    line()

    def _main(self) -> None:
        for line in iter(self._lines.get, None):
            line()
            del line  # its error, and what that holds, need not outlive the telling
            if self._state.forked:
                return  # a handler has forked, and this is the child

    def _tell(self, level: int, message: str, args: tuple[object, ...], error: BaseException | None) -> None:
        try:
            _log(self._state, level, message, args, error)
        except BaseException as failure:
            _print(failure)
        self._logged += 1
        if self._dropped:
            args, self._dropped = (self._dropped,), 0
            text = "%d lines were dropped, since the handlers of the log are slower than what there is to say"
            self._tell(logging.CRITICAL, text, args, None)


def report(state: State, level: int, message: str, *args: object, error: BaseException | None = None) -> None:
    """Log a line. No handler keeps the writer thread waiting, and what one raises does not propagate.

    In a thread of the user's, KeyboardInterrupt and SystemExit propagate.
    """
    if state.reporter is not None and get_ident() == state.writer_thread:
        state.reporter.say(level, message, args, error)
    else:
        _run(state, _print, _log, state, level, message, args, error)


def call_safely(state: State, function: Callable[..., object], *args: Any) -> None:
    """Call ``function``; what it raises is logged, and does not propagate.

    KeyboardInterrupt and SystemExit propagate in a thread of the user's: at once, or, if that is the writer, at the end
    of its turn. In a child that ``function`` has forked on the writer's stack: ForkedError.
    """
    _run(state, functools.partial(_report_callback, state, function), function, *args)


def call_all_safely(state: State, calls: Iterable[tuple[Any, ...]]) -> None:
    """``call_safely`` each function with its arguments; an interrupt propagates when all were called."""
    is_writer = get_ident() == state.writer_thread
    rest = iter(calls)
    try:
        for function, *args in rest:
            if state.forked:
                return  # one of them has forked: the others are the parent's
            try:
                function(*args)  # not by a function of ours, as which begins a signal handler could raise
            except BaseException as error:
                if _propagates(state, is_writer, error, functools.partial(_report_callback, state, function)):
                    raise
            if is_writer and state.forked:
                raise forked_error()
    except BaseException:  # what a signal handler raises may come between two of them
        call_all_safely(state, rest)
        raise


def _report_callback(state: State, function: Callable[..., object], error: BaseException) -> None:
    report(state, logging.ERROR, "callback %r failed", function, error=error)


def _run(state: State, tell: Callable[[BaseException], object], function: Callable[..., object], *args: Any) -> None:
    is_writer = get_ident() == state.writer_thread
    try:
        function(*args)
    except BaseException as error:
        if _propagates(state, is_writer, error, tell):
            raise
    if is_writer and state.forked:
        raise forked_error()


def _propagates(state: State, is_writer: bool, error: BaseException, tell: Callable[[BaseException], object]) -> bool:
    """Whether ``error`` is to be raised again; or else it is told, or kept for the end of the turn."""
    if is_writer and state.forked:
        return True
    if not issubclass(type(error), INTERRUPTS) or (is_writer and state.reporter is not None):
        tell(error)
        return False
    if is_writer:
        state.interrupt = error if state.interrupt is None else state.interrupt
    return not is_writer


def _log(state: State, level: int, message: str, args: tuple[object, ...], error: BaseException | None) -> None:
    me = get_ident()
    is_outermost = me not in state.reporting
    state.reporting.add(me)
    try:
        if error is None:
            logger.log(level, message, *args)
        elif _can_be_shown(error):
            logger.log(level, message, *args, exc_info=(type(error), error, traceback_of(error)))
        else:
            logger.log(level, f"{message}: %s", *args, text_of(error))
    finally:
        if is_outermost:
            state.reporting.discard(me)


def _print(failure: BaseException) -> None:
    with contextlib.suppress(BaseException):  # one that cannot be written to
        if sys.stderr is not None:  # without it, this would go to stdout
            traceback.print_exception(failure)


# An exception is an object of the user's: its attributes, its text and even its ``__class__`` may raise anything.


def traceback_of(error: BaseException) -> TracebackType | None:
    """The one that Python itself uses, whatever the class has put in its place."""
    found: TracebackType | None = vars(BaseException)["__traceback__"].__get__(error)
    return found


def text_of(error: BaseException) -> str:
    try:
        return str(error) or type(error).__name__
    except BaseException:
        return f"{type(error).__name__}, which has no text"


def has_note(error: BaseException, note: str) -> bool:
    try:
        return note in getattr(error, "__notes__", ())
    except BaseException:
        return False


def _can_be_shown(error: BaseException) -> bool:
    try:
        str(error)
        getattr(error, "__notes__", None)
        return error.__traceback__ is traceback_of(error)
    except BaseException:
        return False


def warn_of_blocking() -> None:
    """In debug mode of asyncio, warn that a call blocks the event loop."""
    loop = _get_running_loop()
    if loop is not None and loop.get_debug():
        text = "a DbWriter call blocks the event loop: await the one of AsyncDbWriter.wrap(db)"
        warnings.warn(text, RuntimeWarning, stacklevel=level_around())
