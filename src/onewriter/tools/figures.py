"""What ``bench`` has measured, as a table and as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from onewriter.tools.contestants import EXPLANATIONS, JOURNAL_MODE, SYNCHRONOUS, TIMEOUT, Contestant
from onewriter.tools.disk import FSYNCS
from onewriter.tools.load import Share
from onewriter.tools.terminal import wrap
from onewriter.tools.versions import gil_enabled, versions

IN_MEMORY_MS = 0.02  # no disk that keeps its word syncs faster than that
COMPARED = ("b", "c")  # one connection and a lock; DbWriter.run
SLOW_WRITER = "h"  # plain connections beside it
NAME = 22  # columns, so that the table has 80 at most


@dataclass(frozen=True)
class Setup:
    """What was measured, and where."""

    threads: int
    seconds: float
    fsync_ms: float
    python: str = platform.python_version()
    gil_enabled: bool | None = field(default_factory=gil_enabled)
    sqlite: str = sqlite3.sqlite_version
    journal_mode: str = JOURNAL_MODE
    synchronous: str = SYNCHRONOUS
    timeout: float = TIMEOUT


@dataclass(frozen=True)
class Outcome:
    """What one contestant did. Latencies are those of every call, failed ones too, in milliseconds."""

    key: str
    name: str
    load: str
    gateway: bool
    writes_per_second: float
    p50_ms: float
    p99_ms: float
    max_ms: float
    locked_errors: int
    other_errors: int
    first_other_error: str | None
    acknowledged: int
    found: int

    @property
    def lost(self) -> int:
        return max(0, self.acknowledged - self.found)

    @property
    def transactions(self) -> int:
        return self.acknowledged + self.locked_errors + self.other_errors


def outcome(contestant: Contestant, load: str, share: Share, found: int) -> Outcome:
    """``found``: rows in the file, those of refused calls aside."""
    latencies = sorted(share.latencies)
    acknowledged = len(latencies) - share.locked - len(share.others)
    return Outcome(
        key=contestant.key,
        name=contestant.name,
        load=load,
        gateway=contestant.gateway,
        writes_per_second=acknowledged / share.seconds,
        p50_ms=_percentile(latencies, 0.50),
        p99_ms=_percentile(latencies, 0.99),
        max_ms=_percentile(latencies, 1.0),
        locked_errors=share.locked,
        other_errors=len(share.others),
        first_other_error=share.others[0] if share.others else None,
        acknowledged=acknowledged,
        found=found,
    )


def _percentile(ordered: Sequence[float], share: float) -> float:
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


def describe(setup: Setup) -> str:
    """The lines above the table: what the figures depend on."""
    fast = "; faster than a disk: is the folder in memory? Try --path" if setup.fsync_ms < IN_MEMORY_MS else ""
    lines = (
        "onewriter bench: transactions that look, then write one row; one in 500 computes for 20 ms in between",
        f"{versions()}, journal mode {setup.journal_mode}, synchronous {setup.synchronous}",
        f"{setup.seconds:g} s for each, fsync of this disk {setup.fsync_ms:.3f} ms (median of {FSYNCS}{fast})",
    )
    return "\n".join(map(wrap, lines))


COLUMNS: tuple[tuple[str, Callable[[Outcome], str]], ...] = (
    ("", lambda o: f"({o.key}) {o.name}"),
    ("writes/s", lambda o: f"{o.writes_per_second:,.0f}"),
    ("p50 ms", lambda o: _milliseconds(o.p50_ms)),
    ("p99 ms", lambda o: _milliseconds(o.p99_ms)),
    ("max ms", lambda o: _milliseconds(o.max_ms)),
    ("locked", lambda o: f"{o.locked_errors:,}"),
    ("commits", lambda o: f"{o.acknowledged:,}"),
    ("found", lambda o: "all" if o.found == o.acknowledged else f"{o.found:,}"),
)


def _milliseconds(duration: float) -> str:
    """In five characters, as long as it is less than a minute."""
    return f"{duration:.3f}" if duration < 10 else f"{duration:.1f}" if duration < 1000 else f"{duration:,.0f}"


def table(outcomes: Sequence[Outcome]) -> str:
    """The figures, one row for each contestant under the load that it had, and what they mean."""
    rows = [[title for title, _ in COLUMNS], *([cell(one) for _, cell in COLUMNS] for one in outcomes)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[0] = NAME
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    for place in reversed(range(len(outcomes))):
        if place == 0 or outcomes[place].load != outcomes[place - 1].load:
            lines.insert(1 + place, outcomes[place].load)
    return "\n".join([*lines, "", *(wrap(remark) for remark in _remarks(outcomes))])


def _remarks(outcomes: Sequence[Outcome]) -> Iterator[str]:
    yield from _meaning(outcomes)
    yield ""
    yield from EXPLANATIONS
    for one in outcomes:
        if one.other_errors:
            yield f"({one.key}): {one.other_errors:,} other errors; the first: {one.first_other_error}"
        if one.lost:
            yield f"({one.key}): LOST {one.lost:,} acknowledged writes"


def _meaning(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """In one sentence; and how fast."""
    plain, gateway = [o for o in outcomes if not o.gateway], [o for o in outcomes if o.gateway]
    if plain and gateway:
        waited = sum(o.locked_errors for o in plain if o.key == SLOW_WRITER)
        yield (
            f'Plain sqlite3 refused {_refused(plain)} with "database is locked", {waited:,} of them after it had '
            f"waited for its default timeout of {TIMEOUT:g} s, and the program has to begin them again; the gateway "
            f"refused {_refused(gateway)}, and {sum(o.lost for o in gateway):,} of its commits were lost."
        )
    compared = [o.writes_per_second for key in COMPARED for o in outcomes if o.key == key]
    if len(compared) == len(COMPARED) and compared[0]:
        yield f"({COMPARED[1]}) committed {compared[1] / compared[0]:.1f} times as much as ({COMPARED[0]})."


def _refused(outcomes: Sequence[Outcome]) -> str:
    return f"{sum(o.locked_errors for o in outcomes):,} of {sum(o.transactions for o in outcomes):,} transactions"


def write_json(file: Path, setup: Setup, outcomes: Sequence[Outcome]) -> None:
    numbers = {**dataclasses.asdict(setup), "contestants": [dataclasses.asdict(one) for one in outcomes]}
    file.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
