"""The gateway equals a plain connection that runs the same jobs one after the other, each in its own transaction."""

from __future__ import annotations

import contextlib
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from helpers import parked
from onewriter import DbWriter, Ticket, TransactionAbortedError

DEADLINE = 30.0
LONGEST = 100_000  # bytes of a string or blob on these connections, so that "too big" costs nothing

SHARED = """
CREATE TABLE item (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, size INTEGER CHECK (size < 100));
CREATE TABLE blobs (id INTEGER PRIMARY KEY, data, twice GENERATED ALWAYS AS (data || data) STORED);
CREATE TABLE strictly (id INTEGER PRIMARY KEY, n INTEGER) STRICT;
CREATE TABLE failing (name TEXT UNIQUE ON CONFLICT FAIL, n INTEGER);
CREATE TABLE parent (id INTEGER PRIMARY KEY);
CREATE TABLE child (id INTEGER PRIMARY KEY, parent INTEGER NOT NULL REFERENCES parent (id));
CREATE TABLE watched (n INTEGER);
CREATE TABLE audit (n INTEGER);
CREATE TRIGGER watch AFTER INSERT ON watched BEGIN
    INSERT INTO audit VALUES (NEW.n);
    SELECT CASE NEW.n WHEN 1 THEN RAISE(FAIL, 'n is 1') WHEN 2 THEN RAISE(ABORT, 'n is 2')
                      WHEN 3 THEN RAISE(IGNORE) END;
END;
"""
UNDOING = """
CREATE TABLE undoing (name TEXT UNIQUE ON CONFLICT ROLLBACK, n INTEGER);
CREATE TRIGGER undo AFTER INSERT ON watched WHEN NEW.n = 4 BEGIN SELECT RAISE(ROLLBACK, 'n is 4'); END;
"""
DEFERRED = """
CREATE TABLE late (id INTEGER PRIMARY KEY, parent INTEGER REFERENCES parent (id) DEFERRABLE INITIALLY DEFERRED);
"""
SCHEMAS = {"shared": SHARED, "undoing": SHARED + UNDOING, "deferred": SHARED + UNDOING + DEFERRED}
REFUSED = ("BEGIN", "COMMIT", "END", "ROLLBACK", "SAVEPOINT", "RELEASE")

Rows: TypeAlias = list[tuple[Any, ...]]


def set_limit(connection: sqlite3.Connection, readonly: bool = False) -> None:
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LONGEST)


class Executed(Protocol):
    @property
    def rows(self) -> list[Any]: ...
    @property
    def rowcount(self) -> int: ...
    @property
    def lastrowid(self) -> int | None: ...


class Executes(Protocol):
    """What a job's function may use, of the gateway's Transaction and of the reference's."""

    def execute(self, sql: str, params: Any = (), /) -> Executed: ...
    def executemany(self, sql: str, seq_of_params: Any, /) -> Executed: ...
    def executescript(self, sql: str, /) -> None: ...
    def savepoint(self) -> AbstractContextManager[None]: ...


# What a job is --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Statement:
    sql: str
    params: tuple[Any, ...] = ()

    def perform(self, tx: Executes) -> object:
        return seen(tx.execute(self.sql, self.params))


@dataclass(frozen=True)
class Many:
    sql: str
    rows: tuple[tuple[Any, ...], ...]

    def perform(self, tx: Executes) -> object:
        return tx.executemany(self.sql, self.rows).rowcount


@dataclass(frozen=True)
class Script:
    statements: tuple[str, ...]

    @property
    def sql(self) -> str:
        return ";\n".join(self.statements) + ";"

    def perform(self, tx: Executes) -> object:
        tx.executescript(self.sql)
        return None


@dataclass(frozen=True)
class Nested:
    """A savepoint; ``fails``: an error of the job's own ends it."""

    steps: tuple[Statement | Many | Script, ...]
    fails: bool

    def perform(self, tx: Executes) -> object:
        with tx.savepoint():
            outcomes = [step.perform(tx) for step in self.steps]
            if self.fails:
                raise JobError("in the savepoint")
        return outcomes


