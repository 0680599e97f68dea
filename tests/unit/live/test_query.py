"""Query: what it reads, asked once for each schema; comparing what it gives."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import onewriter.live.query as query_module
from helpers import DEADLINE
from onewriter import DbWriter, Watch
from onewriter.live.places import places_read, schema_versions
from onewriter.live.query import same
from onewriter.read.reader import Reader

VIEW = "CREATE VIEW v AS SELECT n FROM {}"


class Asked:
    """In place of ``places_read``: counts, and raises ``error`` if there is one."""

    def __init__(self) -> None:
        self.count = 0
        self.error: sqlite3.Error | None = None

    def __call__(self, *args: Any) -> Any:
        self.count += 1
        if self.error is not None:
            raise self.error
        return places_read(*args)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    spy = Asked()
    monkeypatch.setattr(query_module, "places_read", spy)
    return spy


@pytest.fixture
def live(db: DbWriter) -> Iterator[Watch[Any]]:
    db.run_script(f"CREATE TABLE a (n); CREATE TABLE b (n); CREATE TABLE c (n); {VIEW.format('a')};")
    with db.watch("SELECT n FROM v ORDER BY n", every=0) as watch:
        yield watch


@pytest.fixture
def others(live: Watch[Any], path: Path) -> Iterator[Callable[[str], object]]:
    """Has another connection run a script."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        yield connection.executescript


Others = Callable[[str], object]


def test_commits_of_others_that_leave_the_schema_do_not_make_it_ask_again(
    asked: Asked, live: Watch[Any], others: Others
) -> None:
    assert live.next(DEADLINE) == []
    before = asked.count
    for n in range(1, 4):
        others("INSERT INTO a VALUES (1)")
        assert live.next(DEADLINE) == [(1,)] * n
    assert asked.count == before


def test_after_a_commit_of_its_own_it_does_not_look_at_the_schema(
    db: DbWriter, live: Watch[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[None] = []

    def counted(reader: Reader) -> list[int] | None:
        looks.append(None)
        return schema_versions(reader)

    monkeypatch.setattr(query_module, "schema_versions", counted)
    for n in range(3):  # what was there before the watch may have changed the schema
        db.run("INSERT INTO a VALUES (1)")
        while len(live.next(DEADLINE)) <= n:
            pass
    before = len(looks)
    for n in range(3, 6):
        db.run("INSERT INTO a VALUES (1)")
        while len(live.next(DEADLINE)) <= n:
            pass
    assert len(looks) == before


def test_what_others_make_of_a_view_is_known(db: DbWriter, live: Watch[Any], others: Others) -> None:
    assert live.next(DEADLINE) == []
    others(f"BEGIN; DROP VIEW v; {VIEW.format('b')}; INSERT INTO b VALUES (1); COMMIT")
    assert live.next(DEADLINE) == [(1,)]
    db.run("INSERT INTO b VALUES (2)")
    assert live.next(DEADLINE) == [(1,), (2,)]


def test_what_others_make_of_a_view_between_its_rows_and_the_question_is_known(
    db: DbWriter, live: Watch[Any], others: Others, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = query_module._fetch

    def fetch_before(cursor: sqlite3.Cursor) -> Any:
        monkeypatch.setattr(query_module, "_fetch", fetch)
        rows = fetch(cursor)
        others(f"BEGIN; DROP VIEW v; {VIEW.format('b')}; INSERT INTO b VALUES (1); COMMIT")
        return rows

    monkeypatch.setattr(query_module, "_fetch", fetch_before)
    assert live.next(DEADLINE) == []
    assert live.next(DEADLINE) == [(1,)]
    db.run("INSERT INTO b VALUES (2)")
    assert live.next(DEADLINE) == [(1,), (2,)]


def test_where_the_question_fails_each_commit_counts_and_it_is_asked_again(
    asked: Asked, db: DbWriter, live: Watch[Any], others: Others
) -> None:
    asked.error = sqlite3.OperationalError("disk I/O error")
    assert live.next(DEADLINE) == []
    assert live._entered().places is None
    asked.error = None
    others("INSERT INTO a VALUES (1)")
    assert live.next(DEADLINE) == [(1,)]
    assert live._entered().places is not None


def test_where_the_schema_is_not_told_it_asks_each_time(
    asked: Asked, live: Watch[Any], others: Others, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(query_module, "schema_versions", lambda reader: None)
    assert live.next(DEADLINE) == []
    before = asked.count
    others("INSERT INTO a VALUES (1)")
    assert live.next(DEADLINE) == [(1,)]
    assert asked.count > before
    assert live._entered().places is not None


class Strange:
    def __init__(self, answer: object) -> None:
        self._answer = answer

    def __eq__(self, other: object) -> bool:
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer  # type: ignore[return-value]

    __hash__ = None  # type: ignore[assignment]


class Undecided:
    def __bool__(self) -> bool:
        raise ValueError


@pytest.mark.parametrize("answer", [ZeroDivisionError(), Undecided(), False, 0])
def test_what_cannot_be_compared_is_not_the_same(answer: object) -> None:
    assert not same(Strange(answer), Strange(answer))


def test_the_same_object_and_equal_ones_are() -> None:
    strange = Strange(ZeroDivisionError())
    assert same(strange, strange)
    assert same([(1, "a")], [(1, "a")])
    assert not same([(1,)], [(2,)])
