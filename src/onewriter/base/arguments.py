"""Checks of arguments, made at the call."""

from __future__ import annotations

import inspect
import math
import sys
import types
from collections.abc import Callable
from typing import Any

NOT_PLAIN = inspect.CO_COROUTINE | inspect.CO_ITERABLE_COROUTINE | inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


def check_seconds(name: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number of seconds, not {type(value).__name__}")
    if not (0 <= value <= sys.float_info.max or value == math.inf):  # nor NaN
        raise ValueError(f"{name} must be 0 or more seconds, not {value}")


def check_timeout(timeout: object) -> None:
    if timeout is not None:
        check_seconds("timeout", timeout)


def check_function(function: Callable[..., object]) -> None:
    """Refuse, at the call, functions whose call only makes a coroutine or a generator."""
    if not is_plain(function):
        raise TypeError(f"{name_of(function)!r} is an async or generator function: jobs are plain functions")


def check_callback(name: str, function: object) -> None:
    """The same for callbacks: the coroutine or generator would never be awaited or iterated over."""
    if not callable(function):
        raise TypeError(f"{name} must be callable, not {type(function).__name__}")
    if not is_plain(function):
        what = name_of(function)
        raise TypeError(f"{name} {what!r} is an async or generator function, which would never run: give a plain one")


def is_plain(function: Callable[..., object]) -> bool:
    if isinstance(function, types.FunctionType):
        return not function.__code__.co_flags & NOT_PLAIN
    if isinstance(function, type):
        return True  # to call it makes an instance, whatever that can do
    kinds = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
    targets = (function, getattr(function, "__call__", None))  # noqa: B004 - an object's own __call__ counts
    return not any(is_kind(target) for is_kind in kinds for target in targets)


def name_of(function: Callable[..., object]) -> str:
    if isinstance(function, types.FunctionType):
        return function.__qualname__
    target = getattr(function, "func", function)  # functools.partial
    return str(getattr(target, "__qualname__", None) or type(target).__qualname__)


def check_job(what: object, params: object) -> None:
    if not callable(what):
        raise TypeError(f"a job is SQL (str) or a function of the Transaction, not {type(what).__name__}")
    check_no_params(params)
    check_function(what)


def check_read(what: object, params: Any) -> None:
    """For a read that is not SQL."""
    if not callable(what):
        raise TypeError(f"a read is SQL (str) or a function of the connection, not {type(what).__name__}")
    check_no_params(params)
    check_function(what)


def check_count(name: str, value: object, least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")
    if value >= 2**63:  # the most that SQLite takes
        raise ValueError(f"{name} must be less than 2**63")


def exact(text: str) -> str:
    """A plain ``str``: one of a subclass may run any code, on the writer thread and in the midst of our work."""
    return text if type(text) is str else str.__str__(text)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
    return exact(value)


def check_label(label: str | None) -> str | None:
    if label is None:
        return None
    if not isinstance(label, str):
        raise TypeError(f"label must be a str, not {type(label).__name__}")
    return exact(label)


def check_foreign_keys(value: object) -> None:
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"foreign_keys must be a bool or None, not {type(value).__name__}")


def check_no_params(params: object) -> None:
    if not (isinstance(params, tuple) and not params):
        raise TypeError("parameters go with SQL; a function gets its values from its closure or functools.partial")


def check_sql(sql: str) -> str:
    if type(sql) is str:  # as nearly always
        return sql
    if not isinstance(sql, str):
        raise TypeError(f"the SQL must be a str, not {type(sql).__name__}")
    return exact(sql)
