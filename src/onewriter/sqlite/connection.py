"""Opens connections; each setting with its reason. The only ``sqlite3.connect``."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from onewriter.errors import forked_error
from onewriter.sqlite.file import INDEX
from onewriter.sqlite.guard import HISTORY, Guard, ReadGuard
from onewriter.sqlite.inherited import keep_open
from onewriter.sqlite.lock_holders import describe_lock
from onewriter.sqlite.path_checks import cannot_open
from onewriter.sqlite.pragma_values import database_files, database_names, pragma, read_only_files, rows_of, set_pragma
from onewriter.sqlite.retry import AskWriter, LockPolicy, error_code, is_busy, note_descriptors, with_help
from onewriter.sqlite.settings import Settings

T = TypeVar("T")
BEFORE_WAL = ("page_size", "auto_vacuum", "encoding")  # cannot be changed in WAL mode
LONGEST_TIMEOUT = 2**31 - 1  # milliseconds, of SQLite's own
NO_WAL = 'as on network file systems: use journal_mode="DELETE" there'
INDEX_SIZE = 32768  # bytes, at least; https://www.sqlite.org/walformat.html
NO_INDEX = {  # the -shm file, or its locks, cannot be used here
    getattr(sqlite3, f"SQLITE_{name}")
    for name in ("IOERR_SHMOPEN", "IOERR_SHMSIZE", "IOERR_SHMLOCK", "IOERR_SHMMAP", "PROTOCOL")
}


def open_writer(
    settings: Settings,
    guard: Guard,
    policy: LockPolicy,
    log: Callable[[bool, str], object],
    make: Callable[[sqlite3.Connection, Guard], T],
    *,
    again: bool,
) -> T:
    """Open and configure the write connection; returns ``make(connection, guard)``, which may read.

    Retries while other connections that open or close hold a lock. ``again``: it was open before.
    """
    return _open(settings, policy, log, lambda: _writer(settings, guard, make, again))


def open_reader(settings: Settings, guard: ReadGuard, policy: LockPolicy, ask_writer: AskWriter) -> sqlite3.Connection:
    """Open and configure a read-only connection. ``ask_writer``: to roll back what a killed process has left."""
    attempt = with_help(lambda: _reader(settings, guard), ask_writer)
    return _open(settings, policy, lambda acquired, text: None, attempt)


def _reader(settings: Settings, guard: ReadGuard) -> sqlite3.Connection:
    connection = _connect(settings, "ro")
    with _closing_on_error(connection):
        _apply_pragmas(connection, settings)
        _call_hook(connection, settings, guard, readonly=True)
        pragma(connection, "locking_mode", "NORMAL")
        _disable_implicit_transactions(connection)
        # mode=ro alone lets TEMP tables, ATTACHed files and VACUUM INTO be written.
        connection.execute("PRAGMA query_only=1").close()
        guard.install(connection)
        return connection


def open_whole(
    settings: Settings, guard: Guard, policy: LockPolicy, log: Callable[[bool, str], object]
) -> tuple[sqlite3.Connection, str]:
    """Open a connection like the writer's, but nothing is refused on it, not even transactions; returns it with the
    journal mode of the file.

    It waits for locks inside SQLite, up to ``lock_timeout`` seconds, since the gateway cannot repeat its statements.
    """

    def attempt() -> tuple[sqlite3.Connection, str]:
        connection = _connect(settings, "rw", any_thread=False)
        with _closing_on_error(connection):
            configure(connection, settings, ["main"])
            _call_writers_hook(connection, settings, guard)
            configure(connection, settings, database_names(connection))
            _disable_implicit_transactions(connection)
            pragma(connection, "busy_timeout", int(min(1000 * settings.lock_timeout, LONGEST_TIMEOUT)))
            return connection, pragma(connection, "journal_mode")

    return _open(settings, policy, log, attempt)


def is_closed(connection: sqlite3.Connection) -> bool:
    try:
        connection.cursor().close()
    except sqlite3.ProgrammingError:
        return True
    return False


def close_whole(connection: sqlite3.Connection, before: str, wanted: str) -> bool:
    """Close it; returns whether a transaction was open, which is rolled back.

    The file gets back the journal mode that it had ``before``, unless it has the gateway's by now, ``wanted``. Raises
    SQLite's error if that cannot be.
    """
    try:
        # A statement that was not read to its end would outlive the connection, and with it its lock.
        for referrer in gc.get_referrers(connection):
            if issubclass(type(referrer), sqlite3.Cursor):
                sqlite3.Cursor.close(referrer)
        was_open = connection.in_transaction
        connection.set_authorizer(None)
        connection.set_progress_handler(None, 0)
        if was_open:
            sqlite3.Connection.execute(connection, "ROLLBACK").close()  # which, unlike rollback(), heeds no mode
        if pragma(connection, "journal_mode") not in (before, wanted.lower()):
            pragma(connection, "journal_mode", before)
        return was_open
    finally:
        sqlite3.Connection.close(connection)


def configure(connection: sqlite3.Connection, settings: Settings, databases: Iterable[str]) -> None:
    """Apply the gateway's settings, and read each one back. Each of ``databases`` has its own ``synchronous``."""
    for name in databases:
        _set_synchronous(connection, settings, f'"{name}".')
    set_pragma(connection, "foreign_keys", int(settings.foreign_keys))
    if sys.platform == "darwin":
        set_pragma(connection, "fullfsync", 1)  # fsync alone does not reach the disk there
        set_pragma(connection, "checkpoint_fullfsync", 1)
    set_pragma(connection, "journal_size_limit", settings.wal_limit)
    pragma(
        connection, "count_changes", 0
    )  # a write would return a row that is never fetched; not in every build of SQLite
    set_pragma(connection, "wal_autocheckpoint", 0)  # it would run inside a COMMIT, and keep the caller waiting
    _apply_pragmas(connection, settings)


