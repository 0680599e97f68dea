"""Internal PRAGMAs: setting them, and reading them back."""

from __future__ import annotations

import re
import sqlite3
from typing import Any

from onewriter.sqlite.settings import normal_value


def set_pragma(connection: sqlite3.Connection, name: str, value: str | int, *, always: bool = False) -> None:
    if not always and normal_value(name, pragma(connection, name)) == normal_value(name, value):
        return
    pragma(connection, name, value)
    found = pragma(connection, name)
    if normal_value(name, found) != normal_value(name, value):
        what = "SQLite does not know it or does not tell its value" if found is None else f"{found!r} is in force"
        raise ValueError(f"PRAGMA {name} = {value!r} has no effect here: {what}; set it in on_connect if that is meant")


def pragma(connection: sqlite3.Connection, name: str, value: str | int | None = None) -> Any:
    """The first value that the PRAGMA returns, or None."""
    rows = rows_of(connection, f"PRAGMA {name}" + ("" if value is None else f" = {literal(value)}"))
    return rows[0][0] if rows else None


def rows_of(connection: sqlite3.Connection, sql: str) -> list[Any]:
    """Of an internal query. It has expressions for columns of a table (``+name``): these have no declared type, for
    which the user's converters would be called."""
    factory, connection.text_factory = connection.text_factory, decode  # the user's must not see internal rows
    cursor = connection.cursor()
    try:
        cursor.row_factory = None
        return cursor.execute(sql).fetchall()
    finally:
        cursor.close()
        connection.text_factory = factory


def database_names(connection: sqlite3.Connection) -> list[str]:
    """The names of the main and attached databases, escaped for double quotes."""
    return list(database_files(connection))


def database_files(connection: sqlite3.Connection) -> dict[str, str]:
    """The same, with their files; "": none. Before SQLite 3.39 it reads the schema, and can fail with BUSY."""
    rows = rows_of(connection, "PRAGMA database_list")
    return {name.replace('"', '""'): file or "" for _, name, file in rows if name != "temp"}


def read_only_files(connection: sqlite3.Connection) -> list[str]:
    """Those that were attached to be read only: BEGIN IMMEDIATE begins no write there."""
    steps = rows_of(connection, "EXPLAIN BEGIN IMMEDIATE")
    reads = {place for _, step, place, is_write, *_ in steps if step == "Transaction" and not is_write}
    return [file for place, _, file in rows_of(connection, "PRAGMA database_list") if file and place in reads]


def decode(text: bytes) -> str:
    """Decode any text: a path, or what an application has stored, need not be UTF-8."""
    return text.decode("utf-8", "surrogateescape")


def literal(value: str | int) -> str:
    text = str(int(value)) if isinstance(value, int) else value
    return text if re.fullmatch(r"-?\w+", text) else "'" + text.replace("'", "''") + "'"
