"""Where in the user's code a call came from."""

from __future__ import annotations

import bisect
import contextlib
import os
import sys
import types
from types import TracebackType

MOST_TABLES = 16  # of lines that are kept


def called_from(frame: types.FrameType) -> str:
    """Where the user's code called: ``"file.py:123 in name"``."""
    frame = user_frame(frame)
    return place_of(frame.f_code, frame.f_lasti)


def place_of(code: types.CodeType, instruction: int) -> str:
    return f"{os.path.basename(code.co_filename)}:{_line(code, instruction)} in {code.co_name}"


def _line(code: types.CodeType, instruction: int) -> int:
    # By its id: a code's hash is that of all its constants. A generated one can have handed in all of a long queue.
    kept = _lines.get(id(code))
    if kept is None or kept[0] is not code:
        found = list(code.co_lines())
        if len(_lines) >= MOST_TABLES:
            _lines.clear()
        kept = _lines[id(code)] = code, [start for start, _, _ in found], [line for _, _, line in found]
    _, starts, lines = kept
    return lines[bisect.bisect_right(starts, instruction) - 1] or code.co_firstlineno


_lines: dict[int, tuple[types.CodeType, list[int], list[int | None]]] = {}


def user_frame(frame: types.FrameType) -> types.FrameType:
    """``frame``, or the nearest one outside this package that called it."""
    while frame.f_globals.get("__name__", "").startswith("onewriter.") and frame.f_back is not None:
        frame = frame.f_back
    return frame


def frame_around() -> types.FrameType:
    """Of the user's code that enters this block, with ``async with`` or an AsyncExitStack."""
    frame = user_frame(sys._getframe(1))
    while frame.f_globals is vars(contextlib) and frame.f_back is not None:
        frame = frame.f_back
    return frame


def without_own_frames(traceback: TracebackType | None) -> TracebackType | None:
    """Cut the gateway's own frames off: they hold its connection, and say nothing of the job."""
    while traceback is not None and traceback.tb_frame.f_globals.get("__name__", "").startswith("onewriter."):
        traceback = traceback.tb_next
    return traceback
