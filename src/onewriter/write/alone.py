"""A function that has a connection of its own, and with it the writer, for what begins and commits by itself."""

from __future__ import annotations

import math
import sqlite3
from time import monotonic
from typing import TypeVar

from onewriter.base.state import State
from onewriter.errors import TransactionClosedError
from onewriter.sqlite.retry import is_interrupted
from onewriter.sqlite.time_limit import TimeLimit
from onewriter.write.connection import WriteConnection
from onewriter.write.jobs import ConnectionJob
from onewriter.write.loan import STEPS, TOO_LONG

T = TypeVar("T")


def call_alone(job: ConnectionJob[T], writer: WriteConnection, state: State, max_hold: float) -> T:
    """Call the job's function with a connection that is closed afterwards: so there is nothing to put back.

    The session of the writer is idle meanwhile, and in the same thread, so that of this process one connection alone
    commits or checkpoints at any moment.
    """
    until, watch = monotonic() + max_hold, None
    failure: BaseException | None = None
    connection = writer.open_whole()
    try:
        if max_hold != math.inf:
            watch = TimeLimit(lambda: monotonic() > until)
            watch.set_on(connection, STEPS)
        return job.call(connection)
    except sqlite3.Error as error:
        failure = error
        if watch is not None and is_interrupted(error):
            watch.raise_caught()
            if monotonic() > until:
                raise TransactionClosedError(f"the function of job {job.describe()} {TOO_LONG}") from error
        raise
    except BaseException as error:
        failure = error
        raise
    finally:
        _end(job, writer, state, failure)


def _end(job: ConnectionJob[T], writer: WriteConnection, state: State, failure: BaseException | None) -> None:
    if state.forked:  # this is the child, which keeps the connection open
        return
    was_open = writer.close_whole()
    if was_open and failure is None:
        raise sqlite3.ProgrammingError(
            f"the function of job {job.describe()} left a transaction open, which is rolled back: it must end what it "
            "begins (with isolation_level or autocommit set, sqlite3 begins by itself)"
        )