@dataclass(frozen=True)
class Function:
    """Some steps, whose sqlite3 errors are swallowed or not; ``fails``: an error of the job's own at the end."""

    steps: tuple[Statement | Many | Script | Nested, ...]
    swallows: bool
    fails: bool

    def perform(self, tx: Executes) -> object:
        outcomes: list[object] = []
        for step in self.steps:
            try:
                outcomes.append(step.perform(tx))
            except (sqlite3.Error, JobError) as error:
                if not self.swallows:
                    raise
                outcomes.append(identity(error))
        if self.fails:
            raise JobError("at the end")
        return outcomes


Job: TypeAlias = Statement | Many | Script | Function


class JobError(Exception):
    """What a job raises that SQLite has nothing to do with."""


def seen(result: Executed) -> object:
    return result.rows, result.rowcount, result.lastrowid


def identity(error: BaseException) -> object:
    """What must be the same of an error here and there."""
    if isinstance(error, TransactionAbortedError):
        return TransactionAbortedError
    return type(error), str(error), getattr(error, "sqlite_errorcode", None)


@dataclass(frozen=True)
class Outcome:
    value: object = None
    error: object = None


def outcome_of(call: Callable[[], object]) -> Outcome:
    try:
        return Outcome(value=call())
    except Exception as error:
        return Outcome(error=identity(error))


# The reference --------------------------------------------------------------------------------------------------------


class Reference:
    """Each job alone in its own transaction on a plain connection."""

    def __init__(self, path: Path, schema: str) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None)
        set_limit(self._connection)
        self._connection.execute("PRAGMA foreign_keys = ON")
        self._connection.execute("PRAGMA synchronous = OFF")
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.executescript(schema)
        self.undone = 0  # jobs that ended the whole transaction, or whose COMMIT failed

    def close(self) -> None:
        self._connection.close()

    def query(self, sql: str, params: tuple[Any, ...]) -> Rows:
        return self._connection.execute(sql, params).fetchall()

    def dump(self) -> dict[str, Rows]:
        return dump(self._connection)

    def apply(self, job: Job) -> Outcome:
        self._connection.execute("BEGIN IMMEDIATE")
        outcome = outcome_of(lambda: self._run_and_commit(job))
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")
        elif outcome.error is not None:
            self.undone += 1
        return outcome

    def _run_and_commit(self, job: Job) -> object:
        value = job.perform(PlainTransaction(self._connection))
        if not self._connection.in_transaction:
            raise TransactionAbortedError
        try:
            self._connection.execute("COMMIT")
        except sqlite3.Error:
            self.undone += 1
            raise
        return value


@dataclass
class PlainResult:
    rows: list[Any]
    rowcount: int
    lastrowid: int | None


class PlainTransaction:
    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._depth = 0

    def execute(self, sql: str, params: Any = (), /) -> PlainResult:
        self._check()
        verb = sql.split()[0]
        if verb in REFUSED:
            raise refusal()
        cursor = self._connection.execute(sql, params)
        with contextlib.closing(cursor):
            rows = cursor.fetchall()
            inserted = verb in ("INSERT", "REPLACE") and cursor.rowcount > 0 and "DO UPDATE" not in sql
            return PlainResult(rows, cursor.rowcount, cursor.lastrowid if inserted else None)

    def executemany(self, sql: str, seq_of_params: Any, /) -> PlainResult:
        self._check()
        with contextlib.closing(self._connection.executemany(sql, seq_of_params)) as cursor:
            return PlainResult([], cursor.rowcount, None)

    def executescript(self, sql: str, /) -> None:
        decode, self._connection.text_factory = self._connection.text_factory, bytes  # rows of a script are dropped
        try:
            with self.savepoint():
                for statement in sql.split(";"):
                    if statement.strip():
                        self.execute(statement)
        finally:
            self._connection.text_factory = decode

    @contextlib.contextmanager
    def savepoint(self) -> Iterator[None]:
        self._check()
        self._depth += 1
        name = f"level_{self._depth}"
        self._connection.execute(f"SAVEPOINT {name}")
        try:
            yield
            self._check()
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute(f"ROLLBACK TO {name}")
            raise
        finally:
            self._depth -= 1
            if self._connection.in_transaction:
                self._connection.execute(f"RELEASE {name}")

    def _check(self) -> None:
        if not self._connection.in_transaction:
            raise TransactionAbortedError


