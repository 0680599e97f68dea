"""Opening connections: each setting with its reason. The only ``sqlite3.connect``."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onewriter.guard import Guard, ReadGuard
from onewriter.locks import describe_lock
from onewriter.retry import LockPolicy, is_busy

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
SMALLEST_FILE = 512  # bytes; SQLite takes anything smaller for empty, and would write over it
MINIMUM_VERSION = (3, 37, 2)


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

    @property
    def checkpoints(self) -> bool:
        return self.auto_checkpoint and self.journal_mode == "WAL"

    @property
    def durable_synchronous(self) -> str:
        # A deleted rollback journal can come back after power loss unless its folder is synced too.
        # https://www.sqlite.org/pragma.html#pragma_synchronous
        return "EXTRA" if self.synchronous == "FULL" and self.journal_mode != "WAL" else self.synchronous

    def puts_back(self, name: str, value: str) -> bool:
        """Whether ``configure`` would undo that setting."""
        kept: dict[str, str | int] = {known.lower(): wanted for known, wanted in self.pragmas.items()}
        kept |= {"synchronous": self.durable_synchronous, "foreign_keys": int(self.foreign_keys)}
        if sys.platform == "darwin":
            kept |= {"fullfsync": 1, "checkpoint_fullfsync": 1}
        return name in kept and _normal(name, kept[name]) != _normal(name, value)


def refuse_old_sqlite(version: tuple[int, ...] = sqlite3.sqlite_version_info) -> None:
    if version < MINIMUM_VERSION:
        raise RuntimeError(
            f"SQLite {'.'.join(map(str, version))} is too old: rolling back to a savepoint can corrupt the database "
            "before 3.37.2"
        )


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


def open_writer(
    settings: Settings, guard: Guard, policy: LockPolicy, tell: Callable[[bool, str], object]
) -> sqlite3.Connection:
    """Open and configure the write connection, waiting for locks that openers and closers hold for a moment."""
    return _open(settings, policy, tell, lambda: _writer(settings, guard))


def open_reader(settings: Settings, guard: ReadGuard, policy: LockPolicy) -> sqlite3.Connection:
    """Open and configure a connection that cannot write."""

    def attempt() -> sqlite3.Connection:
        connection = _connect(settings, "ro")
        with _closing_on_error(connection):
            _apply_pragmas(connection, settings)
            _call_hook(connection, settings, readonly=True)
            _end_by_hand(connection)
            # mode=ro alone lets TEMP tables, ATTACHed files and VACUUM INTO be written.
            connection.execute("PRAGMA query_only=1").close()
            connection.set_authorizer(guard)
            return connection

    return _open(settings, policy, lambda has_it, text: None, attempt)


def configure(connection: sqlite3.Connection, settings: Settings) -> None:
    """Put the gateway's settings in force, and read each back."""
    set_pragma(connection, "synchronous", settings.durable_synchronous)
    set_pragma(connection, "foreign_keys", int(settings.foreign_keys))
    if sys.platform == "darwin":
        set_pragma(connection, "fullfsync", 1)  # fsync alone does not reach the disk there
        set_pragma(connection, "checkpoint_fullfsync", 1)
    set_pragma(connection, "journal_size_limit", settings.wal_limit)
    set_pragma(connection, "wal_autocheckpoint", 0)  # SQLite's own would run inside a COMMIT, and its caller would wait
    _apply_pragmas(connection, settings)


def set_pragma(connection: sqlite3.Connection, name: str, value: str | int) -> None:
    if _normal(name, pragma(connection, name)) == _normal(name, value):
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
    names = [row[1] for row in _rows(connection, "PRAGMA database_list")]
    return [name.replace('"', '""') for name in names if name != "temp"]


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


def _open(
    settings: Settings,
    policy: LockPolicy,
    tell: Callable[[bool, str], object],
    attempt: Callable[[], sqlite3.Connection],
) -> sqlite3.Connection:
    try:
        return policy.call(attempt, tell)
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", None) is None or getattr(error, "from_hook", False):
            raise
        named = type(error)(f"cannot open {settings.path}: {error}")
        named.sqlite_errorcode, named.sqlite_errorname = error.sqlite_errorcode, error.sqlite_errorname
        if is_busy(error):
            named.add_note(f"onewriter: waited {policy.waited:.2f} s; {describe_lock(settings.path)}")
        raise named from error


def _writer(settings: Settings, guard: Guard) -> sqlite3.Connection:
    connection = _connect(settings, "rwc")
    with _closing_on_error(connection):
        # Reads the header: a file that is no database is refused here, before anything is written.
        pragma(connection, "schema_version")
        for name, value in settings.pragmas.items():
            if name.lower() in BEFORE_WAL:
                pragma(connection, name, value)
        mode = pragma(connection, "journal_mode")
        if mode.upper() != settings.journal_mode:
            mode = pragma(connection, "journal_mode", settings.journal_mode)
        if mode.upper() != settings.journal_mode:
            raise _cannot_open(
                settings.path,
                f"journal_mode={settings.journal_mode} was refused ({mode} is in force), as on network file systems: "
                'journal_mode="DELETE" is the way out',
            )
        configure(connection, settings)
        _call_hook(connection, settings, readonly=False)
        configure(connection, settings)
        _end_by_hand(connection)
        guard.install(connection)
        return connection


def open_new(path: str) -> sqlite3.Connection:
    """A plain connection to a file that is to be made, for a copy."""
    return sqlite3.connect(path, isolation_level=None)


def open_to_look(path: str, patience: float, *, immutable: bool) -> sqlite3.Connection:
    """A plain connection that cannot write; ``immutable``: and takes no locks, for a file that nobody has open."""
    flags = "mode=ro&immutable=1" if immutable else "mode=ro"
    return sqlite3.connect(f"{Path(path).as_uri()}?{flags}", uri=True, timeout=patience)


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


def _call_hook(connection: sqlite3.Connection, settings: Settings, *, readonly: bool) -> None:
    if settings.on_connect is None:
        return
    try:
        settings.on_connect(connection, readonly)
        if connection.in_transaction:
            connection.commit()
    except BaseException as error:
        with contextlib.suppress(Exception):  # as from a frozen dataclass, which refuses notes
            error.add_note(f"onewriter: raised by on_connect for {settings.path} (readonly={readonly})")
        if isinstance(error, sqlite3.Error):
            error.from_hook = True  # type: ignore[attr-defined]
        raise


@contextlib.contextmanager
def _closing_on_error(connection: sqlite3.Connection) -> Iterator[None]:
    try:
        yield
    except BaseException:
        sqlite3.Connection.close(connection)
        raise


def _normal(name: str, value: object) -> str:
    text = str(value).strip().strip("'\"").lower()
    text = "utf-16" if text in ("utf-16le", "utf-16be") else text
    levels = LEVELS.get(name.lower(), ())
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
