"""What a signal handler raises may come at any step of a call: nothing hangs, is lost, or is told twice.

CPython looks for signals behind a call of C code and at the beginning of a function. Each such place of this package,
in the calling thread, is interrupted in its turn.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import onewriter
from helpers import DEADLINE, eventually, parked, pool_of, queue_of, state_of
from onewriter import DbWriter, Transaction, WriterClosedError
from onewriter.base.waiting import call_if_free

OURS = str(Path(onewriter.__file__).parent)
INSERT = "INSERT INTO t (n) VALUES (?)"


class SignalError(Exception):
    """What the handler raises."""


class ClosedError(WriterClosedError):
    """The same, as from a call of a gateway that is closed."""


class Interrupter:
    """Raises at the place with the number ``at``, and again ``then`` places further on."""

    def __init__(self, at: int, error: type[Exception] = SignalError, then: int = 0) -> None:
        self.where = ""
        self._left, self._error, self._then = at, error, then

    def __enter__(self) -> Interrupter:
        gc.disable()  # what it frees are steps too, and what is raised in these nobody gets
        sys.setprofile(self._look)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        gc.enable()

    def _look(self, frame: types.FrameType, event: str, _: object) -> None:
        if event in ("call", "c_return") and frame.f_code.co_filename.startswith(OURS):
            self._left -= 1
            if self._left == 0:
                self.where += f"{frame.f_code.co_qualname}, line {frame.f_lineno}; "
                self._left, self._then = self._then, 0
                if not self._left:
                    sys.setprofile(None)
                raise self._error


class Told:
    """What the callbacks said: of which rows, and whether they are committed."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, bool]] = []

    def of(self, tx: Transaction, row: int) -> None:
        tx.on_commit(lambda: self.rows.append((row, True)))
        tx.on_rollback(lambda: self.rows.append((row, False)))


def block(db: DbWriter, row: int, told: Told) -> None:
    with db.transaction() as tx:
        told.of(tx, row)
        tx.execute(INSERT, (row,))


def failing_block(db: DbWriter, row: int, told: Told) -> None:
    with pytest.raises(LookupError), db.transaction() as tx:
        told.of(tx, row)
        tx.execute(INSERT, (row,))
        raise LookupError


def block_that_waits(db: DbWriter, row: int, told: Told) -> None:
    with db.transaction(max_hold=DEADLINE) as tx:  # which the writer thread sees to
        told.of(tx, row)
        tx.execute(INSERT, (row,))


def block_with_a_read(db: DbWriter, row: int, told: Told) -> None:
    with db.transaction() as tx:
        told.of(tx, row)
        assert db.read("SELECT 1") == [(1,)]
        tx.execute(INSERT, (row,))


def lent_transaction(db: DbWriter, row: int, told: Told) -> None:
    with db.transaction() as tx, tx.connection as connection:
        told.of(tx, row)
        connection.execute(INSERT, (row,))


def block_around_another(db: DbWriter, row: int, told: Told) -> None:
    with db.transaction(), db.transaction() as tx:
        told.of(tx, row)
        tx.execute(INSERT, (row,))


def statement(db: DbWriter, row: int, told: Told) -> None:
    db.run(INSERT, (row,))


def function(db: DbWriter, row: int, told: Told) -> None:
    db.run(lambda tx: tx.execute(INSERT, (row,)).rowcount)


def read(db: DbWriter, row: int, told: Told) -> None:
    assert db.read("SELECT 1") == [(1,)]


def reader(db: DbWriter, row: int, told: Told) -> None:
    with db.reader():
        assert db.read("SELECT 1") == [(1,)]


def watched(db: DbWriter, row: int, told: Told) -> None:
    with db.watch("SELECT n FROM t") as live:
        live.next(DEADLINE)


WRITES = {*(block, block_that_waits, block_with_a_read, block_around_another, lent_transaction), *(statement, function)}


@pytest.fixture
def db(path: Path) -> Iterator[DbWriter]:
    with DbWriter(path, synchronous="OFF", readers=1) as db:
        db.run("CREATE TABLE t (n INTEGER PRIMARY KEY)")
        yield db


