"""JobQueue: bounded, closable, hands out what waits in one go."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from itertools import islice, repeat
from operator import attrgetter
from time import monotonic
from typing import Any, cast

from onewriter.base.log import report
from onewriter.base.state import State
from onewriter.base.waiting import RELEASED_BEFORE, SLICE, Signal, thread_signal, wake
from onewriter.errors import OneWriterError, QueueFullError
from onewriter.write.ticket import Job

QUIET = 10.0  # seconds between two warnings that it is nearly full
FEW = 64  # withdrawn jobs whose places are never worth a walk through the queue
is_bounded = attrgetter("bounded")


class JobQueue(queue.Queue[Job[Any]]):
    """Many producers, one consumer. ``maxsize`` bounds the jobs whose ``bounded`` is set.

    Locks:   ``mutex`` guards the items and all attributes below. It is re-entrant, because a finalizer or a signal
             handler may put while its thread is inside; such a call never waits. There is no Condition on it: between
             "is it empty?" and wait() a finalizer's put would be lost, and wait() would give up the outer hold too.
    Wake-up: ``_token`` is a lock used as a one-token semaphore. The consumer announces its sleep (_asleep) *before* it
             looks; each put, even a finalizer's between the look and the sleep, sees that and leaves the token.
    """

    def __init__(self, maxsize: int, state: State) -> None:
        super().__init__(maxsize)
        self.mutex = threading.RLock()  # type: ignore[assignment]
        state.locks = (*state.locks, self.mutex)
        self._state = state
        self._token = threading.Lock()
        self._token.acquire()
        self._asleep = False
        self._bounded = 0
        self.taken: list[Job[Any]] = []  # what the consumer has now; some have their outcome
        self.guest: Any = None  # a block: it has the consumer's turn, in a thread of its own
        self.is_handed_over = False  # what the guest has begun the consumer ends
        self.ender = 0  # the thread that ends the guest, so that no other does, nor the consumer; 0: none
        self._mark = maxsize - maxsize // 10  # nearly full
        self._limit = self._mark  # up to where put need not look further
        self.is_nearly_full = False  # until it is half empty
        self._told_at = -QUIET
        self._refusal: OneWriterError | None = None
        self._room: OrderedDict[_Waiter, None] = OrderedDict()  # who waits for room, in order; any may leave
        self._withdrawn: set[Job[Any]] = set()  # withdrawn jobs whose slot in the queue is not removed yet
        self._aside: deque[Job[Any]] = deque()  # what waits, as withdrawn jobs are taken out
        self._is_taking = False
        self._forgotten: list[Job[Any]] = []  # meanwhile
        state.forget, state.is_awaited = self.forget, self._is_awaited
        self._waiting_threads: set[int] = set()

    def put(self, item: Job[Any], timeout: float | None = None) -> None:  # type: ignore[override]
        """Add a job; a bounded one waits for room at most ``timeout`` seconds.

        Raises:
            QueueFullError: no room in time. Not committed.
            WriterClosedError, WriterBrokenError: refused. Not committed.
        """
        bounded = item.bounded
        with self.mutex:
            # Producers that wait are admitted as soon as there is room, so if any wait there is none.
            if self._refusal is None and (not bounded or self._bounded < self._limit):
                if bounded:
                    self._bounded += 1
                item._is_queued = True
                self.queue.append(item)
                if self._asleep:
                    self._wake()
                return
        self._put_with_patience(item, timeout)

    def _put_with_patience(self, job: Job[Any], timeout: float | None) -> None:
        if threading.get_ident() in self._waiting_threads or self._state.is_inside():
            # The call is a finalizer's or signal handler's, inside a lock of ours further out: the writer would need
            # that lock to make room, so the job goes over maxsize.
            self.put_unbounded(job)
            return
        waiter = self.line_up(job, thread_signal())
        if waiter is not None:
            self._wait_for_room(waiter, timeout)

    def put_unbounded(self, job: Job[Any]) -> None:
        """Add a job although there may be no room."""
        with self.mutex:
            self.check_open()
            self._append(job)
            if self._asleep:
                self._wake()

    def _append(self, job: Job[Any]) -> None:
        self._bounded += job.bounded
        job._is_queued = True
        self.queue.append(job)

    def line_up(self, job: Job[Any], signal: Signal) -> _Waiter | None:
        """Add a bounded job; returns None, or, if there is no room, who waits in line: its turn wakes ``signal``."""
        with self.mutex:
            self.check_open()
            waiter = None
            if self._bounded >= self.maxsize or self._room:
                waiter = _Waiter(job, signal)
                self._room[waiter] = None
            else:
                self._append(job)
            if self._asleep:
                self._wake()
            tell = self._has_become_nearly_full()
        if tell:
            self._tell()
        return waiter

    def leave_line(self, waiter: _Waiter) -> None:
        with self.mutex:
            self._room.pop(waiter, None)

    def forget(self, job: Job[Any]) -> None:
        """A job never runs: if it is in the queue, it makes room now, although its slot is removed later.

        Finding the slot would cost a walk through the queue, for each of perhaps thousands that give up at once.
        """
        with self.mutex:
            if self._is_taking:  # this is a finalizer, inside _pop
                self._forgotten.append(job)
                return
            if getattr(job, "_is_queued", False):
                self._bounded -= job.bounded
                job._is_queued = False  # and no call in between: it makes room once, though it may be forgotten again
                self._withdrawn.add(job)
            self._made_room()  # what comes in wakes nobody: the consumer is awake, since this job was queued
            if 2 * len(self._withdrawn) > len(self.queue) + FEW or self._aside:
                self._tidy()

    def _tidy(self) -> None:
        """Take the places of withdrawn jobs out. What a finalizer puts meanwhile comes behind the rest."""
        fresh: deque[Job[Any]] = deque()
        if not self._aside:
            self._aside, self.queue = self.queue, fresh
        self._put_back()  # an interrupt leaves them aside: the next that looks here puts them back

    def _put_back(self) -> None:
        """Of those that were put aside, the ones that wait. Again, it changes nothing."""
        aside, none = self._aside, deque[Job[Any]]()
        gone, there = self._withdrawn, set(self.queue)
        kept = [job for job in aside if job not in gone and job not in there]
        dropped = [job for job in aside if job in gone and job not in there]
        kept.reverse()
        if self._aside is aside:  # since this look no call: one that a signal handler has withdrawn has put them back
            self.queue.extendleft(kept)
            self._aside = none  # and no call before the next, or what is gone would be put back
            gone.difference_update(dropped)

    def get(self, block: bool = True, timeout: float | None = None) -> Job[Any]:
        raise NotImplementedError("the writer takes what waits in one go: use take")

    def take(self, limit: int, timeout: float = -1) -> list[Job[Any]] | None:
        """Wait for jobs and take up to ``limit`` of them, in order.

        An empty list: closed, and nothing is left. None: none within ``timeout`` seconds (-1: for ever).
        """
        with self.mutex:
            self._asleep = True
            is_empty = not (self.queue or self._aside) and self._refusal is None
            if not is_empty:
                self._asleep = False
                jobs = self._pop(limit)
        if is_empty:
            self._token.acquire(timeout=timeout)
            with self.mutex:
                self._asleep = False
                if self.guest is not None:
                    return None  # its turn: see to ``wait_for_turn``
                jobs = self._pop(limit)
        # None, too, if there was a job that a finalizer has withdrawn meanwhile.
        return jobs or (None if self._refusal is None or self.queue else [])

    def take_now(self, limit: int) -> list[Job[Any]]:
        """Take up to ``limit`` jobs, without waiting."""
        with self.mutex:
            return self._pop(limit)

    def _pop(self, limit: int) -> list[Job[Any]]:
        if self._aside:  # Ctrl-C came twice
            self._put_back()
        self._is_taking = True
        # One by one: copying and clearing would lose what a finalizer puts in between.
        self.taken = jobs = list(islice(iter(self.queue.popleft, None), min(limit, len(self.queue))))
        _forget_places(jobs)
        self._is_taking = False
        if self._withdrawn:
            gone = self._withdrawn.intersection(jobs)  # which have made room already
            self._withdrawn -= gone
            self._bounded += sum(map(is_bounded, gone))
        if self._bounded:  # now it counts all of them
            self._bounded -= sum(map(is_bounded, jobs))
        if self._forgotten:
            forgotten, self._forgotten = self._forgotten, []
            for job in forgotten:
                self.forget(job)
        if self._room or self.is_nearly_full:
            self._made_room()
        return jobs

    # The turn: the consumer's while it is awake; while it sleeps, that of a guest, if there is one ------------------

    def take_turn(self, job: Job[Any]) -> bool:
        """Take ``job`` in place of the consumer; only if that sleeps, and no other job is before it."""
        with self.mutex:
            if not self._asleep or self.guest is not None or self.queue or self._refusal is not None:
                return False
            self.guest, self.taken = job, [job]
            return True

    def give_turn(self) -> None:
        """The guest has come to its end."""
        with self.mutex:
            self._end_turn()

    def give_way(self, job: Job[Any]) -> None:
        """The guest lets the consumer do it, next: it was accepted before those that are queued now."""
        with self.mutex:
            job._is_queued = True
            self.queue.appendleft(job)
            self._end_turn()

    def begins_end(self, job: object) -> bool:
        """Have the calling thread end the guest, as ``ender``, which it sets back; False: another does, or has."""
        me = threading.get_ident()
        with self.mutex:
            is_free = self.guest is job and not (self.is_handed_over or self.ender)
            if is_free:  # and no call since that look, behind which a signal handler could hand it over
                self.ender = me
        return is_free

    def hand_over(self, job: object) -> None:
        """The consumer ends what the guest has begun; unless a thread is ending it."""
        with self.mutex:
            if self.guest is job and not self.ender:
                self.is_handed_over = True
                self._wake()

    def _end_turn(self) -> None:
        is_awaited = not self._asleep or self.queue
        if is_awaited:  # before it is noted: Ctrl-C may come in between
            self._wake()
        self.guest, self.taken, self.is_handed_over, self.ender = None, [], False, 0
        if is_awaited:  # and behind that: the consumer may have looked in between
            self._wake()

    def wait_for_turn(self) -> Job[Any] | None:
        """What the consumer does while there is a guest; returns the one that is to be ended here."""
        while (block := self.guest) is not None:
            if self.is_handed_over:
                return cast(Job[Any], block)
            if not self._token.acquire(timeout=SLICE):
                self._state.warn_if_slow(monotonic())
                block.look_for_dropped()
                if block.end_if_lost():
                    self.hand_over(block)
        return None

    def refuse(self, error: OneWriterError) -> bool:
        """Accept nothing from now on: every later put raises a copy of ``error``. False if it was so already."""
        with self.mutex:
            first, self._refusal = self._refusal is None, error
            try:
                self._tell_refused()
            except BaseException:  # Ctrl-C
                self._tell_refused()
                raise
        return first

    def _tell_refused(self) -> None:
        wake(waiter.signal for waiter in self._room)
        self._room.clear()
        if self._asleep:
            self._wake()

    def after_fork_in_child(self, error: OneWriterError) -> None:
        """In a forked child: refuse everything; another thread of the parent may have held the lock."""
        self.mutex = threading.RLock()  # type: ignore[assignment]
        self._refusal = error
        self._room.clear()

    def unfinished(self) -> list[str]:
        """The labels of the jobs, queued or taken, that have no outcome yet."""
        with self.mutex:
            jobs = [*self.taken, *self.queue]
        return [job.label for job in jobs if not job.done()]

    @property
    def depth(self) -> int:
        """How many jobs wait; not qsize(), whose lock inside another one could meet a finalizer's."""
        return max(0, len(self.queue) - len(self._withdrawn))

    def _is_awaited(self) -> bool:
        """Whether anything waits for what the consumer does now: a job, or close."""
        return bool(self.queue) or len(self.taken) > 1 or self._refusal is not None

    def oldest_age(self, now: float) -> float:
        """For how many seconds the oldest job without an outcome has been here."""
        for job in self.taken:
            if not job.done():
                return max(0.0, now - job.created_at)
        first = self._oldest()
        return 0.0 if first is None else max(0.0, now - first.created_at)

    def _oldest(self) -> Job[Any] | None:
        try:
            first: Job[Any] = self.queue[0]
        except IndexError:
            return None
        return next((job for job in self.queue.copy() if not job.done()), None) if first.done() else first

    def waiting_jobs(self) -> list[Job[Any]]:
        with self.mutex:
            if self._aside:
                self._put_back()
            return list(self.queue)

    @property
    def refusing(self) -> bool:
        return self._refusal is not None

    def _has_become_nearly_full(self) -> bool:
        if self.is_nearly_full or self._bounded < self._mark:
            return False
        self.is_nearly_full, self._limit = True, self.maxsize
        return monotonic() - self._told_at >= QUIET

    def _tell(self) -> None:
        self._told_at = monotonic()
        report(self._state, logging.WARNING, "queue nearly full: %s; %s", self.fill, self._state.describe())

    @property
    def fill(self) -> str:
        return f"{self._bounded:,} of {self.maxsize:,} jobs are queued"

    def _wake(self) -> None:
        # In this order: Ctrl-C in between leaves a token, which the next put finds.
        try:
            self._token.release()
        except RuntimeError as error:  # the token of a sleep that never came about is still there; one is enough
            if error.args not in RELEASED_BEFORE:
                raise
        self._asleep = False

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """For the ``with`` block this thread waits, for room or for the writer itself: a signal handler or finalizer in
        it does not wait behind that."""
        me = threading.get_ident()
        outer = me in self._waiting_threads
        try:
            self._waiting_threads.add(me)
            yield
        finally:
            if not outer:
                self._waiting_threads.discard(me)

    def _wait_for_room(self, waiter: _Waiter, timeout: float | None) -> None:
        try:
            with self.waiting():
                waiter.signal.acquire(timeout=-1 if timeout is None else min(timeout, threading.TIMEOUT_MAX))
        finally:
            self.leave_line(waiter)
        if not waiter.accepted:
            raise self.full_error(waiter.job, timeout)

    def full_error(self, job: Job[Any], timeout: float | None) -> QueueFullError:
        self.check_open()
        return QueueFullError(
            f"no room for job {job.describe()} within {timeout} s: {self.fill}; {self._state.describe()}"
        )

    def _made_room(self) -> None:
        while self._refusal is None:
            waiter = None
            for waiter in self._room:  # noqa: B007 - no call, behind which a finalizer or a signal handler could come
                break
            if waiter is None:
                break
            if not waiter.accepted:  # or Ctrl-C came before it was woken
                if self._bounded >= self.maxsize:
                    break
                job = waiter.job
                self._bounded += 1
                job._is_queued = waiter.accepted = True
                self.queue.append(job)  # and no call since it is accepted, behind which one could come
            wake([waiter.signal])  # before it is out, or Ctrl-C comes in between and nobody does
            self._room.pop(waiter, None)
        if self.is_nearly_full and self._bounded <= self.maxsize // 2:
            self.is_nearly_full, self._limit = False, self._mark

    def check_open(self) -> None:
        """Raise why nothing is accepted any more, if so."""
        if self._refusal is not None:
            raise type(self._refusal)(*self._refusal.args) from self._refusal.__cause__


class _Waiter:
    """A producer that waits for room; the thread that makes room queues its job and sets ``accepted``."""

    def __init__(self, job: Job[Any], signal: Signal) -> None:
        self.job = job
        self.accepted = False
        self.signal = signal


def _forget_places(jobs: list[Job[Any]]) -> None:
    deque(map(setattr, jobs, repeat("_is_queued"), repeat(False)), 0)  # at the speed of C: for each queued job