def refusal() -> sqlite3.DatabaseError:
    error = sqlite3.DatabaseError("not authorized")
    error.sqlite_errorcode = sqlite3.SQLITE_AUTH
    return error


def dump(connection: sqlite3.Connection) -> dict[str, Rows]:
    """Every table's rows, each with its rowid."""
    tables = connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name").fetchall()
    return {name: connection.execute(f"SELECT rowid, * FROM {name} ORDER BY rowid").fetchall() for (name,) in tables}


# Jobs at random -------------------------------------------------------------------------------------------------------

ids = st.integers(1, 8)
names = st.sampled_from("abcdefg")
sizes = st.sampled_from([1, 2, 99, 100])
few = st.integers(0, 5)


def statements(text: str, **kinds: st.SearchStrategy[Any]) -> st.SearchStrategy[Statement]:
    """The text with a value for each ``?``, of the kinds named."""
    return st.tuples(*kinds.values()).map(partial(Statement, text))


TOO_BIG = f"printf('%.*c', {LONGEST // 2}, 'x') || printf('%.*c', {LONGEST // 2 + 10}, 'x')"

good = st.one_of(
    statements("INSERT INTO item (name, size) VALUES (?, ?)", name=names, size=sizes),
    statements("INSERT INTO item (name, size) VALUES (?, 1) RETURNING id, name", name=names),
    statements("UPDATE item SET size = ? WHERE id <= ?", size=sizes, id=ids),
    statements("UPDATE item SET size = ifnull(size, 0) + 1 WHERE name >= ? RETURNING name, size", name=names),
    statements("DELETE FROM item WHERE id = ?", id=ids),
    statements("DELETE FROM item WHERE name > ? RETURNING id", name=names),
    statements("INSERT OR IGNORE INTO item (name, size) VALUES (?, ?), ('a', 5)", name=names, size=sizes),
    statements("INSERT OR REPLACE INTO item (name, size) VALUES (?, ?), ('b', 5)", name=names, size=sizes),
    statements("REPLACE INTO item (id, name, size) VALUES (?, ?, 7)", id=ids, name=names),
    statements(
        "INSERT INTO item (name, size) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET size = excluded.size",
        name=names,
        size=sizes,
    ),
    statements("INSERT INTO parent VALUES (?)", id=ids),
    statements("DELETE FROM parent WHERE id = ?", id=ids),
    statements("INSERT INTO child (parent) VALUES (?)", id=ids),
    statements("DELETE FROM child WHERE parent = ?", id=ids),
    statements("SELECT count(*) FROM item"),
    statements("SELECT id, name FROM item ORDER BY id"),
    statements("INSERT INTO strictly (n) VALUES (?)", n=few),
    statements("INSERT INTO failing VALUES (?, ?)", name=names, n=few),
    statements("INSERT INTO watched VALUES (?)", n=few),
)
bad = st.one_of(
    statements("INSERT INTO item (name, size) VALUES ('z', 1), (?, 2), ('z', 3)", name=names),  # UNIQUE, midway
    statements("INSERT INTO item (name, size) VALUES (?, 1), (NULL, 2)", name=names),  # NOT NULL, midway
    statements("INSERT INTO item (name, size) VALUES (?, 1), ('y', 100)", name=names),  # CHECK, midway
    statements("UPDATE item SET size = size + ?", size=sizes),
    statements("UPDATE OR FAIL item SET size = size + 40"),
    statements("UPDATE OR FAIL item SET name = ?", name=names),
    statements("INSERT OR FAIL INTO item (name, size) VALUES (?, 1), (?, 2), ('c', 3)", name=names, other=names),
    statements("INSERT OR ABORT INTO item (id, name, size) VALUES (?, ?, 3), (1, 'x', 1)", id=ids, name=names),
    statements("INSERT INTO failing VALUES ('p', ?), (?, 2), ('p', 3)", n=few, name=names),
    statements("INSERT INTO strictly (n) VALUES (?), ('text'), (3)", n=few),
    statements("INSERT INTO strictly (n) SELECT column1 FROM (VALUES (?), (2), ('text'))", n=few),
    statements(f"INSERT INTO blobs (data) VALUES (?), (zeroblob({LONGEST + 1}))", n=few),
    statements("INSERT INTO blobs (data) VALUES (?), (zeroblob(2000000000))", n=few),
    statements(f"INSERT INTO blobs (data) VALUES (?), ({TOO_BIG})", n=few),
    statements(f"INSERT INTO blobs (data) VALUES (?), (printf('%.*c', {LONGEST // 2 + 10}, 'x'))", n=few),
    statements(f"UPDATE blobs SET data = CASE WHEN id > ? THEN {TOO_BIG} ELSE id END", id=ids),
    statements("INSERT INTO strictly (n) VALUES (?) RETURNING CAST(x'ff' AS TEXT)", n=few),
    statements(
        "INSERT INTO strictly (n) VALUES (1), (2), (?) RETURNING CASE n WHEN 2 THEN CAST(x'ff' AS TEXT) END", n=few
    ),
    statements("DELETE FROM strictly WHERE n >= ? RETURNING CAST(x'ff' AS TEXT)", n=few),
    statements("INSERT INTO watched VALUES (5), (?), (6)", n=few),
    statements("INSERT INTO watched VALUES (5), (?), (1)", n=few),
    statements("INSERT INTO watched VALUES (5), (?), (2)", n=few),
    statements("INSERT INTO child (parent) SELECT id FROM parent UNION ALL VALUES (?)", id=ids),
    statements("INSERT INTO child (parent) VALUES (?), (99)", id=ids),
    statements("INSERT INTO nowhere VALUES (?)", n=few),
    statements("INSERT INTO item VALUES (?", n=few),
    st.just(Statement("INSERT INTO item (name, size) VALUES (?, ?)", ("a",))),  # a parameter is missing
    statements("SELECT CASE id WHEN ? THEN CAST(x'ff' AS TEXT) END FROM item", id=ids),
    statements("SELECT abs(?)", n=st.just(-(2**63))),  # integer overflow
)
# The authorizer hears of these; none may end or begin anything.
ending = st.sampled_from(
    [Statement(sql) for sql in ("COMMIT", "END", "BEGIN", "BEGIN IMMEDIATE", "SAVEPOINT a", "RELEASE a")]
)
rolling_back = st.sampled_from(
    [Statement("ROLLBACK"), Statement("ROLLBACK TO onewriter_1"), Statement("ROLLBACK TO a")]
)
schema_changes = st.sampled_from(
    [
        Statement("CREATE TABLE extra (n INTEGER)"),
        Statement("DROP TABLE IF EXISTS extra"),
        Statement("INSERT INTO extra VALUES (1)"),
        Statement("CREATE UNIQUE INDEX IF NOT EXISTS one ON strictly (n)"),
        Statement("DROP INDEX IF EXISTS one"),
    ]
)
undoing = st.one_of(
    statements("INSERT OR ROLLBACK INTO item (name, size) VALUES (?, 1), (?, 2)", name=names, other=names),
    statements("UPDATE OR ROLLBACK item SET name = ?", name=names),
    statements("INSERT INTO undoing VALUES (?, ?)", name=names, n=few),
    statements("INSERT INTO undoing VALUES ('q', ?), (?, 2), ('q', 3)", n=few, name=names),
    statements("INSERT INTO watched VALUES (5), (?), (4)", n=few),
    rolling_back,
)
close_ids = st.integers(1, 3)
# A violation by one of these is often healed by the next, which would hide it if they shared a COMMIT.
late = st.one_of(
    statements("INSERT INTO late (parent) VALUES (?)", id=close_ids),
    statements("INSERT OR FAIL INTO late (id, parent) VALUES (?, ?), (1, 1)", id=close_ids, parent=close_ids),
    statements("INSERT INTO late (parent) VALUES (77)"),
    statements("DELETE FROM late WHERE parent >= ?", id=close_ids),
    statements("INSERT OR IGNORE INTO parent VALUES (?)", id=close_ids),
    statements("DELETE FROM parent WHERE id = ?", id=close_ids),
)
many = st.one_of(
    st.builds(
        Many,
        st.sampled_from(
            [
                "INSERT INTO item (name, size) VALUES (?, ?)",
                "INSERT OR FAIL INTO item (name, size) VALUES (?, ?)",
                "INSERT OR IGNORE INTO item (name, size) VALUES (?, ?)",
                "INSERT INTO failing VALUES (?, ?)",
                "UPDATE item SET size = ?2 WHERE name = ?1",
            ]
        ),
        st.lists(st.tuples(names, sizes), max_size=4).map(tuple),
    ),
    st.builds(Many, st.just("INSERT INTO watched VALUES (?)"), st.lists(st.tuples(few), max_size=4).map(tuple)),
    st.builds(
        Many,
        st.just("INSERT INTO strictly (n) VALUES (?)"),
        st.lists(st.tuples(st.sampled_from([1, 2, "text"])), max_size=4).map(tuple),
    ),
)


