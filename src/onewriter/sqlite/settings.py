"""Settings: the options with which every connection of one gateway is opened, and their checks."""

from __future__ import annotations

import re
import sqlite3
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from onewriter.sqlite.guard import OFF

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
MINIMUM_VERSION = (3, 37, 2)


@dataclass(frozen=True)
class Settings:
    """The options with which every connection of one gateway is opened."""

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
        # After a power loss a deleted rollback journal can reappear, unless its folder is synced too.
        # https://www.sqlite.org/pragma.html#pragma_synchronous
        return "EXTRA" if self.synchronous == "FULL" and not is_wal else self.synchronous

    def puts_back(self, name: str, value: str) -> bool:
        """Whether ``configure`` would reset that PRAGMA to another value."""
        kept: dict[str, str | int] = {known.lower(): wanted for known, wanted in self.pragmas.items()}
        kept |= {
            "synchronous": self.durable_synchronous(self.journal_mode == "WAL"),
            "foreign_keys": int(self.foreign_keys),
        }
        if sys.platform == "darwin":
            kept |= {"fullfsync": 1, "checkpoint_fullfsync": 1}
        return name in kept and normal_value(name, kept[name]) != normal_value(name, value)


def refuse_old_sqlite(version: tuple[int, ...] = sqlite3.sqlite_version_info) -> None:
    if version < MINIMUM_VERSION:
        raise RuntimeError(
            f"SQLite {'.'.join(map(str, version))} is too old: rolling back to a savepoint can corrupt the database "
            "before 3.37.2"
        )


def refuse_unsafe_sqlite(threadsafety: int = sqlite3.threadsafety) -> None:
    if threadsafety == 0:
        raise RuntimeError("SQLite was built without mutexes (SQLITE_THREADSAFE=0): threads cannot use it")


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


def normal_value(name: str, value: object) -> str:
    text = str(value).strip().strip("'\"").lower()
    text = "utf-16" if text in ("utf-16le", "utf-16be") else text
    levels = LEVELS.get(name.lower().rpartition(".")[2], ())
    return str(levels.index(text)) if text in levels else WORDS.get(text, text)
