"""The log, a warning, and the one way to run code of the user's whose errors nobody waits for."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import traceback
import warnings
from asyncio import _get_running_loop
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onewriter.holder import Holder

logger = logging.getLogger("onewriter")


def report(holder: Holder, level: int, message: str, *args: object, error: BaseException | None = None) -> None:
    """Log a line. A handler that fails or that itself enqueues does no harm to the thread that reports."""
    me = threading.get_ident()
    holder.reporting.add(me)
    try:
        logger.log(level, message, *args, exc_info=error)
    except BaseException as failure:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # no stderr, or a closed one
            traceback.print_exception(failure)
    finally:
        holder.reporting.discard(me)


def contain(holder: Holder, function: Callable[..., object], *args: Any) -> None:
    """Call ``function``; what it raises, SystemExit and KeyboardInterrupt too, is logged and goes no further."""
    try:
        function(*args)
    except BaseException as error:
        report(holder, logging.ERROR, "callback %r failed", function, error=error)


def warn_of_blocking() -> None:
    """In debug mode of asyncio, say that a call keeps the event loop from everything else."""
    loop = _get_running_loop()
    if loop is not None and loop.get_debug():
        frame, level = sys._getframe(1), 2
        while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("onewriter.", "contextlib")):
            frame, level = frame.f_back, level + 1
        text = "a DbWriter call blocks the event loop: await the one of AsyncDbWriter.wrap(db)"
        warnings.warn(text, RuntimeWarning, stacklevel=level)