def literal(statement: Statement) -> str:
    """The statement with its values written into the text."""
    text = statement.sql
    for value in statement.params:
        text = text.replace("?", repr(value), 1)
    return text


def one_kind_of(*kinds: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """First the kind, then one of it: ``one_of`` would choose evenly among all that the kinds are made of."""
    return st.sampled_from(kinds).flatmap(lambda kind: kind)


def jobs_of(schema: str) -> tuple[st.SearchStrategy[Job], st.SearchStrategy[Job]]:
    """Jobs that this schema has tables for: of every kind, and of those that ``enqueue`` takes."""
    kinds = [good, good, good, bad, bad, ending, schema_changes]
    kinds += [undoing] * 2 if schema != "shared" else []
    kinds += [late] * 6 if schema == "deferred" else []
    statement = one_kind_of(*kinds)
    # A script with an incomplete statement swallows those behind it, so it has none.
    whole = statement.filter(lambda s: s.sql.count("?") == len(s.params) and s.sql.count("(") == s.sql.count(")"))
    script = st.builds(Script, st.lists(whole.map(literal), max_size=4).map(tuple))
    step = one_kind_of(statement, statement, statement, many, script)
    nested = st.builds(Nested, st.lists(step, max_size=3).map(tuple), st.booleans())
    steps = st.lists(one_kind_of(step, step, nested), max_size=4).map(tuple)
    function = st.builds(Function, steps, st.booleans(), st.sampled_from([False, False, False, True]))
    queued = one_kind_of(statement, statement, statement, function)
    return one_kind_of(queued, many, script), queued


JOBS = {schema: jobs_of(schema) for schema in SCHEMAS}


# The machine ----------------------------------------------------------------------------------------------------------


@dataclass
class Counted:
    """A function that counts how often it ran."""

    job: Function
    runs: int = field(default=0)

    def __call__(self, tx: Executes) -> object:
        self.runs += 1
        return self.job.perform(tx)


class Snapshot:
    """A ``reader()`` block in a thread of its own, since the reads of a thread belong to its block."""

    def __init__(self, db: DbWriter, expected: dict[str, Rows]) -> None:
        self.expected = expected
        self._thread = ThreadPoolExecutor(1)
        self._block = db.reader(timeout=DEADLINE)
        self._connection = self._thread.submit(self._block.__enter__).result(DEADLINE)

    def dump(self) -> dict[str, Rows]:
        return self._thread.submit(dump, self._connection).result(DEADLINE)

    def end(self) -> None:
        self._thread.submit(self._block.__exit__, None, None, None).result(DEADLINE)
        self._thread.shutdown()


class Model(RuleBasedStateMachine):
    """Only one of the two knows that jobs can share a transaction."""

    schema = "shared"
    inline = False

    def __init__(self) -> None:
        super().__init__()
        self._snapshots: list[Snapshot] = []
        self._folder = tempfile.TemporaryDirectory()
        self._db: DbWriter | None = None
        self._reference: Reference | None = None
        self._last_sequence = 0

    @property
    def db(self) -> DbWriter:
        assert self._db is not None
        return self._db

    @property
    def reference(self) -> Reference:
        assert self._reference is not None
        return self._reference

    def teardown(self) -> None:
        for snapshot in self._snapshots:
            snapshot.end()
        if self._db is not None:
            self._db.close(timeout=DEADLINE)
        if self._reference is not None:
            self._reference.close()
        self._folder.cleanup()

    @initialize()
    def open_both(self) -> None:
        folder = Path(self._folder.name)
        self._reference = Reference(folder / "reference.db", SCHEMAS[self.schema])
        self._db = self._open()
        self._db.run_script(SCHEMAS[self.schema])

    def _open(self) -> DbWriter:
        self._last_sequence = 0
        # Failures of enqueue() are compared here, so they need no log lines.
        path = Path(self._folder.name) / "gateway.db"
        return DbWriter(path, synchronous="OFF", on_connect=set_limit, on_error=lambda ticket: None, inline=self.inline)

    @rule(data=st.data(), how=st.sampled_from(["job", "block", "nested blocks", "job in a block"]))
    def run_a_job(self, data: st.DataObject, how: str) -> None:
        job = data.draw(JOBS[self.schema][0])
        before = self.reference.undone
        expected = self.reference.apply(job)
        work = Counted(job) if isinstance(job, Function) else None
        found = outcome_of(lambda: self._run(job, work, how))
        assert found == expected, job
        if work is not None:
            self._check_runs([work], self.reference.undone > before)

    def _run(self, job: Job, work: Counted | None, how: str) -> object:
        match job:
            case Statement(sql, params):
                return seen(self.db.run(sql, params, timeout=DEADLINE))
            case Many(sql, rows):
                return self.db.run_many(sql, rows, timeout=DEADLINE).rowcount
            case Script():
                self.db.run_script(job.sql, timeout=DEADLINE)
                return None
        assert work is not None
        if how == "job":
            return self.db.run(work, timeout=DEADLINE)
        with self.db.transaction(timeout=DEADLINE) as tx:
            if how == "block":
                return work(tx)
            if how == "job in a block":
                return self.db.run(work)
            with self.db.transaction() as inner:
                return work(inner)

    @rule(
        data=st.data(), withdrawn=st.sets(st.integers(0, 11), max_size=2), closes=st.sampled_from([False] * 7 + [True])
    )
    def run_jobs_that_were_queued_together(self, data: st.DataObject, withdrawn: set[int], closes: bool) -> None:
        jobs = data.draw(st.lists(JOBS[self.schema][1], min_size=2, max_size=12))
        works = [Counted(job) if isinstance(job, Function) else None for job in jobs]
        with contextlib.nullcontext() if self.inline else parked(self.db):
            tickets = [self._enqueue(job, work) for job, work in zip(jobs, works, strict=True)]
            withdrawn = {place for place in withdrawn if place < len(jobs) and tickets[place].cancel()}
        if closes:
            self._close()
        before = self.reference.undone
        for place, (job, ticket) in enumerate(zip(jobs, tickets, strict=True)):
            if place in withdrawn:
                assert ticket.cancelled()
                continue
            expected = self.reference.apply(job)
            found = outcome_of(lambda job=job, ticket=ticket: self._result(job, ticket))  # type: ignore[misc]
            assert found == expected, (place, job)
            self._check_sequence(ticket, expected.error is None)
        ran = [work for place, work in enumerate(works) if work is not None and place not in withdrawn]
        self._check_runs(ran, self.reference.undone > before)
        assert not any(work.runs for place, work in enumerate(works) if work is not None and place in withdrawn)
        if closes:
            self._db = self._open()

    def _enqueue(self, job: Job, work: Counted | None) -> Ticket[Any]:
        if isinstance(job, Statement):
            return self.db.enqueue(job.sql, job.params, timeout=DEADLINE)
        assert work is not None
        return self.db.enqueue(work, timeout=DEADLINE)

    def _result(self, job: Job, ticket: Ticket[Any]) -> object:
        result = ticket.result(timeout=DEADLINE)
        return seen(result) if isinstance(job, Statement) else result

    def _check_sequence(self, ticket: Ticket[Any], committed: bool) -> None:
        if not committed:
            assert ticket.sequence is None
            return
        assert ticket.sequence is not None
        assert ticket.sequence > self._last_sequence
        self._last_sequence = ticket.sequence

    def _check_runs(self, works: Sequence[Counted], something_undid: bool) -> None:
        for work in works:
            assert work.runs == 1 or (something_undid and work.runs == 2), work

    @rule(name=names, step=st.sampled_from(["flush", "read", "close and open again"]))
    def do_something_else(self, name: str, step: str) -> None:
        if step == "flush":
            self.db.flush(timeout=DEADLINE)
        elif step == "read":
            self._read(name)
        else:
            self._close()
            self._db = self._open()

    def _read(self, name: str) -> None:
        sql = "SELECT id, size FROM item WHERE name >= ? ORDER BY id"
        expected = self.reference.query(sql, (name,))
        assert self.db.read(sql, (name,)) == expected
        assert self.db.read_one(sql, (name,)) == (expected[0] if expected else None)
        assert self.db.read_value(sql, (name,)) == (expected[0][0] if expected else None)

    @rule()
    def open_a_reader(self) -> None:
        if len(self._snapshots) == 2:
            self._snapshots.pop(0).end()
        self._snapshots.append(Snapshot(self.db, self.reference.dump()))

    @invariant()
    def every_reader_sees_its_moment(self) -> None:
        for snapshot in self._snapshots:
            assert snapshot.dump() == snapshot.expected

    def _close(self) -> None:
        while self._snapshots:
            self._snapshots.pop().end()
        assert self.db.close(timeout=DEADLINE).unfinished == 0

    @invariant()
    def both_hold_the_same(self) -> None:
        if self._db is not None:
            assert self.db.read(dump) == self.reference.dump()


@pytest.mark.parametrize(("schema", "inline"), [*((schema, False) for schema in SCHEMAS), ("deferred", True)])
def test_any_sequence_of_jobs_gives_what_running_each_alone_gives(schema: str, inline: bool) -> None:
    machine = type(f"ModelOf_{schema}", (Model,), {"schema": schema, "inline": inline})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=15,
            stateful_step_count=25,
            derandomize=True,
            deadline=None,
            # Shrinking takes longer than a test may. For a small example add Phase.shrink here, and run with
            # `-o faulthandler_timeout=0`.
            phases=[Phase.generate],
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_jobs_that_wait_together_share_a_transaction(path: Path) -> None:
    """What the model says about sharing means something only if there is some."""
    with DbWriter(path) as db:
        db.run("CREATE TABLE t (id INTEGER PRIMARY KEY)")
        before = db.stats().commits
        with parked(db):
            tickets = [db.enqueue("INSERT INTO t VALUES (?)", (n,)) for n in range(50)]
        db.flush(timeout=DEADLINE)
        assert [ticket.result(timeout=DEADLINE).lastrowid for ticket in tickets] == list(range(50))
        assert db.stats().commits - before <= 5


def test_jobs_that_share_a_transaction_with_failing_ones_still_share_it(path: Path) -> None:
    """Functions, too, and what SQLite itself leaves half done."""

    def insert(n: int) -> Callable[[Executes], Executed]:
        return lambda tx: tx.execute("INSERT INTO t VALUES (?)", (n,))

    with DbWriter(path, on_error=lambda ticket: None) as db:
        db.run("CREATE TABLE t (id INTEGER PRIMARY KEY)")
        before = db.stats().commits
        with parked(db):
            for n in range(0, 50, 2):
                db.enqueue("INSERT OR FAIL INTO t VALUES (?), (0)", (n + 1000,))
                db.enqueue(insert(n))
        db.flush(timeout=DEADLINE)
        assert db.read("SELECT id FROM t ORDER BY id") == [*((n,) for n in range(0, 50, 2)), (1000,)]
        assert db.stats().commits - before <= 15
