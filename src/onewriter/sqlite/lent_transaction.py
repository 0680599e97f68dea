"""LentTransaction: what BEGIN, COMMIT and ROLLBACK mean on a lent connection, whose transaction is a part of the job.

The library's transaction is a savepoint inside that of the job, and its savepoints are savepoints in that:

    no transaction ──BEGIN, SAVEPOINT, INSERT …──► open ──COMMIT: released, so that the job keeps it──► no transaction
                                                        ──ROLLBACK: undone, and released──────────────► no transaction

The methods of the connection, statements and scripts all come here; nothing else knows of it.
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from onewriter.base.arguments import exact
from onewriter.sqlite.connection import read_control
from onewriter.sqlite.pragma_values import pragma
from onewriter.sqlite.retry import error_code
from onewriter.sqlite.settings import normal_value
from onewriter.sqlite.statement import ASKING, CHANGING, describe_sql

LEGACY = -1  # sqlite3.LEGACY_TRANSACTION_CONTROL, which 3.11 does not have
LEVELS = ("", "DEFERRED", "IMMEDIATE", "EXCLUSIVE")
CONTROL = re.compile("BEGIN|COMMIT|END|ROLLBACK|SAVEPOINT|RELEASE")
ROWLESS = frozenset(("foreign_keys", "synchronous", "query_only"))  # PRAGMAs that return nothing when they are set
IN_A_TRANSACTION = "onewriter: VACUUM cannot run inside a transaction, and a job is one: use run_without_transaction"
# SQLite ignores a PRAGMA that it does not know. It cannot be an empty text: of one, sqlite3 takes the outcome from the
# connection's last step, which may have failed.
NO_STATEMENT = "PRAGMA onewriter"


class Savepoints(Protocol):
    """The savepoints of the job, including the library's. A mark identifies one."""

    def begin(self, *, of_library: bool = False) -> Any: ...
    def end(self, mark: Any) -> None: ...
    def is_open(self, mark: Any) -> bool: ...
    def are_innermost(self, marks: Sequence[Any]) -> bool: ...
    def undo_to(self, mark: Any, dropped: Sequence[Any] = ()) -> None:
        """Undo what was done since. ``dropped`` end; others inside it begin again."""


class NoSavepoints:
    """Those of a reader, which cannot write: there is nothing to undo."""

    def begin(self, *, of_library: bool = False) -> Any:
        return object()

    def end(self, mark: Any) -> None:
        pass

    def is_open(self, mark: Any) -> bool:
        return True

    def are_innermost(self, marks: Sequence[Any]) -> bool:
        return True

    def undo_to(self, mark: Any, dropped: Sequence[Any] = ()) -> None:
        pass


class Asked(Protocol):
    """The authorizer: what it was asked last, and why it refused."""

    refusal: str | None
    pragma: tuple[str, str | None, str | None]
    written: set[str]


class _Savepoint(NamedTuple):
    name: str | None  # None: the transaction itself, by BEGIN
    mark: object
    of_script: bool = False


