"""What ``on_event`` is called with: one frozen dataclass for each kind of event. Times are seconds.

Without ``on_event`` none of them is created. What the callable raises is logged; if it waits for the gateway on the
writer thread, that raises ``ReentrantWriteError``. No event has values of parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from onewriter.base.log import call_safely
from onewriter.base.state import State
from onewriter.errors import Outcome


@dataclass(frozen=True, slots=True)
class JobSubmitted:
    """A job is about to be queued; published in the thread, and in the context, of the call.

    Attributes:
        ticket: its label, place of the call, and later its outcome and timings.
        waits: whether the caller waits for the outcome; False for ``enqueue``.
    """

    ticket: Outcome
    waits: bool


@dataclass(frozen=True, slots=True)
class BatchEnded:
    """Jobs that shared a transaction have their outcome, and callers that wait were woken; on the writer thread.

    Attributes:
        tickets: the jobs, in order; each has its ``timings``, and its ``exception()`` if it failed.
        commits: 1, or 0 if nothing was committed.
        lock_wait: seconds of waiting for SQLite's lock. commit: seconds that COMMIT took.
        retried: whether another connection held that lock.
    """

    tickets: tuple[Outcome, ...]
    commits: int
    lock_wait: float
    commit: float
    retried: bool


@dataclass(frozen=True, slots=True)
class CheckpointEnded:
    """A checkpoint of the write-ahead log, as ``checkpoint()`` reports it, and how long it took; writer thread."""

    mode: str
    busy: bool
    log: int
    checkpointed: int
    seconds: float


@dataclass(frozen=True, slots=True)
class BackupEnded:
    """A backup is complete; published in the thread of the call."""

    seconds: float


@dataclass(frozen=True, slots=True)
class WriterBroken:
    """The gateway is out of service; ``cause`` is why."""

    cause: BaseException


Event: TypeAlias = JobSubmitted | BatchEnded | CheckpointEnded | BackupEnded | WriterBroken
Hook: TypeAlias = Callable[[Event], object]
Submit: TypeAlias = Callable[[Any, float | None], None]


def publish(state: State, hook: Hook, event: Event) -> None:
    """On the writer thread."""
    state.begin_callbacks(None)
    call_safely(state, hook, event)
    state.end_callbacks()


def announce(state: State, hook: Hook | None, job: Any, waits: bool) -> None:
    """Publish that a job is about to be queued, unless it is one of the gateway's, such as ``flush``."""
    if hook is not None and job.in_stats:
        call_safely(state, hook, JobSubmitted(job, waits))
