"""Setting an attribute that the object does not have raises, and says where it belongs, rather than being ignored."""

from __future__ import annotations

from typing import Any, NoReturn

CONNECTIONS_OWN = ("row_factory", "text_factory", "isolation_level", "autocommit")
ON_A_CONNECTION = "an attribute of the connection that tx.connection, reader(), read(function) and on_connect give"
UNKNOWN = "what a gateway is opened with are arguments of DbWriter"


def misplaced(thing: object, name: str) -> AttributeError:
    place = f"it is {ON_A_CONNECTION}" if name in CONNECTIONS_OWN else UNKNOWN
    if name == "row_factory":
        place = f"it is an argument of DbWriter, and {ON_A_CONNECTION}"
    kind = thing if isinstance(thing, type) else type(thing)
    return AttributeError(f"{kind.__name__} has no attribute {name!r}: {place}", name=name, obj=thing)


class Elsewhere:
    """An attribute of another class."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, instance: object, owner: type | None = None) -> NoReturn:
        raise misplaced(owner if instance is None else instance, self._name)

    def __set__(self, instance: object, value: object) -> NoReturn:
        raise misplaced(instance, self._name)


class Strict:
    """For objects that are created rarely; subclasses of the user's may have attributes of their own."""

    __slots__ = ()

    def __setattr__(self, name: str, value: Any) -> None:
        is_ours = type(self).__module__.startswith("onewriter.")
        if name in CONNECTIONS_OWN or (is_ours and not name.startswith("_") and not hasattr(type(self), name)):
            raise misplaced(self, name)
        super().__setattr__(name, value)
