"""Methods that return coroutines are known as coroutine functions, although they are plain ones."""

from __future__ import annotations

import asyncio
import inspect
import sys
import types
from typing import Any, TypeVar

C = TypeVar("C", bound="type[Any]")


def mark_coroutine_functions(kind: C) -> C:
    """For a class: they are plain so that arguments are taken, and refused, at the call. Starlette's background tasks,
    schedulers and mocks ask before they call, and would drop the coroutine of a function that seems to be no such.
    """
    for function in vars(kind).values():
        if isinstance(function, types.FunctionType) and returns_coroutine(function):
            if sys.version_info >= (3, 12):
                inspect.markcoroutinefunction(function)
            else:  # what asyncio.iscoroutinefunction looks at; inspect's has no way to be told
                function._is_coroutine = asyncio.coroutines._is_coroutine  # type: ignore[attr-defined]
    return kind


def returns_coroutine(function: types.FunctionType) -> bool:
    """By its annotation, which is a text in this package."""
    return str(function.__annotations__.get("return", "")).startswith("Coroutine[")
