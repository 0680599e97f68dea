"""Guard: what a job may do on the write connection, asked by SQLite whenever a statement is prepared."""

from __future__ import annotations

import contextlib
import enum
import functools
import secrets
import sqlite3
import threading
from collections.abc import Callable

SCHEMA_CHANGES = frozenset((*range(1, 9), *range(10, 18), 26, 29, 30))  # CREATE, DROP, ALTER
USES = frozenset((sqlite3.SQLITE_READ, sqlite3.SQLITE_SELECT, sqlite3.SQLITE_UPDATE, sqlite3.SQLITE_DELETE))
# Inside a transaction SQLite ignores these or only answers, so a job would believe that they are in force.
NOT_IN_A_TRANSACTION = frozenset(("foreign_keys", "journal_mode", "synchronous", "locking_mode"))
# On these the gateway's own waiting, reading and checkpointing rest.
NEVER = frozenset(("query_only", "busy_timeout", "locking_mode", "wal_autocheckpoint", "journal_size_limit"))
NOT_ON_A_READER = NEVER | {"journal_mode", "hard_heap_limit", "soft_heap_limit"}  # the latter are of the process
# What these tell is of the connection, on which other jobs have run since, or none.
HISTORY = frozenset(("last_insert_rowid", "changes", "total_changes"))
OFF = ("0", "off", "no", "false")
ASKING = ("_info", "_xinfo", "_list", "_check")  # the ends of PRAGMAs whose argument sets nothing


class Mode(enum.Enum):
    GATEWAY = "the gateway's own statements"
    JOB = "a job, inside its transaction"
    ALONE = "a statement that is a job, inside its transaction"
    LENT = "a job's sqlite3.Connection, inside its transaction"
    BARE = "a statement outside any transaction"
    VACUUM = "VACUUM outside any transaction"


IN_TRANSACTION = (Mode.JOB, Mode.ALONE, Mode.LENT)
OF_ITS_OWN = (Mode.ALONE, Mode.BARE)


class _Refusals:
    """What an authorizer has refused, and why: SQLite says only "not authorized", in one of its ways.

    A signal handler runs, and may raise, wherever Python code does, so in an authorizer too; sqlite3 drops that, and
    refuses the statement. What comes before the first line of Python code cannot be caught; that SQLite has asked and
    not been answered is known all the same, since what counts the questions is C code.
    """

    refusal: str | None = None
    history = HISTORY

    def __init__(self) -> None:
        self.authorizer = functools.lru_cache(maxsize=0)(self._ask)  # which keeps nothing, and counts
        self._answers = 0  # so many of the questions
        self._caught: BaseException | None = None

    def _ask(self, action: int, first: str | None, second: str | None, third: str | None, _: str | None) -> int:
        try:
            answer = self.decide(action, first, second, third)
            self._answers += 1
            return answer
        except BaseException as error:
            self._caught = error
            return sqlite3.SQLITE_DENY

    def decide(self, action: int, first: str | None, second: str | None, third: str | None) -> int:
        raise NotImplementedError

    def deny(self, reason: str) -> int:
        self.refusal = reason
        return sqlite3.SQLITE_DENY

    def deny_history(self, name: str) -> int:
        return self.deny(
            f"{name} tells of the connection, which others have used since, or which is another one: use "
            "Result.lastrowid, Result.rowcount or RETURNING, or ask in the function or block that wrote"
        )

    def explain(self, error: BaseException) -> None:
        """Say why, if a refusal is what ``error`` is about; raise what was raised in place of an answer."""
        questions = self.authorizer.cache_info().misses
        reason, self.refusal = self.refusal, None
        caught, self._caught = self._caught, None
        unanswered, self._answers = questions != self._answers, questions
        if caught is not None:
            raise caught from error
        if unanswered and threading.current_thread() is threading.main_thread():  # where signal handlers run
            raise KeyboardInterrupt("a signal handler raised while SQLite prepared a statement") from error
        if reason is not None:
            with contextlib.suppress(BaseException):  # as from a frozen dataclass, which refuses notes
                BaseException.add_note(error, f"onewriter: {reason}")


NO_WRITES = "onewriter: a read cannot write: use run, or a transaction() block"


class ReadGuard(_Refusals):
    """The authorizer of a reader: what mode=ro and query_only let through."""

    def explain(self, error: BaseException) -> None:
        super().explain(error)
        explain_readonly(error)

    def __init__(self) -> None:
        super().__init__()
        self._secret = secrets.token_hex(8)
        self.is_internal = False  # the pool's own statement is prepared
        self.is_lent = False  # to a function or a block, which has one connection for more than one statement
        self.text = ""  # of the read, if it is not
        self.must_ask_again = False  # what was allowed to one that is lent, about texts that are prepared now
        self.is_spoilt = False  # somebody has set what would last beyond the loan

    def internal(self, sql: str) -> str:
        return f"{sql} /* {self._secret} */"

    def install(self, connection: sqlite3.Connection) -> None:
        """Ask from now on, and for every statement prepared earlier too."""
        self.must_ask_again = False
        connection.set_authorizer(self.authorizer)

    def decide(self, action: int, first: str | None, second: str | None, third: str | None) -> int:
        if action in (sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH):  # VACUUM INTO is an ATTACH too
            return self.deny("a reader cannot ATTACH, DETACH or VACUUM")
        if action == sqlite3.SQLITE_PRAGMA:
            name = (first or "").lower()
            if name == "wal_checkpoint" or (second is not None and name in NOT_ON_A_READER):
                return self.deny(f"PRAGMA {name} is the writer's")
            self.is_spoilt |= second is not None and not name.endswith(ASKING)
            # Full-text search asks for it too, with the name of the database.
            if name == "data_version" and (self.is_lent or third is None or name in self.text.lower()):
                return self._history("PRAGMA data_version")
        if action == sqlite3.SQLITE_FUNCTION and second in self.history:
            return self._history(f"{second}()")
        if action == sqlite3.SQLITE_TRANSACTION and not self.is_internal:  # a snapshot stands for its whole length
            return self.deny("a reader's transaction is the gateway's: reader() is one")
        return sqlite3.SQLITE_OK

    def _history(self, name: str) -> int:
        if self.is_internal:
            return sqlite3.SQLITE_OK
        if not self.is_lent:
            return self.deny_history(name)
        self.must_ask_again = True
        return sqlite3.SQLITE_OK


