"""A plug-in for pytest that runs other people's tests on lent connections.

``sqlite3.connect`` opens a gateway and gives the connection of a ``transaction()`` block of it; ``close`` on that
connection ends the block. With ``FOREIGN_ON=plain`` it replaces nothing. The outcomes go to ``FOREIGN_OUTCOMES``.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from onewriter import DbWriter, Transaction
from onewriter.sqlite.lent import LentConnection

OURS = os.environ.get("FOREIGN_ON") == "ours"
FILES = (
    os.environ.get("FOREIGN_FILES") == "yes"
)  # databases in files too: the suite has one connection to each at a time
ATTACHED = os.environ.get("FOREIGN_ATTACHED", "")  # a schema that the suite attaches
EACH = float(os.environ.get("FOREIGN_EACH", "60"))  # seconds for a test
OUTCOMES: dict[str, str] = {}
ORDER = ("skipped", "passed", "failed")  # the worst counts
lent = 0

Block = tuple[DbWriter, contextlib.AbstractContextManager[Transaction]]
blocks: dict[sqlite3.Connection, Block] = {}
real_connect = sqlite3.connect
real_close = LentConnection.close
real_execute = LentConnection.execute


def connect(database: Any, timeout: float = 5.0, *args: Any, **options: Any) -> Any:
    """As ``sqlite3.connect``; a database that others may have open as well stays a plain one, and the gateway's own."""
    names = ("detect_types", "isolation_level", "check_same_thread", "factory", "cached_statements", "uri")
    by_gateway = sys._getframe(1).f_globals.get("__name__", "").startswith("onewriter")
    if by_gateway or not is_ours(database, options | dict(zip(names, args, strict=False))):
        return real_connect(database, timeout, *args, **options)
    global lent
    lent += 1
    options.update(zip(names, args, strict=False))
    db = DbWriter(
        database,
        lock_timeout=1.0,
        synchronous="OFF",
        foreign_keys=False,  # as sqlite3 has it
        detect_types=options.get("detect_types", 0),
        on_connect=attach,
    )
    block = db.transaction()
    connection = block.__enter__().connection
    blocks[connection] = db, block
    for name in ("isolation_level", "autocommit"):
        if name in options:
            setattr(connection, name, options[name])
    return connection


def is_ours(database: Any, options: dict[str, Any]) -> bool:
    name = os.fsdecode(database) if isinstance(database, str | bytes | os.PathLike) else None
    if name is None or options.get("uri") or "factory" in options:
        return False
    return name in (":memory:", "") or FILES


def attach(connection: sqlite3.Connection, readonly: bool) -> None:
    if ATTACHED:
        connection.execute(f"ATTACH ':memory:' AS {ATTACHED}")


def execute(self: Any, *args: Any) -> Any:
    """The suite's own ATTACH has been done by ``on_connect``."""
    if ATTACHED and args and str(args[0]).startswith("ATTACH DATABASE"):
        return None
    return real_execute(self, *args)


def close(self: Any) -> None:
    block = blocks.pop(self, None)
    if block is None:
        real_close(self)
    else:
        end(*block)


def end(db: DbWriter, block: contextlib.AbstractContextManager[Transaction]) -> None:
    try:
        block.__exit__(None, None, None)
    except Exception as error:
        print("at the end of a block:", repr(error), file=sys.stderr)
    finally:
        db.close(timeout=5.0)


def pytest_configure(config: pytest.Config) -> None:
    if OURS:
        sqlite3.connect = sqlite3.dbapi2.connect = connect
        replace(LentConnection, "close", close)
        replace(LentConnection, "execute", execute)

    with contextlib.suppress(ImportError):
        from hypothesis import HealthCheck, settings

        # What opens a gateway for each example takes longer than Hypothesis allows.
        settings.register_profile("foreign", deadline=None, suppress_health_check=list(HealthCheck))
        settings.load_profile("foreign")


def replace(owner: Any, name: str, function: Callable[..., Any]) -> None:
    setattr(owner, name, function)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[Any]:
    """A test that hangs fails, and the others run."""

    def give_up(*_: object) -> NoReturn:
        raise TimeoutError(f"{item.nodeid} did not end within {EACH} s")

    signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, EACH)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        before = OUTCOMES.get(report.nodeid, "skipped")
        OUTCOMES[report.nodeid] = max(before, report.outcome, key=ORDER.index)


def pytest_unconfigure(config: pytest.Config) -> None:
    for connection in list(blocks):
        with contextlib.suppress(Exception):
            connection.close()
    Path(os.environ["FOREIGN_OUTCOMES"]).write_text(json.dumps({"lent": lent, "outcomes": OUTCOMES}))
