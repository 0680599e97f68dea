"""Guard: the authorizer, which SQLite calls for each statement that it prepares. It decides what a job may do."""

from __future__ import annotations

import contextlib
import enum
import functools
import secrets
import sqlite3
import threading
from collections.abc import Callable

from onewriter.base.stack import need_stack

SCHEMA_CHANGES = frozenset((*range(1, 9), *range(10, 18), 26, 29, 30))  # CREATE, DROP, ALTER
USES = frozenset((sqlite3.SQLITE_READ, sqlite3.SQLITE_SELECT, sqlite3.SQLITE_UPDATE, sqlite3.SQLITE_DELETE))
WRITES = frozenset((sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE, sqlite3.SQLITE_DELETE))
# What tells which database is written; DDL writes tables of the schema.
CHANGES = WRITES | {sqlite3.SQLITE_ANALYZE, sqlite3.SQLITE_REINDEX}
# What is read or written: a column of a table; without one, the table's rows as such, as count(*) reads them and INSERT
# writes them. A changed row may be in another place, so reading a table reads the columns that order it, too.
Place = tuple[str, str]
ANYTHING = ("", "")  # among places: it is not known which
# Inside a transaction these have no effect, and SQLite does not say so.
NOT_IN_A_TRANSACTION = frozenset(("foreign_keys", "journal_mode", "synchronous", "locking_mode"))
# The gateway depends on the values that it has set for these.
NEVER = frozenset(("query_only", "busy_timeout", "locking_mode", "wal_autocheckpoint", "journal_size_limit"))
OF_THE_PROCESS = frozenset(("hard_heap_limit", "soft_heap_limit", "temp_store_directory", "data_store_directory"))
NOT_ON_A_READER = NEVER | OF_THE_PROCESS | {"journal_mode"}
# Functions about the connection's past, which other jobs have been part of.
HISTORY = frozenset(("last_insert_rowid", "changes", "total_changes"))
OFF = ("0", "off", "no", "false")
# PRAGMAs that end so only query, even with an argument. Not cell_size_check, which is a setting.
ASKING = ("_info", "_xinfo", "_list", "integrity_check", "quick_check", "foreign_key_check")


class Mode(enum.Enum):
    GATEWAY = "internal statements of the gateway"
    JOB = "a job, inside its transaction"
    ALONE = "a statement that is a job, inside its transaction"
    LENT = "a job's sqlite3.Connection, inside its transaction"
    BARE = "a statement outside any transaction"
    VACUUM = "VACUUM outside any transaction"


ROOM = 20  # calls in calls, more than an authorizer makes
IN_TRANSACTION = (Mode.JOB, Mode.ALONE, Mode.LENT)
OF_ITS_OWN = (Mode.ALONE, Mode.BARE)


class _Refusals:
    """Why an authorizer has refused a statement: SQLite says only "not authorized".

    A signal handler may raise wherever Python code runs, also in an authorizer: sqlite3 discards the exception and
    refuses the statement. One that is raised where the function is entered, before its ``try``, cannot be caught. So C
    code (lru_cache) counts the calls, and our code the answers: a difference shows that a call was interrupted.
    """

    refusal: str | None = None
    history = HISTORY
    # The last PRAGMA that was asked for: name, value, schema.
    pragma: tuple[str, str | None, str | None] = ("", None, None)
    places: set[Place] | None = None  # that statements read, or, on the write connection, write; None: not recorded
    text = ""  # the SQL of a statement that is a read or a job of its own
    written: set[str]  # the databases that a cached statement may write, by their names
    within: str | None = None  # the view or trigger that has what is asked about in its text

    def __init__(self) -> None:
        self.authorizer = functools.lru_cache(maxsize=0)(self._ask)  # caches nothing, counts the calls
        self._answers = 0  # calls that have returned
        self.written = set()
        self.is_deciding = False  # SQLite is in the midst of a call: a signal handler must not use the connection
        self._caught: tuple[BaseException, int] | None = None  # what has ended a call, and in which thread

    def _ask(self, action: int, first: str | None, second: str | None, third: str | None, within: str | None) -> int:
        try:
            self.is_deciding = True
            self.within = within
            answer = self.decide(action, first, second, third)
        except BaseException as error:
            self._caught = error, threading.get_ident()
            answer = sqlite3.SQLITE_DENY
        self.is_deciding = False
        self._answers += 1  # from the end of the ``try`` on no call: no signal handler comes in between
        return answer

    def _note(self, place: Place) -> None:
        places = self.places  # looked up once: another thread may set it to None
        if places is not None:
            places.add(place)

    def note_anything(self) -> None:
        """Which tables are written, or what is changed for later statements, is not known."""
        self._note(ANYTHING)

    def decide(self, action: int, first: str | None, second: str | None, third: str | None) -> int:
        raise NotImplementedError

    def deny(self, reason: str) -> int:
        self.refusal = reason
        return sqlite3.SQLITE_DENY

    def asks(self, function: str | None) -> bool:
        """Whether the statement asks about the connection's past. From 3.54 on SQLite also names a function in the
        DEFAULT of a column that is read, although it does not call it then."""
        return function in self.history and (self.within is not None or function in self.text.lower())

    def deny_history(self, name: str) -> int:
        return self.deny(
            f"{name} belongs to the connection, which other jobs use too, and the next call may use another one: use "
            "Result.lastrowid, Result.rowcount or RETURNING, or call it in the function or block that wrote"
        )

    def explain(self, error: BaseException) -> None:
        """Add the reason of a refusal to ``error``; raise the exception that ended an authorizer call instead."""
        questions = self.authorizer.cache_info().misses
        reason, self.refusal = self.refusal, None
        caught, self._caught = self._caught, None
        unanswered, self._answers = questions != self._answers, questions
        if caught is not None and caught[1] == threading.get_ident():  # or it is of a call whose error nobody explained
            raise caught[0] from error
        if unanswered and threading.current_thread() is threading.main_thread():  # the thread of signal handlers
            need_stack(ROOM)  # or it was a RecursionError, which comes here too
            raise KeyboardInterrupt("a signal handler raised while SQLite prepared a statement") from error
        if reason is not None:
            with contextlib.suppress(BaseException):  # a frozen dataclass, for example, refuses notes
                BaseException.add_note(error, f"onewriter: {reason}")


