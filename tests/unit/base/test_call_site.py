"""A job knows the line of its call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers import parked
from onewriter import DbWriter


def test_many_call_sites_of_one_long_function_are_named_without_reading_it_anew_for_each(path: Path) -> None:
    calls = 5000
    source = "\n".join(["tickets = []", *["tickets.append(db.enqueue('SELECT 1'))"] * calls])
    with DbWriter(path, maxsize=calls, slow_after=60) as db, parked(db) as release:
        names: dict[str, Any] = {"db": db}
        exec(compile(source, "long.py", "exec"), names)
        places = [ticket.called_from for ticket in names["tickets"]]
        assert places == [f"long.py:{line} in <module>" for line in range(2, calls + 2)]
        release.set()


def test_called_from_names_the_line_of_the_call(db: DbWriter) -> None:
    ticket = db.enqueue("SELECT 1")
    line = test_called_from_names_the_line_of_the_call.__code__.co_firstlineno + 1
    assert ticket.called_from == f"test_call_site.py:{line} in test_called_from_names_the_line_of_the_call"
