"""Parameters are captured at the call: adapted, and every buffer copied, in the caller's thread."""

from __future__ import annotations

import array
import ast
import functools
import re
import sqlite3
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeAlias

from onewriter.base.call_site import user_frame
from onewriter.sqlite.connection import refuse_to_bind
from onewriter.sqlite.statement import COMMENT, LONG, QUOTED, Parameters


class Values(Protocol):
    """A sequence of values. For a type checker a ``str`` is not one: only a ``str`` can be *in* a ``str``."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...
    def __getitem__(self, index: int, /) -> Any: ...
    def __contains__(self, value: object, /) -> bool: ...


Params: TypeAlias = Values | Mapping[str, Any]  # as they are given; ``Parameters``: as they are captured

PLAIN = (int, float, str, bytes, bool, type(None))  # immutable, and sqlite3 binds it as it is
PLAIN_TYPES = frozenset(PLAIN)
EXACT: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (int, int.__index__),
    (float, float.__float__),
    (str, str.__str__),
)
BUFFERS = (bytearray, memoryview, array.array)  # which have no __conform__
TEXTUAL = (str, bytes, bytearray, memoryview)
# As in SQLite's tokenizer, https://www.sqlite.org/lang_expr.html#varparam; a dollar sign inside a name is part of it.
VARIABLE = re.compile(
    rf"{QUOTED}|{COMMENT}"
    r"|\?(?P<number>\d+)|(?:[:@]|(?<![\w$\x80-\U0010ffff])\$)(?P<name>(?:[\w$\x80-\U0010ffff]|::)+(?:\([^\s)]*\))?)",
    re.ASCII | re.DOTALL,
)
ADAPTERS = sqlite3.adapters
_count = -1  # the number of ADAPTERS for which this holds:
_taken_as_is: frozenset[type] = frozenset()  # the plain types without an adapter


def capture(sql: str, parameters: Any) -> Parameters:
    """Copy one statement's parameters as they are now: later changes have no effect."""
    if type(parameters) is tuple and len(ADAPTERS) == _count and _taken_as_is.issuperset(map(type, parameters)):
        return parameters
    return _capture(sql, parameters, _Caller())


def capture_many(sql: str, rows: Any) -> list[Parameters]:
    """The same for many rows. A generator is consumed here, once, and may yield one object again and again."""
    if isinstance(rows, (*TEXTUAL, Mapping)) or not isinstance(rows, Iterable):
        raise TypeError(f"seq_of_params is an iterable of rows, not {type(rows).__name__}")
    caller = _Caller()
    return [_capture(sql, row, caller) for row in rows]


def _capture(sql: str, parameters: Any, caller: _Caller) -> Parameters:
    if len(ADAPTERS) != _count:
        _refresh_adapters()
    if type(parameters) is list:
        parameters = tuple(parameters)
    elif type(parameters) is not tuple:
        if isinstance(parameters, TEXTUAL):
            raise TypeError(
                f"parameters are a sequence or a mapping, not {type(parameters).__name__}: it would bind one by one; "
                "put a lone value into a tuple: (value,)"
            )
        if isinstance(parameters, Mapping):
            return _capture_named(sql, parameters, caller)
        if isinstance(parameters, Iterable) and not isinstance(parameters, set | frozenset):
            parameters = tuple(parameters)
        elif _is_sequence(parameters):  # as many as it has: it may raise no IndexError behind them
            parameters = tuple([parameters[place] for place in range(len(parameters))])
        else:
            raise TypeError(f"parameters are a sequence or a mapping, not {type(parameters).__name__}")
    if _taken_as_is.issuperset(map(type, parameters)):
        return parameters  # type: ignore[no-any-return]
    return tuple([_take(value, place, caller) for place, value in enumerate(parameters, 1)])


