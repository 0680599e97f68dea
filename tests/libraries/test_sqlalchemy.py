"""SQLAlchemy over a gateway: its transactions are blocks, its plain reads readers."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import sqlalchemy
from sqlalchemy import ForeignKey, func, insert, inspect, select, text
from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from onewriter import DbWriter, TransactionClosedError, WriteTimeoutError
from onewriter.sqlalchemy import engine, engine_on, on_connect

DEADLINE = 10.0


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "user"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    boss_id: Mapped[int | None] = mapped_column(ForeignKey("user.id", deferrable=True, initially="DEFERRED"))


@pytest.fixture
def db(any_db: DbWriter) -> DbWriter:
    Base.metadata.create_all(engine(any_db))
    return any_db


def names(db: DbWriter) -> list[str]:
    return [name for (name,) in db.read("SELECT name FROM user ORDER BY id")]


def test_importing_the_package_does_not_import_sqlalchemy() -> None:
    check = "import sys, onewriter; sys.exit('sqlalchemy' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)


def test_a_session_commits_as_it_goes(db: DbWriter) -> None:
    with Session(engine(db)) as session:
        session.add(User(name="ada"))
        assert session.scalars(select(User.name)).all() == ["ada"]  # autoflush
        assert names(db) == ["ada"]  # in the block
        session.commit()
        committed = db.stats().committed
        session.add(User(name="undone"))
        session.flush()
        session.rollback()
        session.add(User(name="grace"))
        session.commit()
        assert db.stats().committed > committed
    assert names(db) == ["ada", "grace"]


def test_a_session_that_is_left_without_commit_is_rolled_back_and_frees_the_writer(db: DbWriter) -> None:
    with Session(engine(db)) as session:
        session.add(User(name="ada"))
        session.flush()
    assert db.stats().running is None
    assert names(db) == []


def test_a_nested_session_undoes_itself_alone(db: DbWriter) -> None:
    with Session(engine(db)) as session, session.begin():
        session.add(User(name="ada"))
        with pytest.raises(IntegrityError), session.begin_nested():
            session.add(User(name="ada"))
            session.flush()
        session.add(User(name="grace"))
    assert names(db) == ["ada", "grace"]


def test_begin_is_a_block_from_its_first_statement_to_its_commit(db: DbWriter) -> None:
    with engine(db).begin() as connection:
        connection.execute(insert(User), [{"name": "ada"}, {"name": "grace"}])
        refused: list[BaseException] = []

        def write() -> None:
            try:
                db.run("INSERT INTO user (name) VALUES ('mary')", timeout=0.01)
            except WriteTimeoutError as error:
                refused.append(error)

        other = threading.Thread(target=write)
        other.start()
        other.join(DEADLINE)
        assert "SQLAlchemy in test_sqlalchemy.py" in str(refused[0])  # names who holds the writer
        assert db.run("UPDATE user SET boss_id = 1 WHERE id = 2").rowcount == 1  # the same context is inside
    assert db.read("SELECT name, boss_id FROM user") == [("ada", None), ("grace", 1)]


def test_an_exception_in_begin_undoes_it_all(db: DbWriter) -> None:
    with pytest.raises(LookupError), engine(db).begin() as connection:
        connection.execute(insert(User), {"name": "ada"})
        raise LookupError
    assert names(db) == []


def test_a_commit_that_fails_raises_what_sqlite_raised_and_leaves_the_writer_free(db: DbWriter) -> None:
    with pytest.raises(IntegrityError) as caught, Session(engine(db)) as session:
        session.execute(insert(User), {"name": "ada", "boss_id": 9})
        session.commit()
    assert isinstance(caught.value.orig, sqlite3.IntegrityError)
    assert names(db) == []
    db.run("INSERT INTO user (name) VALUES ('mary')")


def test_a_readonly_engine_sees_one_state_and_waits_for_no_writer(db: DbWriter) -> None:
    db.run("INSERT INTO user (name) VALUES ('ada')")
    with Session(engine(db, readonly=True)) as session:
        assert session.scalars(select(User.name)).all() == ["ada"]
        with db.transaction() as tx:
            tx.execute("INSERT INTO user (name) VALUES ('grace')")
            assert session.scalar(select(func.count()).select_from(User)) == 1
        assert session.scalar(select(func.count()).select_from(User)) == 1
        session.rollback()
        assert session.scalar(select(func.count()).select_from(User)) == 2


def test_a_readonly_engine_refuses_to_write(db: DbWriter) -> None:
    with Session(engine(db, readonly=True)) as session, pytest.raises(OperationalError, match="readonly"):
        session.execute(insert(User), {"name": "ada"})
    assert names(db) == []


def test_readers_go_back_to_the_pool(db: DbWriter) -> None:
    reading = engine(db, readonly=True)
    for _ in range(9):  # there are four
        with reading.connect() as connection:
            assert connection.scalar(select(func.count()).select_from(User)) == 0
        assert inspect(reading).get_table_names() == ["user"]
        assert inspect(engine(db)).get_table_names() == ["user"]
    assert db.stats().readers_in_use == 0


def test_a_session_on_a_block_is_a_part_of_it(db: DbWriter) -> None:
    with db.transaction() as tx:
        tx.execute("INSERT INTO user (name) VALUES ('ada')")
        with Session(engine_on(tx)) as session:
            session.add(User(name="grace"))
            session.commit()
            session.add(User(name="undone"))
            session.flush()
            session.rollback()
        tx.execute("INSERT INTO user (name) VALUES ('mary')")
        assert tx.execute("SELECT count(*) FROM user").fetchone() == (3,)
    assert names(db) == ["ada", "grace", "mary"]


def test_what_a_session_committed_is_undone_with_the_block_that_fails(db: DbWriter) -> None:
    with pytest.raises(LookupError), db.transaction() as tx:
        with Session(engine_on(tx)) as session:
            session.add(User(name="grace"))
            session.commit()
        raise LookupError
    assert names(db) == []


def test_an_engine_on_a_block_ends_with_it(db: DbWriter) -> None:
    with db.transaction() as tx:
        ended = engine_on(tx)
        with ended.connect() as connection:
            assert connection.execute(text("SELECT 1")).scalar() == 1
    with pytest.raises((TransactionClosedError, ProgrammingError)), ended.connect() as connection:
        connection.execute(text("SELECT 1"))


def test_a_job_may_have_a_session(db: DbWriter) -> None:
    def work(tx: object) -> int:
        with Session(engine_on(tx)) as session:  # type: ignore[arg-type]
            user = User(name="ada")
            session.add(user)
            session.commit()
            return int(user.id)

    assert db.run(work) == 1
    assert names(db) == ["ada"]


def test_inside_a_block_an_engine_of_the_gateway_nests(db: DbWriter) -> None:
    with pytest.raises(LookupError), db.transaction():
        with Session(engine(db)) as session:
            session.add(User(name="ada"))
            session.commit()
        raise LookupError
    assert names(db) == []


def test_the_functions_that_sqlalchemy_counts_on_are_on_every_connection(path: Path) -> None:
    with DbWriter(path, on_connect=on_connect) as db:
        for made in (engine(db), engine(db, readonly=True)):
            with made.connect() as connection:
                found = connection.execute(select(sqlalchemy.literal("ada").regexp_match("^a"), func.floor(1.5)))
                assert found.one() == (True, 1)