def explain_readonly(error: BaseException) -> None:
    """Say what is to be called instead, if a statement of a read would have written."""
    is_readonly = getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_READONLY
    if is_readonly and NO_WRITES not in getattr(error, "__notes__", ()):
        BaseException.add_note(error, NO_WRITES)


class Guard(_Refusals):
    """The authorizer of the write connection. Set once, since setting it makes SQLite prepare every statement anew.

    Threads: used by the thread that holds the write connection.
    """

    def __init__(self, journal_mode: str, puts_back: Callable[[str, str], bool] = lambda name, value: False) -> None:
        super().__init__()
        self._journal_mode = journal_mode
        self._puts_back = puts_back
        # The texts of the gateway's own statements are unknown to jobs: SQLite does not ask again for a cached text.
        self._secret, self._other = secrets.token_hex(8), secrets.token_hex(8)
        self.mark = f"onewriter_{self._secret}"  # begins the names of the gateway's savepoints
        self.mode = Mode.GATEWAY
        self.schema_changed = True
        self.settings_touched = False
        self.in_vain = ""  # a PRAGMA that is put back at once, since the gateway has set it
        self.temp_touched = False  # something was made in the TEMP schema
        self.is_asking = False  # a SELECT that is a job
        self.hidden_commit = False  # sqlite3, in a transaction, is about to end it before a script

    def internal(self, sql: str) -> str:
        return f"{sql} /* {self._secret} */"

    def asked_anew(self, sql: str) -> str:
        """A text of a job that SQLite has not been asked about elsewhere. In front: what is behind a SELECT's last
        expression becomes the column's name; and not the secret, which nobody is to see."""
        return f"/* {self._other} */ {sql}"

    def install(self, connection: sqlite3.Connection) -> None:
        """Ask from now on, and for every statement prepared earlier too."""
        self.settings_touched = False
        connection.set_authorizer(self.authorizer)

    def decide(self, action: int, first: str | None, second: str | None, third: str | None) -> int:
        if action in USES or self.mode is Mode.GATEWAY:
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_INSERT:
            if third == "temp" and first is not None and first.startswith("sqlite_"):  # a row of the TEMP schema
                self.temp_touched = self.settings_touched = True
        elif action in SCHEMA_CHANGES:
            self.schema_changed = True
        elif action == sqlite3.SQLITE_FUNCTION and self.is_asking and second in self.history:
            return self.deny_history(f"{second}()")
        elif self.hidden_commit and action == sqlite3.SQLITE_TRANSACTION:
            self.hidden_commit = False
            return sqlite3.SQLITE_IGNORE  # prepared, and does nothing
        elif action == sqlite3.SQLITE_SAVEPOINT and self.mode is Mode.LENT:
            self.settings_touched = True  # SQLite would not ask again about the same text outside the loan
            return sqlite3.SQLITE_OK  # libraries nest by it; those of the gateway have names that nobody knows
        elif action in (sqlite3.SQLITE_TRANSACTION, sqlite3.SQLITE_SAVEPOINT):
            if self.mode is not Mode.VACUUM:
                verb = "SAVEPOINT" if action == sqlite3.SQLITE_SAVEPOINT else first
                return self.deny(f"{verb} is the gateway's: it begins, commits and rolls back (tx.savepoint() nests)")
        elif action in (sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH):
            if self.mode is not Mode.VACUUM:
                return self.deny("ATTACH and DETACH belong in on_connect, where every connection gets them")
        elif action == sqlite3.SQLITE_PRAGMA:
            return self._pragma((first or "").lower(), second)
        return sqlite3.SQLITE_OK

    def _pragma(self, name: str, value: str | None) -> int:
        if name == "wal_checkpoint" and self.mode in IN_TRANSACTION:
            return self.deny("a checkpoint cannot run inside a transaction: use checkpoint()")
        if value is None or name.endswith(ASKING):
            return sqlite3.SQLITE_OK
        if self.mode in IN_TRANSACTION and name in NOT_IN_A_TRANSACTION:
            return self.deny(
                f"PRAGMA {name} has no effect inside a transaction, and a job is one: it is an argument of DbWriter; "
                "foreign_keys=False on a job is for rebuilding a table"
            )
        if self.mode is Mode.BARE and name == "defer_foreign_keys":  # and the next jobs would be the transaction
            return self.deny(f"PRAGMA {name} lasts until a transaction ends, and here is none: use it inside a job")
        if name == "count_changes" and value.lower() not in OFF:
            return self.deny("PRAGMA count_changes would leave a row of each write unread: use Result.rowcount")
        if name in NEVER or (name == "journal_mode" and value.upper() != self._journal_mode):
            return self.deny(f"PRAGMA {name} is the gateway's: use the argument of DbWriter")
        if self.mode is Mode.BARE and self._puts_back(name, value):
            self.in_vain = name
        self.settings_touched = True
        return sqlite3.SQLITE_OK
