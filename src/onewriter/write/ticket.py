"""Job and Ticket: what crosses the thread boundary, and the handle of its outcome."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
import math
import types
import weakref
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from time import monotonic
from typing import Any, Generic, NoReturn, TypeVar, cast

from onewriter.base.arguments import check_callback, check_timeout
from onewriter.base.call_site import one_of, place_of
from onewriter.base.log import call_all_safely, call_safely, warn_of_blocking
from onewriter.base.state import State
from onewriter.base.tally import Times, Timings
from onewriter.base.task_waits import within
from onewriter.base.waiting import Signal, thread_signal, wait_in_slices, wake
from onewriter.errors import forked_error
from onewriter.sqlite.guard import Mode

T = TypeVar("T")


PENDING, RUNNING, CANCELLED, DONE = range(4)
LABEL_LENGTH = 60


class Ticket(Generic[T]):
    """A handle for the outcome of a write, like a ``concurrent.futures.Future``; set only after COMMIT or ROLLBACK.

    States:  PENDING → RUNNING → DONE; PENDING → CANCELLED or DONE. Never backwards.
    Locks:   the gateway's one ``state.lock`` guards _stage, _waiters and _callbacks. A wait checks the state
             and leaves its wake-up lock in one hold of it, and the outcome is set and the wake-ups are taken in one
             hold: with or without a GIL, a wait either sees the outcome or is woken. Between the look and the store no
             call is made and no list, in which a finalizer or signal handler could set the outcome; and no list is
             copied, since thousands may wait.
    Threads: every method may be called from any thread; the outcome is written by the writer thread before DONE.
    """

    # No locks, lists or objects for times before they are needed: the garbage collector visits every queued job.
    __slots__ = (
        "__weakref__",
        "_callbacks",
        "_code",
        "_error",
        "_instruction",
        "_is_queued",
        "_label",
        "_result",
        "_sequence",
        "_stage",
        "_state",
        "_times",
        "_waiters",
        "created_at",
        "ended_at",
        "started_at",
        "work",
    )
    in_stats = True  # in the statistics
    logs_failure = True  # a failure that nobody waits for is logged and given to on_error

    def __init__(self, state: State, label: str | None, frame: types.FrameType, work: Any) -> None:
        self._state = state
        self._label = label
        instruction = frame.f_lasti
        self._code, self._instruction = frame.f_code, one_of(instruction, instruction)
        self._stage = PENDING
        self._result: Any = None
        self._error: BaseException | None = None
        self._waiters: list[Any] | None = None
        self._callbacks: list[Callable[[Ticket[T]], object]] | None = None
        self.work = work  # what the job needs; dropped when it is over
        self.created_at = monotonic()
        # These are set when there is something to say.
        self._times: Times
        self._sequence: int
        self._is_queued: bool
        self.started_at: float
        self.ended_at: float

    def __repr__(self) -> str:
        state = ("pending", "running", "cancelled", "done")[self._stage]
        return f"<{type(self).__name__} {self.label!r} {state}>"

    @property
    def label(self) -> str:
        """The job's name in logs and messages; default: the function's qualified name or the SQL's beginning."""
        return self._label or ""

    @property
    def called_from(self) -> str:
        """Where the call was made: ``"file.py:123 in name"``."""
        return place_of(self._code, self._instruction)

    @property
    def timings(self) -> Timings | None:
        """Seconds queued, waiting for SQLite's lock, running, and in COMMIT; None until the job is over."""
        times = getattr(self, "_times", None)
        if times is None:
            return None
        started = getattr(self, "started_at", self.created_at + times.lock_wait)
        queued, run = started - self.created_at - times.lock_wait, getattr(self, "ended_at", started) - started
        return Timings(max(0.0, queued), times.lock_wait, run, times.commit)

    @property
    def sequence(self) -> int | None:
        """The job's position in the order of commits, a rising number; None until it is committed."""
        return getattr(self, "_sequence", None) if self.in_stats else None

    def _is_cut(self) -> bool:
        """Whether the label is the beginning of a longer text."""
        return False

    def describe(self) -> str:
        label = f"{self.label}…" if self._is_cut() else self.label
        return f"{label!r} (called from {self.called_from})"

    def belongs_to(self, state: State) -> bool:
        return self._state is state

    def done(self) -> bool:
        """Whether the job has an outcome: committed, failed or cancelled."""
        return self._stage >= CANCELLED

    def running(self) -> bool:
        """Whether the job has started and has no outcome yet."""
        return self._stage == RUNNING

    def cancelled(self) -> bool:
        """Whether the job was withdrawn before it started."""
        return self._stage == CANCELLED

    def cancel(self) -> bool:
        """Withdraw the job if it has not started. Returns True if it will never run, False if it is running or has run.

        Raises ForkedError in a child process: the job is the parent's.
        """
        if self._state.forked and self._stage < CANCELLED:
            raise forked_error()
        return self.withdraw(None)

    def withdraw(self, error: BaseException | None) -> bool:
        """Cancel; ``error`` is what ``result`` raises then, in place of CancelledError."""
        try:
            if self.withdraw_quietly(error):
                self.run_callbacks()
        except BaseException:  # Ctrl-C
            if self._stage == CANCELLED:
                self.run_callbacks()
            raise
        return self._stage == CANCELLED

    def withdraw_quietly(self, error: BaseException | None) -> bool:
        """The same, but its callbacks are still to be run; False if there was nothing to withdraw."""
        woken: Collection[Any] | None = None
        try:
            with self._state.lock:
                if self._stage != PENDING:
                    return False
                # From here on no call and no list until all is noted: Ctrl-C, or a finalizer, may come behind one.
                if self.in_stats:
                    self._state.tally.cancelled += 1
                woken, self._waiters = self._waiters or (), None
                _work, self.work = self.work, None  # which goes at the end, not under the lock: it may have finalizers
                self._stage, self._error = CANCELLED, error
            self._tell_withdrawn(woken)
        except BaseException:
            if woken is not None:
                self._tell_withdrawn(woken)
            raise
        if self.in_stats:
            with self._state.lock:
                self._state.tally.labels.append(self.label)
        return True

    def _tell_withdrawn(self, woken: Collection[Any]) -> None:
        """Those who wait for it, and the queue. Again, it changes nothing."""
        wake(woken)
        self._state.forget(self)

    def result(self, timeout: float | None = None) -> T:
        """Wait for the outcome and return it, at most ``timeout`` seconds (None: no limit).

        Raises:
            TimeoutError: no outcome yet; the job is not withdrawn.
            concurrent.futures.CancelledError: withdrawn. Not committed.
            ReentrantWriteError: called inside a job, before there is an outcome.
            What the job raised: Rolled back.
        """
        self._wait_for_outcome(timeout)
        try:
            return self.outcome()
        finally:
            del self  # the traceback would hold the ticket, and the ticket the traceback

    def outcome(self) -> T:
        """What ``result`` returns or raises, once there is an outcome."""
        if self._stage == CANCELLED:
            self._raise_withdrawn()
        if self._error is not None:
            try:
                raise self._error
            finally:
                del self  # as above
        return self._value()

    def _raise_withdrawn(self) -> NoReturn:
        raise self._error or concurrent.futures.CancelledError(f"job {self.describe()} was withdrawn before it started")

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait as ``result`` does and return the job's error, or None if it was committed."""
        self._wait_for_outcome(timeout)
        if self._stage == CANCELLED:
            self._raise_withdrawn()
        return self._error

    def add_done_callback(self, fn: Callable[[Ticket[T]], object]) -> None:
        """Call ``fn(ticket)`` when the job has its outcome, on the writer thread; now, if it has one already."""
        check_callback("the callback", fn)
        if getattr(fn, "__module__", None) == "asyncio.tasks":  # it would never wake its loop
            raise TypeError("asyncio.wait takes futures: give it asyncio.ensure_future(ticket)")
        first: list[Callable[[Ticket[T]], object]] = [fn]
        with self._state.lock:
            if self._callbacks:
                self._callbacks.append(fn)
                return
            if self._stage < CANCELLED:
                self._callbacks = first
                return
        call_safely(self._state, fn, self)

    def future(self) -> concurrent.futures.Future[T]:
        """A ``concurrent.futures.Future`` for the same outcome; cancelling it withdraws the job."""
        future = TicketFuture(self)
        for _ in range(2):  # Ctrl-C may come as one begins
            self.add_done_callback(future.resolve)
        return future

    def __await__(self) -> Generator[Any, None, T]:
        return self._await().__await__()

    async def _await(self) -> T:
        if self._stage < CANCELLED:
            self._state.refuse_endless_wait("awaiting a ticket", awaits=True)
            with self.arrival() as future:
                try:
                    await future
                except asyncio.CancelledError:
                    self.cancel()
                    raise
        try:
            return self.result()
        finally:
            del self

    @contextlib.contextmanager
    def arrival(self, timeout: float | None = None) -> Iterator[asyncio.Future[None]]:
        """A future of the running loop that is done when there is an outcome, or ``timeout`` seconds have gone by."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        signal = weakref.ref(future)
        first = [signal]
        with self._state.lock:
            if self._stage >= CANCELLED:
                future.set_result(None)
            elif self._waiters:
                self._waiters.append(signal)
            else:
                self._waiters = first
        try:
            with within(future, timeout):
                yield future
        finally:
            with self._state.lock:  # who waits no more does not hear of a failure
                if self._waiters and signal in self._waiters:
                    self._waiters.remove(signal)

    def wait(self, timeout: float | None) -> bool:
        """Wait for the outcome; False if ``timeout`` seconds went by without one."""
        until = math.inf if timeout is None else monotonic() + timeout
        signal = thread_signal()
        first = [signal]
        with self._state.lock:
            if self._stage >= CANCELLED:
                return True
            if self._waiters:
                self._waiters.append(signal)
            else:
                self._waiters = first
        try:
            return wait_in_slices(signal, until, self._state, self.done)
        finally:
            with self._state.lock:
                if self._waiters and signal in self._waiters:
                    self._waiters.remove(signal)

    def _refuse_endless_wait(self) -> None:
        if self._stage < CANCELLED:
            self._state.refuse_endless_wait("waiting for a ticket", since=self.created_at)

    def _wait_for_outcome(self, timeout: float | None) -> None:
        check_timeout(timeout)
        if self._stage < CANCELLED:
            self._refuse_endless_wait()
            warn_of_blocking()
            if not self.wait(timeout) and self._stage < CANCELLED:
                raise TimeoutError(
                    f"job {self.describe()} has no outcome after {timeout} s; it was not withdrawn: "
                    f"{self._state.describe()}"
                )
            if self._state.reporter is not None and self._state.reporter.is_behind:
                self._state.reporter.catch_up()

    def _value(self) -> T:
        return cast(T, self._result)

    def run_callbacks(self) -> None:
        """Call the callbacks in order, once each; see ``call_safely``."""
        callbacks: list[Callable[[Ticket[T]], object]] | None = None
        rest: Iterable[tuple[Any, ...]] | None = None
        try:
            with self._state.lock:
                callbacks, self._callbacks = self._callbacks, None
            if callbacks:
                rest = zip(callbacks, itertools.repeat(self))
                call_all_safely(self._state, rest)
        except BaseException:  # Ctrl-C, perhaps before the first of them
            if callbacks:
                call_all_safely(self._state, zip(callbacks, itertools.repeat(self)) if rest is None else rest)
            raise


class TicketFuture(concurrent.futures.Future[T]):
    def __init__(self, ticket: Ticket[T]) -> None:
        super().__init__()
        self._ticket = ticket

    def cancel(self) -> bool:
        return self._ticket.cancel()

    def running(self) -> bool:
        return self._ticket.running()

    def result(self, timeout: float | None = None) -> T:
        self._ticket._refuse_endless_wait()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._ticket._refuse_endless_wait()
        return super().exception(timeout)

    def resolve(self, ticket: Ticket[T]) -> None:
        if self.done():
            return
        try:
            self._resolve(ticket)
        except BaseException:  # Ctrl-C, perhaps in a callback
            with contextlib.suppress(RuntimeError):  # it came behind the last step
                self._resolve(ticket)
            raise

    def _resolve(self, ticket: Ticket[T]) -> None:
        if ticket.cancelled():
            super().cancel()
            self.set_running_or_notify_cancel()
        elif not self.done():
            error = ticket.exception()
            if error is not None:
                self.set_exception(error)
            else:
                self.set_result(ticket.result())


class Job(Ticket[T]):
    """A write: what to do on the write connection, and the ticket of its outcome."""

    __slots__ = ()
    bounded = False  # whether it counts against the queue's maxsize
    exclusive = False  # whether it never shares a transaction
    lent = False  # whether another thread runs its statements, and its callbacks
    needs_savepoint = False  # its ``tx.connection`` may be asked to roll back
    in_transaction = True
    mode = Mode.JOB  # of its statements
    foreign_keys: bool | None = None

    def perform(self, loan: Any) -> T:
        raise NotImplementedError

    def start(self, now: float) -> bool:
        """Claim the job for its run; False if it was withdrawn or has its outcome already."""
        # Between the look and the store CPython runs neither a finalizer nor a signal handler (no call, no loop), so
        # the re-entrant lock suffices against this thread's own finalizers too.
        with self._state.lock:
            if self._stage > RUNNING:
                return False
            self.started_at, self._stage = now, RUNNING  # perhaps again
        return True

    @property
    def is_undone(self) -> bool:
        """Whether it is known that it is rolled back, or will be."""
        return self._error is not None

    def end_at_exit(self) -> bool:
        """The interpreter ends: end now what only a thread or task that has ended could end. Whether it did."""
        return False

    def expect_outcome(self, signal: Signal) -> Any:
        """Have the outcome wake ``signal``, which is returned; to be called before the job is queued."""
        self._waiters = [signal]
        return signal

    def stop_waiting_for(self) -> bool:
        """Stop waiting, so that a failure is logged; False if there is an outcome already."""
        with self._state.lock:
            self._waiters = None
            return self._stage < CANCELLED

    def set_outcome(self, result: Any, error: BaseException | None) -> None:
        """Keep the outcome; it is visible after ``settle``."""
        self._result, self._error = result, error

    @property
    def failed_with(self) -> BaseException | None:
        return self._error


def call_back_withdrawn(jobs: Iterator[Job[Any]]) -> None:
    """Call the callbacks of those that were withdrawn; an interrupt propagates when all were called."""
    try:
        for job in jobs:
            if job.cancelled():
                job.run_callbacks()
    except BaseException:
        call_back_withdrawn(jobs)
        raise
