"""What peewee's manual shows of SQLite, on one connection: its source distribution has no tests.

No ``test_`` in the name: this runs by ``tests/foreign.py``, where peewee is.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from typing import Any

import peewee
import pytest
from playhouse.migrate import SqliteMigrator, migrate

database = peewee.SqliteDatabase(":memory:", pragmas={"cache_size": -2000})


class Person(peewee.Model):
    name = peewee.CharField(unique=True)

    class Meta:
        database = database


class Pet(peewee.Model):
    owner = peewee.ForeignKeyField(Person, backref="pets")
    name = peewee.CharField()

    class Meta:
        database = database


@pytest.fixture(autouse=True)
def tables() -> Iterator[None]:
    database.connect()
    database.create_tables([Person, Pet])
    yield
    database.close()


def names() -> list[str]:
    return [person.name for person in Person.select().order_by(Person.id)]


def test_rows_are_created_read_and_changed() -> None:
    ada = Person.create(name="ada")
    Pet.create(owner=ada, name="cat")
    Person.update(name="lovelace").where(Person.name == "ada").execute()
    assert [(pet.name, pet.owner.name) for pet in Pet.select()] == [("cat", "lovelace")]
    assert Person.get_or_none(Person.name == "ada") is None
    assert Pet.delete().execute() == 1


def test_atomic_keeps_or_undoes_a_part() -> None:
    with database.atomic():
        Person.create(name="ada")
        with pytest.raises(LookupError), database.atomic():
            Person.create(name="grace")
            raise LookupError
        with database.atomic() as part:
            Person.create(name="mary")
            part.rollback()
    assert names() == ["ada"]


def test_a_transaction_is_committed_as_it_goes() -> None:
    with database.transaction() as transaction:
        Person.create(name="ada")
        transaction.commit()
        Person.create(name="grace")
        transaction.rollback()
    assert names() == ["ada"]


@pytest.mark.parametrize("lock_type", ["DEFERRED", "IMMEDIATE", "EXCLUSIVE"])
def test_a_transaction_may_name_its_lock(lock_type: str) -> None:
    with database.transaction(lock_type):
        Person.create(name="ada")
    with pytest.raises(LookupError), database.transaction(lock_type):
        Person.create(name="grace")
        raise LookupError
    assert names() == ["ada"]


def test_begin_commit_and_rollback_by_hand() -> None:
    with database.manual_commit():
        database.begin()
        Person.create(name="ada")
        database.commit()
        database.begin()
        Person.create(name="grace")
        database.rollback()
    assert names() == ["ada"]


def test_a_savepoint_is_released_or_rolled_back() -> None:
    with database.atomic(), database.savepoint() as part:
        Person.create(name="ada")
        part.commit()
        Person.create(name="grace")
        part.rollback()
    assert names() == ["ada"]


def test_an_error_of_sqlite_is_peewees() -> None:
    Person.create(name="ada")
    with pytest.raises(peewee.IntegrityError):
        Person.create(name="ada")
    with pytest.raises(peewee.OperationalError):
        database.execute_sql("SELECT * FROM nowhere")
    assert names() == ["ada"]


def test_many_rows_are_inserted_at_once() -> None:
    with database.atomic():
        for batch in peewee.chunked([{"name": f"person {n}"} for n in range(250)], 100):
            Person.insert_many(batch).execute()
    assert Person.select().count() == 250
    assert Person.bulk_create([Person(name="ada"), Person(name="grace")]) is None
    assert Person.insert(name="ada").on_conflict(conflict_target=[Person.name], update={Person.name: "ada"}).execute()


def test_functions_aggregates_and_collations_are_registered() -> None:
    @database.func("shout")
    def shout(text: str) -> str:
        return text.upper()

    @database.collation("backwards")
    def backwards(a: str, b: str) -> int:
        return (a[::-1] > b[::-1]) - (a[::-1] < b[::-1])

    Person.create(name="ada")
    assert Person.select(peewee.fn.shout(Person.name)).scalar() == "ADA"
    ordered = Person.select().order_by(peewee.NodeList((Person.name, peewee.SQL("COLLATE backwards"))))
    assert [row.name for row in ordered] == ["ada"]
    database.unregister_function("shout")
    database.unregister_collation("backwards")


def test_rows_come_as_tuples_dicts_and_from_an_iterator() -> None:
    Person.insert_many([{"name": "ada"}, {"name": "grace"}]).execute()
    assert list(Person.select(Person.name).tuples()) == [("ada",), ("grace",)]
    assert list(Person.select(Person.name).dicts()) == [{"name": "ada"}, {"name": "grace"}]
    assert sum(1 for _ in Person.select().iterator()) == 2


def test_the_schema_is_looked_at_and_changed() -> None:
    migrator: Any = SqliteMigrator(database)
    migrate(
        migrator.add_column("person", "age", peewee.IntegerField(default=0)),
        migrator.rename_column("pet", "name", "called"),
        migrator.add_index("person", ("age",), False),
    )
    assert [column.name for column in database.get_columns("person")] == ["id", "name", "age"]
    assert [column.name for column in database.get_columns("pet")] == ["id", "owner_id", "called"]
    assert {"person", "pet"} <= set(database.get_tables())
    migrate(migrator.drop_index("person", "person_age"), migrator.drop_column("person", "age"))
    assert "age" not in [column.name for column in database.get_columns("person")]


def test_settings_are_read_and_set() -> None:
    assert database.pragma("cache_size") == -2000
    database.pragma("user_version", 7)
    assert database.user_version == 7
    assert database.server_version == sqlite3.sqlite_version_info