def _set_synchronous(connection: sqlite3.Connection, settings: Settings, database: str) -> None:
    """Set it even if it has the right value: a SQLite built with SQLITE_DEFAULT_WAL_SYNCHRONOUS silently lowers what
    was not set after WAL mode began (https://www.sqlite.org/compile.html#default_wal_synchronous).
    """
    pragma(connection, f"{database}schema_version")  # the first access begins WAL mode
    is_wal = pragma(connection, f"{database}journal_mode") == "wal"
    set_pragma(connection, f"{database}synchronous", settings.durable_synchronous(is_wal), always=True)


def _open(settings: Settings, policy: LockPolicy, log: Callable[[bool, str], object], attempt: Callable[[], T]) -> T:
    try:
        return policy.call(attempt, log)
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", None) is None or getattr(error, "from_hook", False):
            raise
        beginning = f"cannot open {settings.path}: "
        named = type(error)(beginning + str(error).removeprefix(beginning))
        named.sqlite_errorcode, named.sqlite_errorname = error.sqlite_errorcode, error.sqlite_errorname
        if is_busy(error):
            named.add_note(f"onewriter: waited {policy.waited:.2f} s; {describe_lock(settings.path)}")
        note_descriptors(named)
        raise named from error


def _writer(settings: Settings, guard: Guard, make: Callable[[sqlite3.Connection, Guard], T], again: bool) -> T:
    connection = _connect(settings, "rwc")
    with _closing_on_error(connection):
        # Reads the header: a file that is not a database is refused here, before anything is written.
        pragma(connection, "schema_version")
        for name, value in settings.pragmas.items():
            if name.lower() in BEFORE_WAL:
                pragma(connection, name, value)
        _set_journal_mode(connection, settings, again)
        configure(connection, settings, ["main"])
        _call_writers_hook(connection, settings, guard)
        configure(connection, settings, database_names(connection))
        _see_that_all_can_be_written(connection, settings)
        _disable_implicit_transactions(connection)
        guard.install(connection)
        try:
            return make(connection, guard)
        except sqlite3.Error as error:
            guard.explain(error)  # which raises what a signal handler did, while SQLite asked
            raise


