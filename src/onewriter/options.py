"""Options: the arguments of a gateway, checked."""

from __future__ import annotations

import dataclasses
import math
import sqlite3
from collections.abc import Callable, Mapping
from typing import Any

from onewriter.base.arguments import check_callback, check_choice, check_count, check_label, check_seconds, exact
from onewriter.sqlite.settings import Settings, check_pragmas

SYNCHRONOUS = ("OFF", "NORMAL", "FULL", "EXTRA")
JOURNAL_MODES = ("WAL", "DELETE", "TRUNCATE", "PERSIST")


@dataclasses.dataclass(frozen=True)
class Options:
    """What a gateway is opened with, except its path; ``DbWriter`` says what each means."""

    label: str | None = None
    readers: int = 4
    maxsize: int = 10_000
    lock_timeout: float = 10.0
    synchronous: str = "FULL"
    journal_mode: str = "WAL"
    foreign_keys: bool = True
    pragmas: Mapping[str, str | int] | None = None
    on_connect: Callable[[sqlite3.Connection, bool], object] | None = None
    row_factory: Any = None
    detect_types: int = 0
    on_error: Callable[[Any], object] | None = None
    on_event: Callable[[Any], object] | None = None
    slow_after: float = 1.0
    max_hold: float = math.inf
    wal_limit: int = 4 * 2**20
    auto_checkpoint: bool = True
    inline: bool = False

    def __post_init__(self) -> None:
        check_count("readers", self.readers)
        check_count("maxsize", self.maxsize)
        check_count("wal_limit", self.wal_limit, least=0)
        for name in ("lock_timeout", "slow_after", "max_hold"):
            check_seconds(name, getattr(self, name))
        chosen = {
            "synchronous": check_choice("synchronous", self.synchronous, SYNCHRONOUS),
            "journal_mode": check_choice("journal_mode", self.journal_mode, JOURNAL_MODES),
            "label": check_label(self.label),
        }
        vars(self).update(chosen)  # frozen for all others
        for name in ("on_connect", "on_error", "on_event", "row_factory"):
            if getattr(self, name) is not None:
                check_callback(name, getattr(self, name))
        if not isinstance(self.detect_types, int):
            raise TypeError(f"detect_types must be an int, not {type(self.detect_types).__name__}")
        if not 0 <= self.detect_types < 2**31:
            raise ValueError(f"detect_types is a sum of sqlite3's PARSE_…, not {self.detect_types}")
        for name in ("foreign_keys", "auto_checkpoint", "inline"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, not {type(getattr(self, name)).__name__}")
        check_pragmas(self.pragmas or {})

    def settings(self, path: str) -> Settings:
        """Those that every connection of the gateway is opened with."""
        names = {field.name for field in dataclasses.fields(Settings)} - {"path", "pragmas"}
        chosen = {name: getattr(self, name) for name in names}
        wanted = self.pragmas or {}
        pragmas = {exact(name): value if isinstance(value, int) else exact(value) for name, value in wanted.items()}
        return Settings(path=path, pragmas=pragmas, **chosen)
