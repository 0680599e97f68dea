"""Opening connections: each setting with its reason. The only ``sqlite3.connect``."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from onewriter.file import INDEX, JOURNAL, LOG
from onewriter.fork import forked_error, keep_open
from onewriter.guard import HISTORY, OFF, Guard, ReadGuard
from onewriter.locks import describe_lock
from onewriter.retry import LockPolicy, error_code, is_busy, note_descriptors

T = TypeVar("T")

WORDS = {"on": "1", "yes": "1", "true": "1", "off": "0", "no": "0", "false": "0"}
LEVELS = {
    "synchronous": ("off", "normal", "full", "extra"),
    "temp_store": ("default", "file", "memory"),
    "secure_delete": ("off", "on", "fast"),
    "auto_vacuum": ("none", "full", "incremental"),
}
OWN_PRAGMAS = {
    "foreign_keys": "foreign_keys=",
    "synchronous": "synchronous=",
    "journal_mode": "journal_mode=",
    "journal_size_limit": "wal_limit=",
    "wal_autocheckpoint": "auto_checkpoint=",
    "busy_timeout": "lock_timeout=",
    "query_only": "a reader, which always has it",
    "locking_mode": "one process alone; readers need NORMAL",
}
BEFORE_WAL = ("page_size", "auto_vacuum", "encoding")  # cannot be changed after it
NO_WAL = 'as on network file systems: journal_mode="DELETE" is the way out'
LOOKS = 3  # at a file beside the database that others may make and delete meanwhile
SMALLEST_FILE = 512  # bytes; SQLite takes anything smaller for empty, and would write over it
MINIMUM_VERSION = (3, 37, 2)
NO_INDEX = {  # where the index of the log cannot be had, or its locks
    getattr(sqlite3, f"SQLITE_{name}")
    for name in ("IOERR_SHMOPEN", "IOERR_SHMSIZE", "IOERR_SHMLOCK", "IOERR_SHMMAP", "PROTOCOL")
}


@dataclass(frozen=True)
class Settings:
    """What every connection of one gateway is opened with."""

    path: str
    lock_timeout: float
    synchronous: str
    journal_mode: str
    foreign_keys: bool
    pragmas: Mapping[str, str | int]
    on_connect: Callable[[sqlite3.Connection, bool], object] | None
    row_factory: Any
    detect_types: int
    wal_limit: int
    auto_checkpoint: bool

    def durable_synchronous(self, is_wal: bool) -> str:
        # A deleted rollback journal can come back after power loss unless its folder is synced too.
        # https://www.sqlite.org/pragma.html#pragma_synchronous
        return "EXTRA" if self.synchronous == "FULL" and not is_wal else self.synchronous

    def puts_back(self, name: str, value: str) -> bool:
        """Whether ``configure`` would undo that setting."""
        kept: dict[str, str | int] = {known.lower(): wanted for known, wanted in self.pragmas.items()}
        kept |= {
            "synchronous": self.durable_synchronous(self.journal_mode == "WAL"),
            "foreign_keys": int(self.foreign_keys),
        }
        if sys.platform == "darwin":
            kept |= {"fullfsync": 1, "checkpoint_fullfsync": 1}
        return name in kept and _normal(name, kept[name]) != _normal(name, value)


def refuse_old_sqlite(version: tuple[int, ...] = sqlite3.sqlite_version_info) -> None:
    if version < MINIMUM_VERSION:
        raise RuntimeError(
            f"SQLite {'.'.join(map(str, version))} is too old: rolling back to a savepoint can corrupt the database "
            "before 3.37.2"
        )


def refuse_unsafe_sqlite(threadsafety: int = sqlite3.threadsafety) -> None:
    if threadsafety == 0:
        raise RuntimeError("SQLite was built without mutexes (SQLITE_THREADSAFE=0): threads cannot use it side by side")


def check_path(path: str) -> None:
    """Say what is wrong with ``path`` before SQLite creates anything there. Looks by stat only: closing another
    descriptor of the file would drop this process's locks on it (https://www.sqlite.org/howtocorrupt.html#_posix_advisory_locks).
    """
    folder = os.path.dirname(path)
    if not os.path.isdir(folder):
        raise _cannot_open(path, f"there is no folder {folder}")
    if os.path.exists(path):
        if os.path.isdir(path):
            raise _cannot_open(path, "it is a folder")
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise _cannot_open(path, "it is not a regular file")
        if 0 < os.stat(path).st_size < SMALLEST_FILE:
            raise _cannot_open(
                path, "file is not a database", sqlite3.SQLITE_NOTADB, "SQLITE_NOTADB", sqlite3.DatabaseError
            )
        if not os.access(path, os.W_OK):
            # SQLite would open it read-only without a word.
            raise _cannot_open(path, "the file is not writable", sqlite3.SQLITE_READONLY, "SQLITE_READONLY")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _cannot_open(path, f"the folder {folder} is not writable, and SQLite keeps its log beside the database")


def check_company(path: str) -> None:
    """Say what is wrong with the names of the file, and with the files that SQLite keeps beside it."""
    if os.path.exists(path) and os.stat(path).st_nlink > 1:
        raise _cannot_open(
            path,
            "the file has a second name (a hard link), and SQLite keeps a log beside each name: what is written "
            "under one would be lost under the other. Remove all names but one; a symbolic link may stand for it",
        )
    for suffix in (LOG, INDEX, JOURNAL):
        owner = path.removesuffix(suffix)
        if owner != path and os.path.basename(owner) and os.path.exists(owner):
            raise _cannot_open(path, f"it is SQLite's own file beside the database {owner}")
        name = f"{path}{suffix}"
        if _stays(name, os.path.isfile):
            raise _cannot_open(path, f"{name}, which SQLite keeps beside the database, is not a regular file")
        if _stays(name, lambda name: os.access(name, os.R_OK | os.W_OK)):
            raise _cannot_open(
                path,
                f"{name}, which SQLite keeps beside the database, is not writable: another user has made it. Give this "
                "one the right to write it, or let one who may write the file and it open and close the database",
                sqlite3.SQLITE_READONLY,
                "SQLITE_READONLY",
            )
    # In this order: a file that is being made is not empty any more when it has a log.
    if _size(f"{path}{LOG}") > 0 and os.path.exists(path) and _size(path) == 0:
        raise _cannot_open(
            path,
            f"the file is empty and {path}{LOG} is not: the file was overwritten, and SQLite would delete the log too. "
            "Put the file back, or move the log away",
        )


def _stays(name: str, is_well: Callable[[str], bool]) -> bool:
    """Whether what has that name, if there is anything, is not well. Others who open and close make and delete these
    files at any moment: it counts only if it is so, and the same, at every look."""
    found = _what_is_there(name)
    return found is not None and all(not is_well(name) and _what_is_there(name) == found for _ in range(LOOKS))


def _what_is_there(name: str) -> tuple[int, int, int] | None:
    try:
        found = os.lstat(name)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_ctime_ns


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


def set_pragma(connection: sqlite3.Connection, name: str, value: str | int, *, always: bool = False) -> None:
    if not always and _normal(name, pragma(connection, name)) == _normal(name, value):
        return
    pragma(connection, name, value)
    found = pragma(connection, name)
    if _normal(name, found) != _normal(name, value):
        what = "SQLite does not know it or does not tell its value" if found is None else f"{found!r} is in force"
        raise ValueError(f"PRAGMA {name} = {value!r} has no effect here: {what}; set it in on_connect if that is meant")


def pragma(connection: sqlite3.Connection, name: str, value: str | int | None = None) -> Any:
    """The first value that the PRAGMA answers, or None."""
    rows = _rows(connection, f"PRAGMA {name}" + ("" if value is None else f" = {_literal(value)}"))
    return rows[0][0] if rows else None


def _rows(connection: sqlite3.Connection, sql: str) -> list[Any]:
    factory, connection.text_factory = connection.text_factory, decode  # the user's is not for our own rows
    cursor = connection.cursor()
    try:
        cursor.row_factory = None
        return cursor.execute(sql).fetchall()
    finally:
        cursor.close()
        connection.text_factory = factory


def database_names(connection: sqlite3.Connection) -> list[str]:
    """The main database and the attached ones, as they stand in double quotes."""
    return list(database_files(connection))


def database_files(connection: sqlite3.Connection) -> dict[str, str]:
    """And their files; "": none. Before SQLite 3.39 it reads the schema, and can meet a lock."""
    rows = _rows(connection, "PRAGMA database_list")
    return {name.replace('"', '""'): file or "" for _, name, file in rows if name != "temp"}


def decode(text: bytes) -> str:
    """Of any text: a path, or what somebody has stored, need not be UTF-8."""
    return text.decode("utf-8", "surrogateescape")


def check_pragmas(pragmas: Mapping[str, str | int]) -> None:
    if not isinstance(pragmas, Mapping):
        raise TypeError(f"pragmas must be a mapping of names to values, not {type(pragmas).__name__}")
    for name, value in pragmas.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_]+", name):
            raise ValueError(f"pragmas: {name!r} is not the name of a PRAGMA")
        if not isinstance(value, str | int):
            raise TypeError(f"pragmas: the value of {name} must be str or int, not {type(value).__name__}")
        if name.lower() in OWN_PRAGMAS:
            raise ValueError(f"pragmas: {name} is the gateway's own: {OWN_PRAGMAS[name.lower()]}")
        if name.lower() == "count_changes" and str(value).lower() not in OFF:
            raise ValueError("pragmas: count_changes would leave a row of each write unread: use Result.rowcount")


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
        raise _cannot_open(
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
        raise _cannot_open(settings.path, text, error.sqlite_errorcode, error.sqlite_errorname) from error


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
    return {name for name, is_builtin, *_ in _rows(connection, "PRAGMA function_list") if not is_builtin}


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


def _normal(name: str, value: object) -> str:
    text = str(value).strip().strip("'\"").lower()
    text = "utf-16" if text in ("utf-16le", "utf-16be") else text
    levels = LEVELS.get(name.lower().rpartition(".")[2], ())
    return str(levels.index(text)) if text in levels else WORDS.get(text, text)


def _literal(value: str | int) -> str:
    text = str(int(value)) if isinstance(value, int) else value
    return text if re.fullmatch(r"-?\w+", text) else "'" + text.replace("'", "''") + "'"


def _cannot_open(
    path: str,
    reason: str,
    code: int = sqlite3.SQLITE_CANTOPEN,
    name: str = "SQLITE_CANTOPEN",
    kind: type[sqlite3.DatabaseError] = sqlite3.OperationalError,
) -> sqlite3.DatabaseError:
    error = kind(f"cannot open {path}: {reason}")
    error.sqlite_errorcode, error.sqlite_errorname = code, name
    return error


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0
