"""What a gateway has done and is doing, in numbers."""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_right
from collections import deque
from dataclasses import dataclass
from itertools import chain, groupby, repeat
from operator import itemgetter, sub
from typing import Any, NamedTuple


class Timings(NamedTuple):
    """How a job's time was spent, in seconds."""

    queued: float
    lock_wait: float
    run: float
    commit: float


class Times:
    """What the jobs that shared a transaction have in common. Seconds."""

    lock_wait = 0.0
    commit = 0.0
    retried = False  # another connection held SQLite's lock


KEPT_LABELS = 1000
UNCOUNTED = 1000  # jobs and batches whose times are kept one by one until they are asked for
BOUNDS = tuple(float(f"{digit}e{power}") for power in range(-5, 2) for digit in (1, 2, 5))  # seconds: 10 µs … 50 s


@dataclass(frozen=True)
class Latency:
    """How long something took, in seconds.

    Attributes:
        count: how often. sum: of all together. max: the longest.
        buckets: for each bound, how often it took at most that long, from 10 µs to 50 s; ``count`` also
            has those above the last bound.
    """

    count: int
    sum: float
    max: float
    buckets: tuple[tuple[float, int], ...]

    def percentile(self, percent: float) -> float:
        """The upper bound of the bucket that holds that percentile, or ``max`` if that is less; 0.0 without any."""
        if not 0 <= percent <= 100:
            raise ValueError(f"percent must be from 0 to 100, not {percent}")
        wanted = max(1.0, self.count * percent / 100)
        return min(self.max, next((bound for bound, count in self.buckets if count >= wanted), math.inf))


@dataclass(frozen=True)
class Running:
    """A job that is running, or waits for the lock: its label, where it was called from, and for how many seconds."""

    label: str
    called_from: str
    seconds: float


@dataclass(frozen=True)
class CheckpointResult:
    """The last checkpoint: ``busy``, ``log`` and ``checkpointed`` as ``checkpoint()`` gives them, and its age."""

    busy: bool
    log: int
    checkpointed: int
    seconds_ago: float


@dataclass(frozen=True)
class Stats:
    """A gateway's figures at one moment; counts are since it was opened, times are in seconds.

    Attributes:
        queue_depth: jobs accepted and not yet taken by the writer.
        oldest_age: time since the oldest job without an outcome was accepted; 0.0: there is none.
        running: the job that runs now.
        waiting_for_lock: the job whose transaction waits for SQLite's lock, which another connection holds.
        committed, failed, cancelled: jobs by outcome; cancelled ones were withdrawn before they started.
        timed_out: calls that raised ``WriteTimeoutError``; withdrawn jobs are counted as cancelled too.
        retried: jobs whose transaction had to wait for SQLite's lock.
        run_twice: jobs that ran again because the transaction that they shared was rolled back.
        commits: transactions committed. jobs_per_commit: jobs committed / commits.
        lock_attempts: attempts at BEGIN and COMMIT. lock_wait: time spent waiting for SQLite's lock, counted when a
            wait ends; ``waiting_for_lock`` has the one that goes on.
        queue_wait, run: of each job that has started: in the queue, the wait for the lock not counted; and running.
        commit: of each COMMIT.
        readers_in_use, readers_waiting: connections in use, and calls that wait for one.
        wal_bytes: size of the write-ahead log files, also of attached databases; resetting a log does not shrink it.
        last_checkpoint: None: there was none.
        last_backup_ago: time since the last ``backup()`` was complete; None: there was none.
    """

    queue_depth: int
    oldest_age: float
    running: Running | None
    waiting_for_lock: Running | None
    committed: int
    failed: int
    cancelled: int
    timed_out: int
    retried: int
    run_twice: int
    commits: int
    jobs_per_commit: float
    lock_attempts: int
    lock_wait: float
    queue_wait: Latency
    run: Latency
    commit: Latency
    readers_in_use: int
    readers_waiting: int
    wal_bytes: int
    last_checkpoint: CheckpointResult | None
    last_backup_ago: float | None

    def as_dict(self) -> dict[str, Any]:
        """The same as plain dicts, lists and numbers, for JSON and metrics."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class CloseReport:
    """The outcomes of all jobs since the gateway was opened.

    Attributes:
        committed, failed, cancelled, unfinished: counts. Unfinished: still running when ``timeout`` ran out.
        labels: of jobs that did not commit, the last 1,000.
    """

    committed: int
    failed: int
    cancelled: int
    unfinished: int
    labels: tuple[str, ...]


class Histogram:
    """The counts behind a ``Latency``."""

    def __init__(self) -> None:
        self._count, self._sum, self._max = 0, 0.0, 0.0
        self._counts = [0] * (len(BOUNDS) + 1)

    def add(self, seconds: list[float]) -> None:
        """Count many at once, which costs a fraction of counting one by one."""
        if not seconds:
            return
        seconds.sort()
        before = 0
        for place, bound in enumerate(BOUNDS):
            end = bisect_right(seconds, bound, before)
            self._counts[place] += end - before
            before = end
        self._counts[-1] += len(seconds) - before
        self._count += len(seconds)
        self._sum += sum(seconds)
        self._max = max(self._max, seconds[-1])

    def latency(self) -> Latency:
        total, buckets = 0, []
        for bound, count in zip(BOUNDS, self._counts, strict=False):
            total += count
            buckets.append((bound, total))
        return Latency(self._count, self._sum, self._max, tuple(buckets))


class Tally:
    """The counts behind all of them. Guarded by the state's lock."""

    def __init__(self) -> None:
        self.committed = self.failed = self.cancelled = self.commits = 0
        self.timed_out = self.retried = self.run_twice = 0
        self.queue_wait, self.run, self.commit = Histogram(), Histogram(), Histogram()
        # Batches that are not counted yet, since many at once are cheaper: when each of their jobs that has started was
        # made, had started and had ended; what they have in common; and commits.
        self._batches: list[tuple[list[tuple[float, float, float]], Times, int]] = []
        self._jobs = 0  # in these
        self.last_backup: float | None = None
        self.labels: deque[str] = deque(maxlen=KEPT_LABELS)

    def add_batch(self, moments: list[tuple[float, float, float]], times: Times, commits: int) -> None:
        self._batches.append((moments, times, commits))
        self._jobs += 1 + len(moments)
        if self._jobs >= UNCOUNTED:
            self.count()

    def count(self) -> None:
        """To be called before a figure is read."""
        batches, self._batches, self._jobs = self._batches, [], 0
        commits: list[float] = []
        for moments, times, number in batches:
            self.commits += number
            if times.retried:
                self.retried += len(moments)
            if number and times.commit:
                commits.append(times.commit)
        self.commit.add(commits)
        for lock_wait, several in groupby(batches, key=lambda batch: batch[1].lock_wait):
            moments = list(chain.from_iterable(map(itemgetter(0), several)))
            if moments:
                created, started, ended = zip(*moments, strict=True)
                waits = map(sub, started, created)
                self.queue_wait.add(list(map(sub, waits, repeat(lock_wait)) if lock_wait else waits))
                self.run.add(list(map(sub, ended, started)))

    def count_failed(self, label: str) -> None:
        self.failed += 1
        self.labels.append(label)

    @property
    def finished(self) -> int:
        return self.committed + self.failed + self.cancelled