def _see_that_all_can_be_written(connection: sqlite3.Connection, settings: Settings) -> None:
    """A file that may not be written in the moment of opening SQLite opens read-only, and says nothing. An empty one,
    as ATTACH creates it, gets its first page now: or else the first transaction writes it, whatever that is about.
    """
    files, read_only = database_files(connection), read_only_files(connection)
    if files["main"] in read_only:
        raise cannot_open(settings.path, "SQLite could open it for reading only")
    for name, file in files.items():
        if name != "main" and file and file not in read_only and pragma(connection, f'"{name}".page_count') == 0:
            pragma(connection, f'"{name}".user_version', 0)


def _set_journal_mode(connection: sqlite3.Connection, settings: Settings, again: bool) -> None:
    before = mode = pragma(connection, "journal_mode")
    if mode.upper() != settings.journal_mode:
        try:
            mode = pragma(connection, "journal_mode", settings.journal_mode)
        except sqlite3.OperationalError as error:
            # Another program has switched it, and somebody has it open, perhaps a reader of ours: so it stays.
            if again and before == "wal" and is_busy(error):
                return
            raise
    if mode.upper() != settings.journal_mode:
        raise cannot_open(
            settings.path, f"journal_mode={settings.journal_mode} was refused ({mode} is in force), {NO_WAL}"
        )
    try:
        pragma(connection, "schema_version")  # SQLite creates the -shm file at the first access
    except sqlite3.Error as error:
        if settings.journal_mode != "WAL" or error_code(error) not in NO_INDEX:
            raise
        sqlite3.Connection.close(connection)
        if before != "wal":  # a file left in WAL mode could not be opened here again
            with contextlib.suppress(sqlite3.Error):
                _leave_wal(settings, before)
        why = "the disk is full" if _is_full(settings.path) else NO_WAL
        text = f"{error}: the index of its log ({settings.path}{INDEX}) cannot be created or used here, {why}"
        raise cannot_open(settings.path, text, error.sqlite_errorcode, error.sqlite_errorname) from error


def _is_full(path: str) -> bool:
    try:
        return shutil.disk_usage(os.path.dirname(os.path.realpath(path))).free < INDEX_SIZE
    except OSError:
        return False


def _leave_wal(settings: Settings, mode: str) -> None:
    """Switch the file back. In EXCLUSIVE locking mode SQLite keeps the index in memory, not in a -shm file."""
    connection = _connect(settings, "rw")
    with contextlib.closing(connection):
        pragma(connection, "locking_mode", "EXCLUSIVE")
        pragma(connection, "journal_mode", mode)


def open_new(path: str) -> sqlite3.Connection:
    """A plain connection to a new file, the target of a backup."""
    return sqlite3.connect(path, isolation_level=None)


def seal(connection: sqlite3.Connection) -> None:
    """Initialize and close its base, so that every method of ``sqlite3.Connection`` itself raises ProgrammingError."""
    sqlite3.Connection.__init__(connection, ":memory:", isolation_level=None, check_same_thread=False)
    sqlite3.Connection.close(connection)


class _Scratch(sqlite3.Connection):
    def __del__(self) -> None:  # the thread that it belonged to has ended
        sqlite3.Connection.close(self)


def open_scratch() -> sqlite3.Connection:
    """An in-memory connection that allows nothing but SELECTs of constants."""
    connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False, factory=_Scratch)
    connection.set_authorizer(
        lambda action, *_: sqlite3.SQLITE_OK if action == sqlite3.SQLITE_SELECT else sqlite3.SQLITE_DENY
    )
    return connection


def open_image(image: bytes) -> sqlite3.Connection:
    """An in-memory connection with the content that ``serialize`` has returned."""
    connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    if image:
        rollback_journal = b"\x01\x01"  # in the header: a database in memory cannot be in WAL mode
        connection.deserialize(image[:18] + rollback_journal + image[20:])
    return connection


@functools.lru_cache(256)
def read_control(sql: str) -> tuple[str, str | None]:
    """What SQLite reads in BEGIN, COMMIT, ROLLBACK, SAVEPOINT and RELEASE: the verb, and the name of a savepoint.

    The verb of SAVEPOINT is BEGIN, that of END is COMMIT. Raises what SQLite raises for what it cannot read.
    """
    found: list[tuple[str, str | None]] = []

    def note(action: int, verb: str | None, name: str | None, *_: object) -> int:
        found.append((verb or "", name))
        return sqlite3.SQLITE_IGNORE

    connection = sqlite3.connect(":memory:", isolation_level=None)
    try:
        connection.set_authorizer(note)
        connection(sql)
        return found[0]
    finally:
        connection.close()


