"""What the writer makes of an error of COMMIT."""

from __future__ import annotations

import sqlite3

import pytest

from onewriter.write.batch import commit_outcome_unknown
from onewriter.write.outcomes import copy_of


def error_with(code: int | None) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError("disk I/O error")
    if code is not None:
        error.sqlite_errorcode, error.sqlite_errorname = code, "SQLITE_…"
    return error


@pytest.mark.parametrize(
    ("code", "in_transaction", "expected"),
    [
        (sqlite3.SQLITE_IOERR_FSYNC, True, True),
        (sqlite3.SQLITE_IOERR_FSYNC, False, True),
        (sqlite3.SQLITE_IOERR_TRUNCATE, True, True),
        (sqlite3.SQLITE_IOERR_WRITE, True, False),
        (sqlite3.SQLITE_IOERR_WRITE, False, False),
        (sqlite3.SQLITE_FULL, True, False),
        (sqlite3.SQLITE_FULL, False, False),
        (sqlite3.SQLITE_BUSY, True, False),
        (sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY, True, False),
        (sqlite3.SQLITE_CORRUPT, False, False),
        (sqlite3.SQLITE_NOTADB, False, False),
        (None, True, False),
        (None, False, True),
    ],
)
def test_only_a_commit_that_can_have_reached_the_file_is_unknown(
    code: int | None, in_transaction: bool, expected: bool
) -> None:
    assert commit_outcome_unknown(error_with(code), in_transaction) is expected


def test_each_job_gets_an_error_object_of_its_own_that_says_the_same() -> None:
    error = error_with(sqlite3.SQLITE_IOERR_FSYNC)
    copy = copy_of(error)
    assert copy is not error
    assert isinstance(copy, sqlite3.OperationalError)
    assert (str(copy), copy.sqlite_errorcode, copy.sqlite_errorname) == (str(error), error.sqlite_errorcode, "SQLITE_…")


def test_an_error_that_cannot_be_made_again_is_told_as_sqlites() -> None:
    class Demanding(Exception):
        def __init__(self, one: int, two: int) -> None:
            super().__init__(f"{one} and {two}")

    copy = copy_of(Demanding(1, 2))
    assert isinstance(copy, sqlite3.OperationalError)
    assert str(copy) == "1 and 2"
    assert not hasattr(copy, "sqlite_errorcode")
