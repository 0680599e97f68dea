"""An attribute that would be ignored is refused, and the error says where it belongs."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import pytest

from onewriter import AsyncDbWriter, DbWriter, Transaction


@pytest.fixture
def db(any_db: DbWriter) -> DbWriter:
    any_db.run("CREATE TABLE t (n INTEGER PRIMARY KEY)")
    return any_db


CONNECTIONS = ["row_factory", "text_factory", "isolation_level", "autocommit"]


@pytest.mark.parametrize("name", [*CONNECTIONS, "maxsize", "whatever"])
def test_what_a_gateway_or_transaction_would_ignore_is_refused(db: DbWriter, path: Path, name: str) -> None:
    def refuses(thing: object) -> None:
        with pytest.raises(AttributeError, match=name) as caught:
            setattr(thing, name, sqlite3.Row)
        if name in CONNECTIONS:
            assert "attribute of the connection" in str(caught.value)
        assert not hasattr(thing, name)

    refuses(db)
    db.run(refuses)
    with db.transaction() as tx:
        refuses(tx)

    async def main() -> None:
        async with AsyncDbWriter(path) as gateway, gateway.transaction() as tx:
            refuses(gateway)
            refuses(tx)

    asyncio.run(main())


def test_subclasses_have_attributes_of_their_own(path: Path) -> None:
    class Mine(DbWriter):
        def __init__(self, path: Path) -> None:
            self.name = "mine"
            super().__init__(path)

    with Mine(path) as db:
        assert db.name == "mine"
        with pytest.raises(AttributeError, match="argument of DbWriter"):
            db.row_factory = sqlite3.Row


def test_a_class_names_itself_as_what_lacks_the_attribute() -> None:
    with pytest.raises(AttributeError, match="Transaction has no attribute 'autocommit'"):
        Transaction.autocommit  # noqa: B018
