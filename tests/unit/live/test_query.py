"""Query: comparing what it gives."""

from __future__ import annotations

import pytest

from onewriter.live.query import same


class Strange:
    def __init__(self, answer: object) -> None:
        self._answer = answer

    def __eq__(self, other: object) -> bool:
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer  # type: ignore[return-value]

    __hash__ = None  # type: ignore[assignment]


class Undecided:
    def __bool__(self) -> bool:
        raise ValueError


@pytest.mark.parametrize("answer", [ZeroDivisionError(), Undecided(), False, 0])
def test_what_cannot_be_compared_is_not_the_same(answer: object) -> None:
    assert not same(Strange(answer), Strange(answer))


def test_the_same_object_and_equal_ones_are() -> None:
    strange = Strange(ZeroDivisionError())
    assert same(strange, strange)
    assert same([(1, "a")], [(1, "a")])
    assert not same([(1,)], [(2,)])
