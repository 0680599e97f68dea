"""The suites: what each needs, where its tests come from, and how they are run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


def do_nothing(folder: Path) -> None:
    pass


def make_iris(folder: Path) -> None:
    """The table that pandas' tests read, which its wheel has not: of this size, and with this first row."""
    data = folder / "tests" / "io" / "data" / "csv"
    data.mkdir(parents=True)
    rows = [f"5.1,3.5,1.4,0.2,Iris-{name}" for name in ("setosa", "versicolor", "virginica") for _ in range(50)]
    heads = "SepalLength,SepalWidth,PetalLength,PetalWidth,Name"
    (data / "iris.csv").write_text("\n".join([heads, *rows]), encoding="utf-8")


@dataclass(frozen=True)
class Suite:
    """Other people's tests, or a few of the library's own examples where the registry has no tests of it."""

    name: str
    needs: tuple[str, ...]  # what pip installs
    tests: tuple[str, ...]  # paths, in the source
    source: str = ""  # the requirement whose source distribution has the tests; "": the running Python, or here
    options: tuple[str, ...] = ()  # of pytest
    files: bool = False  # its databases in files are lent too
    attached: str = ""  # the schema that it attaches
    prepare: Callable[[Path], None] = do_nothing  # the folder of the tests
    quick: tuple[str, ...] = ()  # the arguments of pytest for the short form, which fetches nothing


CPYTHON, WHEEL, HERE = "cpython", "wheel:", "here"  # sources that need no download

SQLALCHEMY = ("sqlalchemy>=2.0",)
IN_MEMORY = ("--db", "sqlite", "-p", "no:logging", "--maxfail=10000")

SUITES = (
    Suite("cpython", (), ("test_sqlite3",), CPYTHON, quick=("test_sqlite3",)),
    Suite(
        "sqlalchemy",
        SQLALCHEMY,
        ("test/dialect/test_suite.py",),
        "sqlalchemy>=2.0",
        options=IN_MEMORY,
        attached="test_schema",
    ),
    Suite(
        "sqlalchemy-orm",
        SQLALCHEMY,
        (
            "test/engine/test_transaction.py",
            "test/orm/test_session.py",
            "test/orm/test_transaction.py",
            "test/orm/test_unitofwork.py",
        ),
        "sqlalchemy>=2.0",
        options=IN_MEMORY,
        attached="test_schema",
    ),
    Suite(
        "pandas",
        ("pandas>=2.2", *SQLALCHEMY),
        ("tests/io/test_sql.py",),
        "wheel:pandas",
        files=True,
        prepare=make_iris,
        quick=("tests/io/test_sql.py", "-k", "sqlite_buildin or xsqlite"),
    ),
    Suite("sqlite-utils-3", ("sqlite-utils<4", "hypothesis"), ("tests",), "sqlite-utils<4"),
    Suite("sqlite-utils-4", ("sqlite-utils>=4", "hypothesis"), ("tests",), "sqlite-utils>=4"),
    Suite("alembic", ("alembic", "pytz"), ("tests",), "alembic", options=IN_MEMORY, attached="test_schema"),
    Suite(
        "sqlmodel",
        ("sqlmodel", "dirty-equals", "httpx", "fastapi", "typer", "coverage", "black", "jinja2"),
        ("tests",),
        "sqlmodel",
    ),
    Suite("sqlite-migrate", ("sqlite-utils<4", "sqlite-migrate==0.1b0"), ("tests",), "sqlite-migrate==0.1b0"),
    Suite("peewee", ("peewee>=4",), ("peewee_examples.py",), HERE),
    Suite("yoyo", ("yoyo-migrations",), ("yoyo_examples.py",), HERE),
    Suite("datasette", ("datasette<1",), ("datasette_examples.py",), HERE),
)
