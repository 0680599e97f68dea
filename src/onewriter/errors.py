"""What onewriter raises.

OneWriterError
├── WriterClosedError          closed or closing: the work was not accepted
├── WriterBrokenError          the gateway is out of service; ``__cause__`` is the reason
├── CommitUnknownError         COMMIT met an error that leaves the outcome open
├── QueueFullError             no room in the queue within the timeout
├── WriteTimeoutError          (also a TimeoutError) the wait for a write ended first
├── ReadTimeoutError           (also a TimeoutError) the wait for a read ended first
├── ReentrantWriteError        the call would be a deadlock
├── TransactionClosedError     a Transaction used after its end, or a function's in another thread
├── TransactionAbortedError    SQLite rolled back by itself and the job went on
└── ForkedError                used in a child process, after a fork

What a job or SQLite raised reaches the caller unchanged, with a note that names the job.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol


class Outcome(Protocol):
    """A ``Ticket``, as an error and an event have it."""

    @property
    def label(self) -> str: ...
    @property
    def called_from(self) -> str: ...
    @property
    def timings(self) -> Any: ...
    @property
    def sequence(self) -> int | None: ...
    def done(self) -> bool: ...
    def running(self) -> bool: ...
    def cancelled(self) -> bool: ...
    def cancel(self) -> bool: ...
    def result(self, timeout: float | None = None) -> Any: ...
    def exception(self, timeout: float | None = None) -> BaseException | None: ...
    def add_done_callback(self, fn: Any, /) -> None: ...
    def future(self) -> Any: ...
    def __await__(self) -> Any: ...


class OneWriterError(Exception):
    """Base of every error that onewriter itself raises."""


class WriterClosedError(OneWriterError):
    """The gateway is closed or closing. Not committed."""


class WriterBrokenError(OneWriterError):
    """The gateway is out of service; ``__cause__`` is the reason. Not committed. Open a new ``DbWriter``."""


class CommitUnknownError(OneWriterError):
    """COMMIT failed (``__cause__``), and the write may or may not be in the file; or, of several, in some. Unknown."""


class QueueFullError(OneWriterError):
    """The queue had no room for an ``enqueue`` within its timeout. Not committed."""


class WriteTimeoutError(OneWriterError, TimeoutError):
    """The wait for a write ended before its result came.

    Attributes:
        ticket: the job's ticket; None in a pickled copy.
        started: False: the job was withdrawn and will never run (Not committed). True: it goes on to its end, and
            ``ticket`` will have its outcome.
    """

    def __init__(self, message: str, *, ticket: Outcome, started: bool) -> None:
        super().__init__(message)
        self.ticket = ticket
        self.started = started

    def __reduce__(self) -> Any:
        ticket: Any = None  # which is of its process
        return functools.partial(type(self), ticket=ticket, started=self.started), self.args


class ReadTimeoutError(OneWriterError, TimeoutError):
    """The wait for a read ended before its result came. Nothing was changed."""


class ReentrantWriteError(OneWriterError):
    """The call would wait for something that itself waits for the caller. Not committed; but a wait for a ticket
    changes nothing, and a block that was left well is committed later, as its message says."""


class TransactionClosedError(OneWriterError):
    """A ``Transaction`` was used after its end, or that of a function in another thread."""


class TransactionAbortedError(OneWriterError):
    """SQLite rolled the transaction back by itself, and the job went on. Rolled back."""


class ForkedError(OneWriterError):
    """A gateway was used in a child process after a fork, or its file was opened there again. Not committed."""


ADVICE = "close the gateway before the fork, and open one in the child after it"


def forked_error() -> ForkedError:
    return ForkedError(f"this gateway belongs to the parent of this process: {ADVICE}")


CLOSED = "the gateway is closed: open a new DbWriter"


def closed_error() -> WriterClosedError:
    return WriterClosedError(CLOSED)