def open_to_look(path: str, patience: float, *, immutable: bool) -> sqlite3.Connection:
    """A plain read-only connection. ``immutable``: it takes no locks, for a file that is not open anywhere."""
    flags = "mode=ro&immutable=1" if immutable else "mode=ro"
    return sqlite3.connect(f"{Path(path).as_uri()}?{flags}", uri=True, timeout=patience)


def refuse_to_bind(value: object, place: int) -> None:
    """Raise what sqlite3 raises when it cannot bind ``value`` at index ``place``, counted from 1."""
    connection = sqlite3.connect(":memory:")
    try:
        marks = ", ".join("?" * place)
        connection.execute(f"SELECT 1 IN ({marks})", (*(None,) * (place - 1), value)).close()
    finally:
        connection.close()


def _connect(settings: Settings, mode: str, *, any_thread: bool = True) -> sqlite3.Connection:
    # as_uri escapes # ? %. The busy timeout is 0: neither interrupt() nor close ends a wait inside SQLite, so
    # LockPolicy waits instead.
    connection = sqlite3.connect(
        f"{Path(settings.path).as_uri()}?mode={mode}",
        uri=True,
        timeout=0,
        isolation_level=None,
        check_same_thread=not any_thread,
        detect_types=settings.detect_types,
    )
    connection.row_factory = settings.row_factory
    with _closing_on_error(connection):
        pragma(connection, "locking_mode", "NORMAL")  # SQLITE_DEFAULT_LOCKING_MODE may say EXCLUSIVE
    return connection


def _disable_implicit_transactions(connection: sqlite3.Connection) -> None:
    """Only explicit statements begin and end transactions, whatever ``on_connect`` has set."""
    if sys.version_info >= (3, 12):
        connection.autocommit = sqlite3.LEGACY_TRANSACTION_CONTROL
    connection.isolation_level = None


def _apply_pragmas(connection: sqlite3.Connection, settings: Settings) -> None:
    errors = []
    for name, value in settings.pragmas.items():
        try:
            set_pragma(connection, name, value)
        except ValueError as error:  # apply the others all the same
            errors.append(error)
    if errors:
        raise errors[0]


def _call_writers_hook(connection: sqlite3.Connection, settings: Settings, guard: Guard) -> None:
    mode = pragma(connection, "journal_mode")
    _call_hook(connection, settings, guard, readonly=False)
    pragma(connection, "locking_mode", "NORMAL")
    found = pragma(connection, "journal_mode")
    if found != mode:  # with MEMORY or OFF, a process that is killed leaves a damaged file
        pragma(connection, "journal_mode", mode)
        raise ValueError(
            f"on_connect has set journal_mode={found}, and {mode} is wanted: it is an argument of DbWriter"
        )
    read_only = read_only_files(connection)
    for name, path in database_files(connection).items():
        found = pragma(connection, f'"{name}".journal_mode')
        if path and path not in read_only and found in ("memory", "off"):
            raise ValueError(f"on_connect has set journal_mode={found} for {path}, which a killed process would damage")


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
        with contextlib.suppress(BaseException):  # a frozen dataclass, for example, refuses notes
            BaseException.add_note(error, f"onewriter: raised by on_connect for {settings.path} (readonly={readonly})")
        if issubclass(type(error), sqlite3.Error):
            error.from_hook = True  # type: ignore[attr-defined]
        raise


def _functions(connection: sqlite3.Connection) -> set[str]:
    """The names of application-defined functions."""
    return {name for name, is_builtin, *_ in rows_of(connection, "PRAGMA function_list") if not is_builtin}


@contextlib.contextmanager
def _closing_on_error(connection: sqlite3.Connection) -> Iterator[None]:
    process = os.getpid()
    try:
        yield
    except BaseException:
        if os.getpid() != process:  # on_connect has forked, and this is the child
            keep_open(connection)
        else:
            sqlite3.Connection.close(connection)
        raise
