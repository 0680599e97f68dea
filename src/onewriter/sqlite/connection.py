"""Opening connections: each setting with its reason. The only ``sqlite3.connect``."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from onewriter.errors import forked_error
from onewriter.sqlite.company import cannot_open
from onewriter.sqlite.file import INDEX
from onewriter.sqlite.guard import HISTORY, Guard, ReadGuard
from onewriter.sqlite.inherited import keep_open
from onewriter.sqlite.locks import describe_lock
from onewriter.sqlite.options import Settings
from onewriter.sqlite.pragmas import database_names, pragma, rows_of, set_pragma
from onewriter.sqlite.retry import LockPolicy, error_code, is_busy, note_descriptors

T = TypeVar("T")
BEFORE_WAL = ("page_size", "auto_vacuum", "encoding")  # cannot be changed after it
NO_WAL = 'as on network file systems: journal_mode="DELETE" is the way out'
NO_INDEX = {  # where the index of the log cannot be had, or its locks
    getattr(sqlite3, f"SQLITE_{name}")
    for name in ("IOERR_SHMOPEN", "IOERR_SHMSIZE", "IOERR_SHMLOCK", "IOERR_SHMMAP", "PROTOCOL")
}


def open_writer(
    settings: Settings,
    guard: Guard,
    policy: LockPolicy,
    tell: Callable[[bool, str], object],
    make: Callable[[sqlite3.Connection, Guard], T],
) -> T:
    """Open and configure the write connection, and ``make`` something of it, which may read.

    Waits for locks that openers and closers hold for a moment.
    """
    return _open(settings, policy, tell, lambda: _writer(settings, guard, make))


def open_reader(settings: Settings, guard: ReadGuard, policy: LockPolicy) -> sqlite3.Connection:
    """Open and configure a connection that cannot write."""

    def attempt() -> sqlite3.Connection:
        connection = _connect(settings, "ro")
        with _closing_on_error(connection):
            _apply_pragmas(connection, settings)
            _call_hook(connection, settings, guard, readonly=True)
            pragma(connection, "locking_mode", "NORMAL")
            _end_by_hand(connection)
            # mode=ro alone lets TEMP tables, ATTACHed files and VACUUM INTO be written.
            connection.execute("PRAGMA query_only=1").close()
            guard.install(connection)
            return connection

    return _open(settings, policy, lambda has_it, text: None, attempt)


def configure(connection: sqlite3.Connection, settings: Settings, databases: Iterable[str]) -> None:
    """Put the gateway's settings in force, and read each back. Of ``databases`` each has its own ``synchronous``."""
    for name in databases:
        _set_synchronous(connection, settings, f'"{name}".')
    set_pragma(connection, "foreign_keys", int(settings.foreign_keys))
    if sys.platform == "darwin":
        set_pragma(connection, "fullfsync", 1)  # fsync alone does not reach the disk there
        set_pragma(connection, "checkpoint_fullfsync", 1)
    set_pragma(connection, "journal_size_limit", settings.wal_limit)
    pragma(connection, "count_changes", 0)  # or else each write would leave a row unread; not every SQLite knows it
    set_pragma(connection, "wal_autocheckpoint", 0)  # SQLite's own would run inside a COMMIT, and its caller would wait
    _apply_pragmas(connection, settings)


def _set_synchronous(connection: sqlite3.Connection, settings: Settings, database: str) -> None:
    """Where it is what it should be too: SQLite built with SQLITE_DEFAULT_WAL_SYNCHRONOUS lowers what was not set
    while the log was in use (https://www.sqlite.org/compile.html#default_wal_synchronous), and does not say so.
    """
    pragma(connection, f"{database}schema_version")  # from here on the log is in use
    is_wal = pragma(connection, f"{database}journal_mode") == "wal"
    set_pragma(connection, f"{database}synchronous", settings.durable_synchronous(is_wal), always=True)


def _open(settings: Settings, policy: LockPolicy, tell: Callable[[bool, str], object], attempt: Callable[[], T]) -> T:
    try:
        return policy.call(attempt, tell)
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", None) is None or getattr(error, "from_hook", False):
            raise
        named = type(error)(f"cannot open {settings.path}: {error}")
        named.sqlite_errorcode, named.sqlite_errorname = error.sqlite_errorcode, error.sqlite_errorname
        if is_busy(error):
            named.add_note(f"onewriter: waited {policy.waited:.2f} s; {describe_lock(settings.path)}")
        note_descriptors(named)
        raise named from error


def _writer(settings: Settings, guard: Guard, make: Callable[[sqlite3.Connection, Guard], T]) -> T:
    connection = _connect(settings, "rwc")
    with _closing_on_error(connection):
        # Reads the header: a file that is no database is refused here, before anything is written.
        pragma(connection, "schema_version")
        for name, value in settings.pragmas.items():
            if name.lower() in BEFORE_WAL:
                pragma(connection, name, value)
        _set_journal_mode(connection, settings)
        configure(connection, settings, ["main"])
        _call_hook(connection, settings, guard, readonly=False)
        pragma(connection, "locking_mode", "NORMAL")
        configure(connection, settings, database_names(connection))
        _end_by_hand(connection)
        guard.install(connection)
        return make(connection, guard)


