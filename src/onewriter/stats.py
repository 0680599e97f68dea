"""What a gateway has done, in numbers."""

from __future__ import annotations

import dataclasses
from collections import deque
from dataclasses import dataclass
from typing import Any

KEPT_LABELS = 1000


@dataclass(frozen=True)
class Stats:
    """A gateway's state at one moment; the counts are those of its whole life.

    Attributes:
        queue_depth: jobs accepted and not yet taken by the writer.
        committed: jobs committed. failed: jobs that ended with an error. cancelled: jobs withdrawn before they started.
        commits: transactions committed; smaller than ``committed`` where jobs shared one.
    """

    queue_depth: int
    committed: int
    failed: int
    cancelled: int
    commits: int

    def as_dict(self) -> dict[str, Any]:
        """The same as a plain dict, for JSON and metrics."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class CloseReport:
    """What became of every job of the gateway's life.

    Attributes:
        committed, failed, cancelled, unfinished: counts. Unfinished: still running when ``timeout`` ran out.
        labels: of jobs that did not commit, the last 1,000.
    """

    committed: int
    failed: int
    cancelled: int
    unfinished: int
    labels: tuple[str, ...]


class Tally:
    """The counts behind both. Guarded by the holder's lock."""

    def __init__(self) -> None:
        self.committed = self.failed = self.cancelled = self.commits = 0
        self.labels: deque[str] = deque(maxlen=KEPT_LABELS)

    def count_failed(self, label: str) -> None:
        self.failed += 1
        self.labels.append(label)

    def count_cancelled(self, label: str) -> None:
        self.cancelled += 1
        self.labels.append(label)

    @property
    def finished(self) -> int:
        return self.committed + self.failed + self.cancelled
