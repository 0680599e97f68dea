"""Call sites: where in the user's code a call was made. The only file that walks frames."""

from __future__ import annotations

import bisect
import os
import sys
import threading
import types
from collections.abc import Callable
from types import TracebackType

MOST_TABLES = 16  # line tables that are cached
# Each look at ``f_lasti`` may make an int; the thousands of jobs that wait from one line share one.
one_of: Callable[[int, int], int] = {}.setdefault  # type: ignore[assignment]

OURS = ("onewriter.",)
OURS_AND_CONTEXTLIB = (*OURS, "contextlib.")
POOL_LOOPS = (("_worker", "concurrent.futures.thread"), ("worker", "multiprocessing.pool"))


def caller() -> types.FrameType:
    """The frame of who called the function that calls this."""
    try:
        return sys._getframe(2)
    except ValueError:  # nobody in Python: atexit, a greenlet, or a thread that begins with it
        return sys._getframe(1)


def called_from(frame: types.FrameType, packages: tuple[str, ...] = OURS) -> str:
    """The line of the user's code, outside ``packages``: ``"file.py:123 in name"``."""
    frame = user_frame(frame, packages)
    return place_of(frame.f_code, frame.f_lasti)


def place_of(code: types.CodeType, instruction: int) -> str:
    return f"{os.path.basename(code.co_filename)}:{_line(code, instruction)} in {code.co_name}"


def _line(code: types.CodeType, instruction: int) -> int:
    # Cached by id, since hashing a code object hashes all its constants. A long queue may all come from one function.
    kept = _lines.get(id(code))
    if kept is None or kept[0] is not code:
        found = list(code.co_lines())
        if len(_lines) >= MOST_TABLES:
            _lines.clear()
        kept = _lines[id(code)] = code, [start for start, _, _ in found], [line for _, _, line in found]
    _, starts, lines = kept
    return lines[bisect.bisect_right(starts, instruction) - 1] or code.co_firstlineno


_lines: dict[int, tuple[types.CodeType, list[int], list[int | None]]] = {}


def is_ours(frame: types.FrameType, packages: tuple[str, ...] = OURS) -> bool:
    """Whether the frame runs code of one of ``packages``, which end in a dot; by default, of this one."""
    return f"{frame.f_globals.get('__name__', '')}.".startswith(packages)


def user_frame(frame: types.FrameType, packages: tuple[str, ...] = OURS) -> types.FrameType:
    """``frame``, or the nearest one outside this package that called it."""
    while is_ours(frame, packages) and frame.f_back is not None:
        frame = frame.f_back
    return frame


def level_around() -> int:
    """The ``stacklevel`` with which a warning of the caller's names the line of the user's code."""
    frame: types.FrameType | None = sys._getframe(1)
    level, outside = 1, user_frame(sys._getframe(1), OURS_AND_CONTEXTLIB)
    while frame is not None and frame is not outside:
        frame, level = frame.f_back, level + 1
    return level


def without_own_frames(traceback: TracebackType | None) -> TracebackType | None:
    """Drop the gateway's frames from the front: they refer to its connection, and say nothing about the job."""
    while traceback is not None and is_ours(traceback.tb_frame):
        traceback = traceback.tb_next
    return traceback


def call_of_pool() -> object | None:
    """What tells the current piece of work of a thread pool's worker from any other; None: this is no thread of a pool.

    The item of ``concurrent.futures``, since the frame refers to what it is called with. Another pool's frame.
    """
    if threading.current_thread() is threading.main_thread() and "multiprocessing.pool" not in sys.modules:
        return None  # of the main thread only a process of such a pool makes a worker
    called: types.FrameType = sys._getframe(1)
    frame = called.f_back
    while frame is not None:
        for name, module in POOL_LOOPS:
            if frame.f_code.co_name == name and frame.f_globals.get("__name__") == module:
                return _work_of(called) if name == "_worker" else called
        called, frame = frame, frame.f_back
    return None


def _work_of(frame: types.FrameType) -> object:
    found = frame.f_locals
    work = found.get("self", frame)
    if isinstance(found, dict):  # before Python 3.13 a copy, which keeps alive what the call itself lets go
        found.clear()
    return work