class LentTransaction:
    """The library's transaction: its savepoints, outermost first; none: it has no transaction.

    Threads: the loan's lock is held around every method; ``is_open`` may be asked without.
    """

    def __init__(self, connection: sqlite3.Connection | None, savepoints: Savepoints, guard: Asked | None) -> None:
        self.isolation_level: str | None = ""
        self.autocommit: Any = LEGACY
        self._connection: Any = connection
        self._savepoints = savepoints
        self._guard: Any = guard
        self._open: list[_Savepoint] = []
        self._floor = 0  # how many of them a running script needs, so that a COMMIT in it leaves them

    @property
    def is_open(self) -> bool:
        """What ``in_transaction`` says."""
        return self._first() is not None

    def _first(self) -> int | None:
        """The place of the savepoint that the transaction is. Those that ended with a part of the job are forgotten."""
        while self._open and not self._savepoints.is_open(self._open[-1].mark):
            self._open.pop()
        for place, savepoint in enumerate(self._open):
            if not savepoint.of_script:
                return place
        return None

    # The connection's methods and attributes --------------------------------------------------------------------------

    def commit(self) -> None:
        if self.autocommit is True:
            return
        if self.is_open:
            self._end()
        self._begin_at_once()

    def rollback(self) -> None:
        if self.autocommit is True:
            return
        if self.is_open:
            self._undo_and_end()
        self._begin_at_once()

    def _begin_at_once(self) -> None:
        if self.autocommit is False and not self.is_open:
            self._push(None)

    def set_isolation_level(self, level: Any) -> None:
        if level is None:
            self.commit()
        elif not isinstance(level, str):
            raise TypeError("isolation_level must be str or None")
        elif "\0" in level:
            raise ValueError("embedded null character")
        elif str.upper(level) not in LEVELS:
            raise ValueError("isolation_level string must be '', 'DEFERRED', 'IMMEDIATE', or 'EXCLUSIVE'")
        self.isolation_level = None if level is None else str.upper(level)

    def set_autocommit(self, value: Any) -> None:
        if value is not True and value is not False and value != LEGACY:
            raise ValueError("autocommit must be True, False, or sqlite3.LEGACY_TRANSACTION_CONTROL")
        if value is True and self.is_open:
            self._end()
        self.autocommit = value
        self._begin_at_once()

    # Statements -------------------------------------------------------------------------------------------------------

    def run(self, method: Callable[..., Any], cursor: sqlite3.Cursor, sql: Any = None, /, *rest: Any) -> None:
        """``cursor.execute(sql, …)`` or ``executemany``, which begins a transaction where sqlite3 does."""
        if not isinstance(sql, str):
            method(cursor, sql, *rest)
            return
        sql = exact(sql)
        text = describe_sql(sql)
        if text.verb in ASKING:
            method(cursor, sql, *rest)
        elif text.verb not in CHANGING:
            self.run_bare(method, cursor, sql, *rest)
        elif not text.behind_with and self._begins_by_itself():
            self._run_in_a_new_one(method, cursor, sql, rest)
        else:
            method(cursor, sql, *rest)

    def run_bare(self, method: Callable[..., Any], cursor: sqlite3.Cursor, sql: str, /, *rest: Any) -> None:
        """The same without a transaction that begins by itself, as in a script."""
        verb = describe_sql(sql).verb
        if CONTROL.fullmatch(verb):
            try:
                verb, name = read_control(sql)
            except sqlite3.Error:
                run_nothing(sqlite3.Cursor.execute, cursor, ())  # what the cursor had is over all the same
                raise
            run_nothing(method, cursor, rest)
            self._control(verb, name)
        elif verb == "PRAGMA":
            self._run_pragma(method, cursor, sql, rest)
        else:
            try:
                method(cursor, sql, *rest)
            except sqlite3.OperationalError as error:
                if verb == "VACUUM":
                    BaseException.add_note(error, IN_A_TRANSACTION)
                raise

    def script(self, statements: Iterable[str], run: Callable[[str], object]) -> None:
        """Run all or none of them. Like sqlite3, commit first; nothing else begins or ends by itself.

        A transaction that begins in the script and does not end there stays open. Where the library is in a
        transaction (``autocommit`` is set), a COMMIT in the script keeps what came before it.
        """
        if self.autocommit == LEGACY:
            self.commit()
        floor, was_open = self._floor, self.is_open
        around = self._push(None, of_script=True)
        self._floor = floor if was_open else len(self._open)
        try:
            for statement in statements:
                run(statement)
        except BaseException:
            if self._connection.in_transaction and around in self._open and self._savepoints.is_open(around.mark):
                self._undo_to(around)
                self._release(around)
            raise
        finally:
            self._floor = floor
        if self._open and self._open[-1] is around:
            self._release(around)

    def _begins_by_itself(self) -> bool:
        return self.autocommit == LEGACY and self.isolation_level is not None and not self.is_open

    def _run_in_a_new_one(self, method: Callable[..., Any], cursor: sqlite3.Cursor, sql: str, rest: Any) -> None:
        begun = self._push(None)
        try:
            method(cursor, sql, *rest)
        except BaseException as error:
            # sqlite3 begins once the statement is prepared. SQLite has rolled back all after some errors.
            is_refused = isinstance(error, sqlite3.ProgrammingError) and not is_usable(cursor)
            if self._connection.in_transaction and (is_refused or not self._is_prepared(sql)):
                self._release(begun)
            raise

    def _is_prepared(self, sql: str) -> bool:
        refusal = self._guard.refusal
        try:
            self._connection(sql)
        except Exception:
            return False
        finally:
            self._guard.refusal = refusal
        return True

    def _run_pragma(self, method: Callable[..., Any], cursor: sqlite3.Cursor, sql: str, rest: Any) -> None:
        """A refused one that sets the present value is ignored: it would change nothing."""
        guard = self._guard
        try:
            method(cursor, sql, *rest)
            return
        except sqlite3.DatabaseError as error:
            name, value, schema = guard.pragma
            # Without a refusal it was what a signal handler raised while SQLite asked.
            if error_code(error) != sqlite3.SQLITE_AUTH or value is None or guard.refusal is None:
                raise
            quoted = name if schema is None else '"{}".{}'.format(schema.replace('"', '""'), name)
            refusal = guard.refusal
            found = pragma(self._connection, quoted)
            if found is None or normal_value(name, found) != normal_value(name, value):
                guard.refusal = refusal
                raise
        guard.refusal = None
        if name in ROWLESS:
            run_nothing(method, cursor, rest)
        else:
            method(cursor, f"PRAGMA {quoted}", *rest)

    def _control(self, verb: str, name: str | None) -> None:
        """What a statement of these says; ``name`` is that of a savepoint."""
        if name is not None:
            if verb == "BEGIN":
                self._push(name)
                return
            savepoint = self._find(name)
            if verb == "RELEASE":
                self._release(savepoint)
            else:
                self._undo_to(savepoint)
        elif verb == "BEGIN":
            if self.is_open:
                raise _error("cannot start a transaction within a transaction")
            self._push(None)
        elif not self.is_open:
            raise _error(f"cannot {verb.lower()} - no transaction is active")
        elif verb == "ROLLBACK":
            self._undo_and_end()
        else:
            self._end()

    # Savepoints -------------------------------------------------------------------------------------------------------

    def _push(self, name: str | None, *, of_script: bool = False) -> _Savepoint:
        self._first()  # forgets what has ended with a part of the job, behind which this one would hide it
        savepoint = _Savepoint(name, self._savepoints.begin(of_library=True), of_script)
        self._open.append(savepoint)
        return savepoint

    def _find(self, name: str) -> _Savepoint:
        """The innermost one of this name."""
        self._first()
        for savepoint in reversed(self._open[self._floor :]):
            if savepoint.name is not None and savepoint.name.lower() == name.lower():
                return savepoint
        raise _error(f"no such savepoint: {name}")

    def _place(self, savepoint: _Savepoint) -> int:
        return next(place for place, other in enumerate(self._open) if other is savepoint)

    def _end(self) -> None:
        """Keep what the transaction has done."""
        self._release(self._open[self._floor])

    def _undo_and_end(self) -> None:
        place = self._first()
        assert place is not None
        self._undo_to(self._open[place])
        with contextlib.suppress(sqlite3.OperationalError):  # an unread cursor that writes: the empty savepoint stays
            self._release(self._open[self._floor])
        del self._open[self._floor :]

    def _undo_to(self, savepoint: _Savepoint) -> None:
        place = self._place(savepoint)
        inner = [other.mark for other in self._open[place + 1 :]]
        self._savepoints.undo_to(savepoint.mark, inner)
        del self._open[place + 1 :]

    def _release(self, savepoint: _Savepoint) -> None:
        """End it, and those inside it.

        If a part of the job that began inside it is still open, it stays: ending it would end that part. It ends with
        what is around it, and is not rolled back to.
        """
        place = self._place(savepoint)
        if self._savepoints.are_innermost([other.mark for other in self._open[place:]]):
            self._savepoints.end(savepoint.mark)
        del self._open[place:]


def _error(text: str) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError(text)
    error.sqlite_errorcode, error.sqlite_errorname = sqlite3.SQLITE_ERROR, "SQLITE_ERROR"
    return error


def run_nothing(method: Callable[..., Any], cursor: sqlite3.Cursor, parameters: Iterable[Any]) -> None:
    """In place of a statement that has no rows: end what the cursor had, and take no parameters."""
    method(cursor, NO_STATEMENT, *parameters)


def is_usable(cursor: sqlite3.Cursor) -> bool:
    """Whether it is open, and not in the midst of a call. To be asked when it has no rows: it would lose one."""
    try:
        sqlite3.Cursor.fetchone(cursor)
    except sqlite3.ProgrammingError:
        return False
    return True