NO_WRITES = "onewriter: a read cannot write: use run, or a transaction() block"


class ReadGuard(_Refusals):
    """The authorizer of a reader: refuses what mode=ro and query_only still allow."""

    def explain(self, error: BaseException) -> None:
        super().explain(error)
        explain_readonly(error)

    def __init__(self) -> None:
        super().__init__()
        self._secret = secrets.token_hex(8)
        self.is_internal = False  # while an internal statement is prepared
        self.is_lent = False  # to a function or block, which may ask about its own earlier statements
        self.must_ask_again = False  # cached statements were allowed to a lent one only: authorize them again
        self.is_spoilt = False  # a PRAGMA was set that would outlast the loan
        self.leaves_traces = False  # what was done has to be undone before the connection is lent again

    def internal(self, sql: str) -> str:
        return f"{sql} /* {self._secret} */"

    def install(self, connection: sqlite3.Connection) -> None:
        """Authorize from now on, also what is in the statement cache: setting it expires all prepared statements."""
        self.must_ask_again = False
        connection.set_authorizer(self.authorizer)

    def decide(self, action: int, first: str | None, second: str | None, third: str | None) -> int:
        if action == sqlite3.SQLITE_READ:
            self._note((first or "", second or ""))
            return sqlite3.SQLITE_OK
        if action in (sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH):  # VACUUM INTO is an ATTACH too
            return self.deny("a reader cannot ATTACH, DETACH or VACUUM")
        if action == sqlite3.SQLITE_PRAGMA:
            name = (first or "").lower()
            self.pragma = name, second, third
            if name == "wal_checkpoint" or (second is not None and name in NOT_ON_A_READER):
                return self.deny(f"PRAGMA {name} is refused on a reader")
            if second is not None and not name.endswith(ASKING):
                self.is_spoilt = self.leaves_traces = True
            # Full-text search reads it internally, with the name of the database.
            if name == "data_version" and (self.is_lent or third is None or name in self.text.lower()):
                return self._history("PRAGMA data_version")
        if action == sqlite3.SQLITE_FUNCTION and (second in self.history if self.is_lent else self.asks(second)):
            return self._history(f"{second}()")
        if action == sqlite3.SQLITE_TRANSACTION and not self.is_internal:  # a snapshot is pinned as long as it lasts
            return self.deny("the gateway begins and ends a reader's transaction: a reader() block is one")
        if action == sqlite3.SQLITE_SAVEPOINT:  # it begins a transaction too, and so again, out of the statement cache
            self.must_ask_again = self.leaves_traces = True
        return sqlite3.SQLITE_OK

    def _history(self, name: str) -> int:
        if self.is_internal:
            return sqlite3.SQLITE_OK
        if not self.is_lent:
            return self.deny_history(name)
        self.must_ask_again = True
        return sqlite3.SQLITE_OK


def explain_readonly(error: BaseException) -> None:
    """Add what to call instead, if ``error`` is a read that would have written."""
    is_readonly = getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_READONLY
    if is_readonly and NO_WRITES not in getattr(error, "__notes__", ()):
        BaseException.add_note(error, NO_WRITES)