def _capture_named(sql: str, parameters: Mapping[str, Any], caller: _Caller) -> Parameters:
    if type(parameters) is dict:
        parameters = parameters.copy()
        if _taken_as_is.issuperset(map(type, parameters.values())):
            return parameters
    # Only the names in the statement are looked up, as sqlite3 does: a mapping may compute its values.
    captured = {}
    for place, name in enumerate(_names(sql) if len(sql) < LONG else _names.__wrapped__(sql), 1):
        try:
            value = parameters[name]
        except LookupError:
            continue  # sqlite3 raises when it binds
        captured[name] = _take(value, place, caller)
    return captured


@functools.lru_cache(256)
def _names(sql: str) -> tuple[str, ...]:
    """The named and numbered parameters of ``sql``, in order, each once."""
    found = VARIABLE.finditer(sql)
    return tuple(dict.fromkeys(match["name"] or match["number"] for match in found if match.lastgroup))


def _is_sequence(value: object) -> bool:
    return hasattr(type(value), "__getitem__") and hasattr(type(value), "__len__")


def _refresh_adapters() -> None:
    global _count, _taken_as_is
    count = len(ADAPTERS)
    _taken_as_is = frozenset(kind for kind in PLAIN if (kind, sqlite3.PrepareProtocol) not in ADAPTERS)
    _count = count


def _take(value: Any, place: int, caller: _Caller) -> Any:
    """What sqlite3 would bind for ``value`` now, as an immutable object."""
    kind = type(value)
    if kind in _taken_as_is:
        return value
    if kind not in BUFFERS or (kind, sqlite3.PrepareProtocol) in ADAPTERS:
        value = caller.adapt(value)
        kind = type(value)
    if kind not in PLAIN:
        value = _immutable(value, place)
        kind = type(value)
    return value if kind in _taken_as_is else _Adapted(value)


def _immutable(value: Any, place: int) -> Any:
    kind = type(value)
    if kind not in BUFFERS:
        for base, exact in EXACT:
            if issubclass(kind, base):
                return exact(value)
    try:
        return b"".join((value,))  # uses the buffer, as sqlite3 does; bytes() would call __bytes__ first
    except TypeError:
        refuse_to_bind(_Adapted(value), place)
        raise


class _Adapted:
    """A value that was adapted. Its ``__conform__`` keeps sqlite3 from calling an adapter for its type again."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __conform__(self, protocol: object) -> Any:
        return self.value


def _template() -> types.CodeType:
    tree = ast.parse("lambda adapt, value, protocol: adapt(value, protocol, value)", mode="eval")
    for node in ast.walk(tree):  # without columns, a traceback marks nothing in the caller's line
        for name in ("col_offset", "end_col_offset"):
            if hasattr(node, name):
                setattr(node, name, -1)
    return next(const for const in compile(tree, "", "eval").co_consts if isinstance(const, types.CodeType))


TEMPLATE = _template()


@functools.lru_cache(256)
def _stand_in(filename: str, line: int, name: str, qualname: str) -> types.CodeType:
    return TEMPLATE.replace(co_filename=filename, co_firstlineno=line, co_name=name, co_qualname=qualname)


class _Caller:
    """Calls adapters as if from the line outside this package that made the call.

    An adapter's warning (``stacklevel=2``) names the line of Python that called the adapter, which would be ours. So it
    is called by a function that has the file, line and module of the caller.
    """

    _function: Callable[..., Any] | None = None

    def adapt(self, value: Any) -> Any:
        """As ``sqlite3`` adapts a parameter: with its adapter, its ``__conform__``, or not at all."""
        if self._function is None:
            frame = user_frame(sys._getframe(1))
            code = frame.f_code
            stand_in = _stand_in(
                code.co_filename, frame.f_lineno or code.co_firstlineno, code.co_name, code.co_qualname
            )
            self._function = types.FunctionType(stand_in, frame.f_globals)
        return self._function(sqlite3.adapt, value, sqlite3.PrepareProtocol)