def leave_to_the_collector(db: DbWriter, max_hold: float | None) -> None:
    entry = db.transaction(max_hold=max_hold)
    tx = entry.__enter__()
    tx.execute(INSERT, (-1,))
    del tx
    kept.append(entry)
    del entry


kept: list[object] = []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # nobody gets what is raised there
@pytest.mark.parametrize("max_hold", [None, DEADLINE])
def test_an_interrupt_of_the_finalizer_of_a_block_leaves_it_to_the_writer(db: DbWriter, max_hold: float | None) -> None:
    for step in range(1, 100):
        leave_to_the_collector(db, max_hold)
        with contextlib.suppress(SignalError), Interrupter(step) as interrupter:
            kept.clear()
        db.run(INSERT, (step,), timeout=DEADLINE)
        assert db.read("SELECT n FROM t ORDER BY n") == [(n,) for n in range(1, step + 1)], interrupter.where
        if not interrupter.where:
            break
    else:
        pytest.fail("there are more steps than that")


def interrupt_each_step(
    db: DbWriter, call: Callable[[DbWriter, int, Told], None], error: type[Exception] = SignalError, then: int = 0
) -> None:
    told = Told()
    call(db, 0, told)
    for row in range(1, 1000):
        interrupter, is_through = Interrupter(row, error, then), False
        eventually(lambda: queue_of(db)._asleep)  # so that each time the same steps come
        try:
            with interrupter:
                call(db, row, told)
            is_through = True
        except (error, KeyboardInterrupt):  # that, where it came while SQLite asked whether it may
            pass
        # What was raised came out, but for that in the finalizer of a lent cursor.
        assert call is lent_transaction or not (is_through and interrupter.where), interrupter.where
        db.flush(DEADLINE)
        found = bool(db.read("SELECT n FROM t WHERE n = ?", (row,), timeout=DEADLINE))
        assert found or not is_through or call not in WRITES, interrupter.where
        assert not found or call is not failing_block, interrupter.where
        assert [committed for of, committed in told.rows if of == row] in ([], [found]), interrupter.where
        assert db.health == "ok", interrupter.where
        assert (state_of(db).job, state_of(db).entering, queue_of(db).guest) == (None, set(), None), interrupter.where
        assert db.stats().readers_in_use == 0, interrupter.where
        if not interrupter.where:
            break
    else:
        pytest.fail("there are more steps than that")
    with parked(db), pytest.raises(onewriter.WriteTimeoutError), db.transaction(timeout=0.01):
        pass  # the turn is the writer's
    assert pool_of(db).waiting == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "call", [*sorted(WRITES, key=lambda call: call.__name__), failing_block, read, reader, watched]
)
def test_an_interrupt_at_any_step_leaves_nothing_behind(
    db: DbWriter, call: Callable[[DbWriter, int, Told], None]
) -> None:
    interrupt_each_step(db, call)


@pytest.mark.parametrize("call", [block, block_that_waits, failing_block])
def test_an_error_as_of_a_closed_gateway_does_so_too(db: DbWriter, call: Callable[[DbWriter, int, Told], None]) -> None:
    interrupt_each_step(db, call, ClosedError)


@pytest.mark.parametrize("then", [1, 2, 4, 8])
def test_a_second_interrupt_while_the_first_is_seen_to_does_so_too(db: DbWriter, then: int) -> None:
    interrupt_each_step(db, block, then=then)


def test_a_lock_that_is_taken_if_it_is_free_is_free_again() -> None:
    called: list[int] = []
    for place in range(1, 100):
        lock = threading.Lock()
        try:
            with Interrupter(place) as interrupter:
                call_if_free(lock, lambda place=place: called.append(place))  # type: ignore[misc]
        except SignalError:
            assert not lock.locked(), interrupter.where
        else:
            break
    assert place > 3
    assert called[-1] == place
    with lock:
        call_if_free(lock, called.clear)
    assert called
