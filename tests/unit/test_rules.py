"""Rules of the source that anyone can grep, and the public names."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any, assert_type

import pytest

import onewriter
from onewriter import DbWriter, Result, Ticket, Transaction

SOURCE = Path(onewriter.__file__).parent
FILES = {path.relative_to(SOURCE).as_posix(): path.read_text(encoding="utf-8") for path in sorted(SOURCE.rglob("*.py"))}
PROGRAMS = {"tools/bench.py", "tools/check.py"}
ARCHITECTURE = Path(__file__).parents[2] / "docs" / "concepts.md"


def files_with(pattern: str) -> set[str]:
    return {name for name, text in FILES.items() if re.search(pattern, text)} - PROGRAMS


def test_the_public_names_are_these() -> None:
    expected = [
        "AsyncDbWriter",
        "AsyncTransaction",
        "CloseReport",
        "CommitUnknownError",
        "DbWriter",
        "ForkedError",
        "OneWriterError",
        "QueueFullError",
        "ReadTimeoutError",
        "ReentrantWriteError",
        "Result",
        "Stats",
        "Ticket",
        "Transaction",
        "TransactionAbortedError",
        "TransactionClosedError",
        "WriteTimeoutError",
        "WriterBrokenError",
        "WriterClosedError",
    ]
    assert sorted(onewriter.__all__) == sorted(expected)
    assert all(hasattr(onewriter, name) for name in expected)


def test_every_error_is_one_of_the_packages_and_says_what_became_of_the_write() -> None:
    errors = [getattr(onewriter, name) for name in onewriter.__all__ if name.endswith("Error")]
    assert all(issubclass(error, onewriter.OneWriterError) and error.__doc__ for error in errors)
    assert issubclass(onewriter.WriteTimeoutError, TimeoutError)
    assert issubclass(onewriter.ReadTimeoutError, TimeoutError)


RULES = re.findall(r"^- The only `(.+?)`: (.+)$", ARCHITECTURE.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize(("text", "places"), RULES, ids=[text for text, _ in RULES])
def test_there_is_one_place_for_it(text: str, places: str) -> None:
    assert files_with(rf"(?<!\w){re.escape(text)}") == set(re.findall(r"`([\w/]+\.py)`", places))


def test_the_architecture_page_has_the_rules() -> None:
    assert len(RULES) == 11
    assert files_with(r"from tenacity|\bdatetime\b|open\(self\._?path") == set()


def test_imports_point_one_way() -> None:
    """At run time: what only annotations need may point anywhere."""

    def imported(text: str) -> set[str]:
        names = {node.module or "" for node in ast.parse(text).body if isinstance(node, ast.ImportFrom)}
        return {f"{name.removeprefix('onewriter.')}.py" for name in names if name.startswith("onewriter.")}

    left = {name: imported(text) & FILES.keys() for name, text in FILES.items()}
    while left:
        free = {name for name, needs in left.items() if not needs & left.keys()}
        assert free, f"these import each other in a circle: {sorted(left)}"
        left = {name: needs for name, needs in left.items() if name not in free}


def test_every_file_says_what_it_is() -> None:
    assert all(ast.get_docstring(ast.parse(text)) for text in FILES.values())


def test_types_follow_the_function(any_db: DbWriter) -> None:
    def length(tx: Transaction) -> int:
        return 3

    assert_type(any_db.run(length), int)
    assert_type(any_db.run("SELECT 1"), Result)
    assert_type(any_db.enqueue(length), Ticket[int])
    assert_type(any_db.enqueue("SELECT 1"), Ticket[Result])
    assert_type(any_db.enqueue(length).result(), int)
    assert_type(any_db.read("SELECT 1"), list[Any])
    assert_type(any_db.read(lambda connection: str(connection.total_changes)), str)
