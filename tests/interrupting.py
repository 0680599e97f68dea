"""A signal handler that raises, at one step after the other.

CPython looks for signals behind a call of C code and at the beginning of a function.
"""

from __future__ import annotations

import gc
import inspect
import sys
import types
from collections.abc import Callable
from pathlib import Path

import onewriter

OURS = str(Path(onewriter.__file__).parent)
GOES_ON = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


class SignalError(Exception):
    """What the handler raises."""


class Interrupter:
    """Raises at the place with the number ``at``, and again ``then`` places further on; or calls ``handler`` there."""

    def __init__(
        self,
        at: int,
        error: type[BaseException] = SignalError,
        then: int = 0,
        handler: Callable[[], object] | None = None,
    ) -> None:
        self.where = ""
        self._left, self._error, self._then, self._handler = at, error, then, handler

    def __enter__(self) -> Interrupter:
        gc.disable()  # what it frees are steps too, and what is raised in these nobody gets
        sys.setprofile(self._look)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        gc.enable()

    def _look(self, frame: types.FrameType, event: str, _: object) -> None:
        # Not as a generator or coroutine goes on: a signal handler comes behind that, where its ``except`` and
        # ``finally`` hold.
        # Nor as a part is about to be left: it stays open then, as docs/failures.md says.
        code = frame.f_code
        is_step = not code.co_flags & GOES_ON and code.co_qualname not in ("Part.__exit__", "Inside.__exit__")
        comes = event == "c_return" or (event == "call" and is_step)
        if comes and frame.f_code.co_filename.startswith(OURS):
            self._left -= 1
            if self._left == 0:
                self.where += f"{frame.f_code.co_qualname}, line {frame.f_lineno}; "
                self._left, self._then = self._then, 0
                if not self._left:
                    sys.setprofile(None)
                if self._handler is None:
                    raise self._error
                self._handler()
