"""Call: a function that another thread calls, while a task waits for what it returns."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import Callable, Generator
from threading import get_ident
from typing import Any, Generic, TypeVar

from onewriter.base.waiting import resolve, wake
from onewriter.read.claim import Claim

T = TypeVar("T")


class Call(Generic[T]):
    """One call, for a task, of a function that may block.

    States:  asked → begun → done, or asked → withdrawn. What has begun goes on, whatever becomes of the task.
    Threads: made and awaited on a loop's thread; begun or withdrawn by any, in one step, since only one of them finds
             it among ``_asked``.
    """

    __slots__ = (
        "__weakref__",
        "_asked",
        "_claim",
        "_error",
        "_first",
        "_result",
        "_signal",
        "_withdrawn",
        "is_done",
        "then",
    )

    def __init__(self, claim: Claim | None, function: Callable[..., T], *args: Any) -> None:
        self._asked = [(function, args)]
        self._claim = claim  # whose connection it uses
        self._first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._signal = self._first  # of the present wait; ``ended`` has others
        self._result: Any = None
        self._error: BaseException | None = None
        self._withdrawn: list[Any] = []  # what was asked, if it will never begin
        self.is_done = False
        self.then: Callable[[], object] = object  # called when it is done, in its thread

    def run(self) -> None:
        """In the thread: call the function, unless the task has given up."""
        if self._first.cancelled():
            return
        try:
            function, args = self._asked.pop()
        except IndexError:
            return
        claim = self._claim
        if claim is not None:
            claim.runs_in = get_ident()
        try:
            self._result = function(*args)
        except BaseException as error:
            self._error = error
        finally:
            if claim is not None:
                claim.runs_in = 0
            self.is_done = True
            # Looked up behind ``is_done``: ``ended`` exchanges it, and looks behind that.
            wake([weakref.ref(self._signal)])
            self.then()

    def withdraw(self) -> bool:
        """Whether it will never begin."""
        with contextlib.suppress(IndexError):  # another thread has it
            self._withdrawn.extend(map(list.pop, (self._asked,)))  # in one step: a handler may raise behind each
        return bool(self._withdrawn)

    def expire(self, error: BaseException) -> None:
        """If it has not begun, it never does, and the task gets ``error``."""
        if self.withdraw():
            self._error, self.is_done = error, True
            resolve([self._signal])

    def __await__(self) -> Generator[Any, None, T]:
        yield from self._signal
        return self.outcome()

    def outcome(self) -> T:
        """Of one that is done, once: its error is kept by nobody else."""
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error
        return self._result  # type: ignore[no-any-return]

    async def ended(self) -> asyncio.CancelledError | None:
        """Wait for its end even if the task is cancelled, since it uses what must not be given back before; returns the
        cancellation.
        """
        loop, cancelled = asyncio.get_running_loop(), None
        while not self.is_done:
            self._signal = loop.create_future()
            if self.is_done:
                break
            try:
                await self._signal
            except asyncio.CancelledError as error:
                cancelled = error
        return cancelled