class Guard(_Refusals):
    """The authorizer of the write connection. Installed once: setting it expires every prepared statement.

    Threads: used by the thread that holds the write connection.
    """

    def __init__(self, journal_mode: str, puts_back: Callable[[str, str], bool] = lambda name, value: False) -> None:
        super().__init__()
        self._journal_mode = journal_mode
        self._puts_back = puts_back
        # Jobs cannot know the texts of internal statements: SQLite does not call the authorizer for a cached statement.
        self._secret, self._other = secrets.token_hex(8), secrets.token_hex(8)
        self.mark = f"onewriter_{self._secret}"  # the prefix of the names of internal savepoints
        self.mode = Mode.GATEWAY
        self.schema_changed = True
        self.settings_touched = False
        self.in_vain = ""  # a PRAGMA that will be reset to the gateway's value at once
        self.temp_touched = False  # something was created in the TEMP schema
        self.is_asking = False  # while a SELECT that is a job of its own is prepared
        self.hidden_commit = False  # executescript() is about to COMMIT the open transaction first

    def internal(self, sql: str) -> str:
        return f"{sql} /* {self._secret} */"

    def asked_anew(self, sql: str) -> str:
        """The text of a job, changed so that it is in no statement cache. The comment goes in front, since one behind a
        SELECT's last expression becomes part of the column's name; it is not the secret, since jobs can see it."""
        self.text = sql
        return f"/* {self._other} */ {sql}"

    def install(self, connection: sqlite3.Connection) -> None:
        """Authorize from now on, also what is in the statement cache: setting it expires all prepared statements."""
        self.settings_touched = False
        self.forget_written(connection)

    def forget_written(self, connection: sqlite3.Connection) -> None:
        """Have the next transaction's statements tell which databases they write, cached ones too."""
        connection.set_authorizer(self.authorizer)
        self.written = set()  # behind it: interrupted in between, it names too many

    def decide(self, action: int, first: str | None, second: str | None, third: str | None) -> int:
        if action in CHANGES and self.mode is not Mode.GATEWAY:
            self.written.add(third or "main")
        if action in WRITES:
            # ROWID, whatever the column is called that is one with it.
            is_whole = action != sqlite3.SQLITE_UPDATE or second in (None, "ROWID")
            self._note((first or "", "" if is_whole else second or ""))
        if action in USES or self.mode is Mode.GATEWAY:
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_INSERT:
            if third == "temp" and first is not None and first.startswith("sqlite_"):  # a row of sqlite_temp_schema
                self.temp_touched = self.settings_touched = True
        elif action in SCHEMA_CHANGES:
            self.schema_changed = True
            self.note_anything()
        elif action == sqlite3.SQLITE_FUNCTION and self.is_asking and self.asks(second):
            return self.deny_history(f"{second}()")
        elif self.hidden_commit and action == sqlite3.SQLITE_TRANSACTION:
            self.hidden_commit = False
            return sqlite3.SQLITE_IGNORE  # it is prepared as a no-op
        elif action in (sqlite3.SQLITE_TRANSACTION, sqlite3.SQLITE_SAVEPOINT):
            if self.mode is not Mode.VACUUM:
                verb = "SAVEPOINT" if action == sqlite3.SQLITE_SAVEPOINT else first
                return self.deny(
                    f"{verb} is refused: the gateway begins, commits and rolls back (to nest, use tx.savepoint())"
                )
        elif action in (sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH):
            if self.mode is not Mode.VACUUM:
                return self.deny("ATTACH and DETACH belong in on_connect, where every connection gets them")
        elif action == sqlite3.SQLITE_PRAGMA:
            self.pragma = (first or "").lower(), second, third
            return self._pragma(self.pragma[0], second, third)
        return sqlite3.SQLITE_OK

    def _pragma(self, name: str, value: str | None, database: str | None) -> int:
        if name == "wal_checkpoint" and self.mode in IN_TRANSACTION:
            return self.deny("a checkpoint cannot run inside a transaction: use checkpoint()")
        if name == "incremental_vacuum" or not (value is None or name.endswith(ASKING)):
            self.written.add(database or "main")  # perhaps, as by user_version
        if value is None or name.endswith(ASKING):
            return sqlite3.SQLITE_OK
        if self.mode in IN_TRANSACTION and name in NOT_IN_A_TRANSACTION:
            return self.deny(
                f"PRAGMA {name} has no effect inside a transaction, and a job is one: it is an argument of DbWriter; "
                "foreign_keys=False on a job is for rebuilding a table"
            )
        if self.mode is Mode.BARE and name == "defer_foreign_keys":  # it would apply to the next job
            return self.deny(
                f"PRAGMA {name} lasts until the transaction ends, and there is none here: use it inside a job"
            )
        if name == "count_changes" and value.lower() not in OFF:
            return self.deny("PRAGMA count_changes would leave a row of each write unread: use Result.rowcount")
        if name in NEVER or (name == "journal_mode" and value.upper() != self._journal_mode):
            return self.deny(f"PRAGMA {name} is refused: use the argument of DbWriter")
        if name in OF_THE_PROCESS:
            return self.deny(f"PRAGMA {name} is a setting of the whole process: set it before the gateway is opened")
        if self.mode is Mode.BARE and self._puts_back(name, value):
            self.in_vain = name
        self.settings_touched = True
        return sqlite3.SQLITE_OK