def _set_journal_mode(connection: sqlite3.Connection, settings: Settings) -> None:
    before = mode = pragma(connection, "journal_mode")
    if mode.upper() != settings.journal_mode:
        mode = pragma(connection, "journal_mode", settings.journal_mode)
    if mode.upper() != settings.journal_mode:
        raise cannot_open(
            settings.path, f"journal_mode={settings.journal_mode} was refused ({mode} is in force), {NO_WAL}"
        )
    try:
        pragma(connection, "schema_version")  # SQLite makes the index of the log when it is used
    except sqlite3.Error as error:
        if settings.journal_mode != "WAL" or error_code(error) not in NO_INDEX:
            raise
        sqlite3.Connection.close(connection)
        if before != "wal":  # or else nobody could open the file here any more
            with contextlib.suppress(sqlite3.Error):
                _leave_wal(settings, before)
        text = f"{error}: the index of its log ({settings.path}{INDEX}) cannot be had, {NO_WAL}"
        raise cannot_open(settings.path, text, error.sqlite_errorcode, error.sqlite_errorname) from error


def _leave_wal(settings: Settings, mode: str) -> None:
    """Switch the file back; in this locking mode SQLite keeps the index in memory."""
    connection = _connect(settings, "rw")
    with contextlib.closing(connection):
        pragma(connection, "locking_mode", "EXCLUSIVE")
        pragma(connection, "journal_mode", mode)


def open_new(path: str) -> sqlite3.Connection:
    """A plain connection to a file that is to be made, for a copy."""
    return sqlite3.connect(path, isolation_level=None)


def seal(connection: sqlite3.Connection) -> None:
    """Give it a base that was opened and is closed: every method of ``sqlite3`` that is called on it then raises."""
    sqlite3.Connection.__init__(connection, ":memory:", isolation_level=None, check_same_thread=False)
    sqlite3.Connection.close(connection)


class _Scratch(sqlite3.Connection):
    def __del__(self) -> None:  # a thread has ended, and it was the thread's
        sqlite3.Connection.close(self)


def open_scratch() -> sqlite3.Connection:
    """A connection without tables that answers SELECTs of constants, and nothing else."""
    connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False, factory=_Scratch)
    connection.set_authorizer(
        lambda action, *_: sqlite3.SQLITE_OK if action == sqlite3.SQLITE_SELECT else sqlite3.SQLITE_DENY
    )
    return connection


def open_to_look(path: str, patience: float, *, immutable: bool) -> sqlite3.Connection:
    """A plain connection that cannot write; ``immutable``: and takes no locks, for a file that nobody has open."""
    flags = "mode=ro&immutable=1" if immutable else "mode=ro"
    return sqlite3.connect(f"{Path(path).as_uri()}?{flags}", uri=True, timeout=patience)


def refuse_to_bind(value: object, place: int) -> None:
    """Raise what sqlite3 raises as it binds ``value`` for the parameter at ``place``, if it does."""
    connection = sqlite3.connect(":memory:")
    try:
        marks = ", ".join("?" * place)
        connection.execute(f"SELECT 1 IN ({marks})", (*(None,) * (place - 1), value)).close()
    finally:
        connection.close()


def _connect(settings: Settings, mode: str) -> sqlite3.Connection:
    # as_uri escapes what a URI would take for its own: # ? %. The busy timeout is 0, because neither interrupt()
    # nor close can end a wait inside SQLite; the policy does the waiting.
    connection = sqlite3.connect(
        f"{Path(settings.path).as_uri()}?mode={mode}",
        uri=True,
        timeout=0,
        isolation_level=None,
        check_same_thread=False,
        detect_types=settings.detect_types,
    )
    connection.row_factory = settings.row_factory
    with _closing_on_error(connection):
        pragma(connection, "locking_mode", "NORMAL")  # SQLITE_DEFAULT_LOCKING_MODE may be another
    return connection


def _end_by_hand(connection: sqlite3.Connection) -> None:
    """No transaction begins or ends by itself, whatever the hook has set."""
    if sys.version_info >= (3, 12):
        connection.autocommit = sqlite3.LEGACY_TRANSACTION_CONTROL
    connection.isolation_level = None


def _apply_pragmas(connection: sqlite3.Connection, settings: Settings) -> None:
    errors = []
    for name, value in settings.pragmas.items():
        try:
            set_pragma(connection, name, value)
        except ValueError as error:  # the others all the same
            errors.append(error)
    if errors:
        raise errors[0]


def _call_hook(connection: sqlite3.Connection, settings: Settings, guard: Guard | ReadGuard, *, readonly: bool) -> None:
    if settings.on_connect is None:
        return
    process = os.getpid()
    try:
        settings.on_connect(connection, readonly)
        if os.getpid() != process:
            raise forked_error()
        if connection.in_transaction:
            connection.commit()
        guard.history = HISTORY - _functions(connection)
    except BaseException as error:
        with contextlib.suppress(BaseException):  # as from a frozen dataclass, which refuses notes
            BaseException.add_note(error, f"onewriter: raised by on_connect for {settings.path} (readonly={readonly})")
        if issubclass(type(error), sqlite3.Error):
            error.from_hook = True  # type: ignore[attr-defined]
        raise


def _functions(connection: sqlite3.Connection) -> set[str]:
    """The names of the functions that are not SQLite's own."""
    return {name for name, is_builtin, *_ in rows_of(connection, "PRAGMA function_list") if not is_builtin}


@contextlib.contextmanager
def _closing_on_error(connection: sqlite3.Connection) -> Iterator[None]:
    process = os.getpid()
    try:
        yield
    except BaseException:
        if os.getpid() != process:  # the hook has forked, and this is the child
            keep_open(connection)
        else:
            sqlite3.Connection.close(connection)
        raise
