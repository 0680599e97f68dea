"""Parameters are taken at the call: adapted, and every buffer copied, in the caller's thread."""

from __future__ import annotations

import array
import asyncio
import collections
import ctypes
import datetime
import enum
import gc
import inspect
import json
import mmap
import sqlite3
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from helpers import CREATE, DEADLINE, parked
from onewriter import AsyncDbWriter, DbWriter, Transaction
from onewriter.sqlite.parameters import Params, capture

INSERT = "INSERT INTO t (name) VALUES (?)"
PROTOCOL = sqlite3.PrepareProtocol


@pytest.fixture(autouse=True)
def adapters() -> Iterator[None]:
    """Those of a test end with it."""
    before = dict(sqlite3.adapters)
    yield
    sqlite3.adapters.clear()
    sqlite3.adapters.update(before)


class Event:
    def __init__(self, text: str) -> None:
        self.text = text

    def __conform__(self, protocol: object) -> str | None:
        return self.text if protocol is PROTOCOL else None


class Colour(enum.IntEnum):
    RED = 7


class Name(str):
    pass


class Wild:
    """Has no adapter, and no buffer."""


def plainly(sql: str, values: Any) -> list[Any]:
    """What sqlite3 alone makes of it."""
    connection = sqlite3.connect(":memory:")
    try:
        return connection.execute(sql, values).fetchall()
    finally:
        connection.close()


def change_text(event: Event) -> None:
    event.text = "later"


def change_buffer(buffer: Any) -> None:
    buffer[0:1] = b"9"


def ctypes_array() -> Any:
    return (ctypes.c_char * 1)(b"1")


def mapped() -> Any:
    area = mmap.mmap(-1, 1)
    area[0:1] = b"1"
    return area


CHANGEABLE: list[tuple[Callable[[], Any], Callable[[Any], object], Any]] = [
    (lambda: Event("now"), change_text, "now"),
    (lambda: {"n": 1}, lambda value: value.update(n=2), '{"n": 1}'),
    (lambda: [1], lambda value: value.append(2), "[1]"),
    (lambda: bytearray(b"1"), change_buffer, b"1"),
    (lambda: memoryview(bytearray(b"1")), change_buffer, b"1"),
    (lambda: array.array("b", [1]), lambda value: value.append(2), b"\x01"),
    (ctypes_array, change_buffer, b"1"),
    (mapped, change_buffer, b"1"),
]


@pytest.fixture(
    params=CHANGEABLE, ids=["conform", "dict", "list", "bytearray", "memoryview", "array", "ctypes", "mmap"]
)
def changeable(request: pytest.FixtureRequest) -> Any:
    sqlite3.register_adapter(dict, json.dumps)
    sqlite3.register_adapter(list, json.dumps)
    make, change, expected = request.param
    return make(), change, expected


def names(names_db: DbWriter) -> list[Any]:
    return [name for (name,) in names_db.read("SELECT name FROM t ORDER BY id")]


@pytest.mark.parametrize("named", [False, True])
def test_what_happens_to_a_queued_value_changes_nothing(db: DbWriter, changeable: Any, named: bool) -> None:
    value, change, expected = changeable
    with parked(db):
        ticket = db.enqueue("SELECT :a", {"a": value}) if named else db.enqueue("SELECT ?", [value])
        change(value)
    assert ticket.result(DEADLINE).rows == [(expected,)]


def test_one_object_may_be_used_for_all_rows(db: DbWriter, changeable: Any) -> None:
    value, change, expected = changeable
    row = [value]

    def rows() -> Iterator[list[Any]]:
        yield row
        change(value)
        yield [None]

    db.run("CREATE TABLE t (a)")
    db.run_many("INSERT INTO t VALUES (?)", rows())
    with db.transaction() as tx:
        assert tx.execute("SELECT a FROM t WHERE a NOT NULL").rows == [(expected,)]


def test_a_task_has_its_values_taken_at_the_call_too(path: Path, changeable: Any) -> None:
    value, change, expected = changeable

    async def main() -> list[Any]:
        async with AsyncDbWriter(path) as db, db.reader() as reader:
            calls: list[Any] = [db.read("SELECT ?", (value,)), reader.execute("SELECT ?", (value,))]
            calls.append(db.run("SELECT ?", (value,)))
            change(value)
            read, in_block, written = [await call for call in calls]
            return [read, in_block.rows, written.rows]

    assert asyncio.run(main()) == [[(expected,)]] * 3


def test_an_adapter_runs_once_in_the_callers_thread(db: DbWriter) -> None:
    threads: list[threading.Thread] = []

    def adapt(wild: Wild) -> str:
        threads.append(threading.current_thread())
        return "text"

    sqlite3.register_adapter(Wild, adapt)
    assert db.run("SELECT ?", (Wild(),)).rows == [("text",)]
    assert db.run(lambda tx: tx.execute("SELECT ?", (Wild(),)).rows) == [("text",)]
    assert len(threads) == 2
    assert threads[0] is threading.current_thread()


@pytest.mark.parametrize(
    ("kind", "value", "stored"),
    [
        (str, "a", "<a>"),
        (int, 1, "<1>"),
        (float, 1.5, "<1.5>"),
        (bytes, b"b", "<b'b'>"),
        (bool, True, "<True>"),
        (type(None), None, "<None>"),
        (bytearray, bytearray(b"c"), "<bytearray(b'c')>"),
    ],
)
def test_an_adapter_of_a_plain_type_is_asked_once(db: DbWriter, kind: type, value: Any, stored: str) -> None:
    [before] = plainly("SELECT typeof(?)", (value,))
    sqlite3.register_adapter(kind, lambda found: f"<{found}>")
    assert plainly("SELECT ?", (value,)) == [(stored,)]
    assert db.run("SELECT ?", (value,)).rows == [(stored,)]
    assert db.run("SELECT :a", {"a": value}).rows == [(stored,)]
    assert db.read_value("SELECT ?", (value,)) == stored
    del sqlite3.adapters[kind, PROTOCOL]
    assert db.read_one("SELECT typeof(?)", (value,)) == before


def test_what_an_adapter_gave_is_not_adapted_again(db: DbWriter) -> None:
    sqlite3.register_adapter(dict, json.dumps)
    sqlite3.register_adapter(str, str.upper)
    sqlite3.register_adapter(bytes, lambda value: b"adapted")
    row = ({"a": 1}, "b", bytearray(b"c"), Name("d"))
    expected = plainly("SELECT ?, ?, ?, ?", row)
    assert expected == [('{"a": 1}', "B", b"c", "d")]
    assert db.run("SELECT ?, ?, ?, ?", row).rows == expected
    assert db.read("SELECT ?, ?, ?, ?", row) == expected


def test_an_error_of_an_adapter_comes_at_the_call(db: DbWriter) -> None:
    def fail(wild: Wild) -> str:
        raise LookupError("no text")

    sqlite3.register_adapter(Wild, fail)
    for values in ((Wild(),), {"a": Wild()}):
        with pytest.raises(LookupError, match="no text"):
            db.enqueue("SELECT :a", values)


@pytest.mark.parametrize("value", [Wild(), memoryview(bytearray(4))[::2], 1j])
def test_what_cannot_be_bound_is_refused_at_the_call_as_sqlite3_does(db: DbWriter, value: Any) -> None:
    with pytest.raises((sqlite3.ProgrammingError, BufferError)) as expected:
        plainly("SELECT ?, ?", (1, value))
    for refused in (
        lambda: db.enqueue("SELECT ?, ?", (1, value)),
        lambda: db.enqueue("SELECT :a, :b", {"b": value, "a": 1}),
        lambda: db.read("SELECT ?, ?", (1, value)),
    ):
        with pytest.raises(expected.type) as found:
            refused()
        assert str(found.value) == str(expected.value)


@pytest.mark.parametrize(
    "value", [Colour.RED, Name("n"), True, type("Bytes", (bytes,), {})(b"b"), type("Real", (float,), {})(2.5)]
)
def test_subclasses_of_plain_types_are_what_sqlite3_makes_of_them(db: DbWriter, value: Any) -> None:
    expected = plainly("SELECT a, typeof(a) FROM (SELECT ? AS a)", (value,))
    assert db.run("SELECT a, typeof(a) FROM (SELECT ? AS a)", (value,)).rows == expected


class Computed(dict[str, Any]):
    def __getitem__(self, name: str) -> Any:
        return bytearray(name.encode())


class Answering(Mapping[str, Any]):
    def __getitem__(self, name: str) -> Any:
        return name.upper()

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def zero() -> Any:
    return 0


def buffer() -> Any:
    return bytearray(b"0")


MAPPINGS: list[tuple[Mapping[str, Any], tuple[Any, Any]]] = [
    (collections.defaultdict(zero, a=1), (1, 0)),
    (collections.defaultdict(zero, a=bytearray(b"1")), (b"1", 0)),
    (collections.defaultdict(buffer, a=1), (1, b"0")),
    (collections.ChainMap[str, Any]({"a": 1}, {"a": 2, "b": bytearray(b"3")}), (1, b"3")),
    (types.MappingProxyType({"a": 1, "b": Colour.RED}), (1, 7)),
    (Computed(), (b"a", b"b")),
    (Answering(), ("A", "B")),
    ({"a": 1, "b": bytearray(b"2"), "unasked": Wild()}, (1, b"2")),
]


@pytest.mark.parametrize(("values", "expected"), MAPPINGS, ids=lambda value: type(value).__name__)
def test_a_mapping_gives_what_the_statement_asks_for(db: DbWriter, values: Any, expected: tuple[Any, Any]) -> None:
    sql = "SELECT :a, $b -- :unasked\n, ':unasked'"
    assert db.run(sql, values).rows[0][:2] == expected
    assert db.read_one(sql, values)[:2] == expected
    db.run("CREATE TABLE t (a, b)")
    db.run_many("INSERT INTO t VALUES (:a, @b)", [values])
    assert db.read("SELECT a, b FROM t") == [expected]


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT :a, @b, $c",
        "SELECT :a::b, $c(xy), $c::d(x)",
        "SELECT ?1, ?2",
        "SELECT 1 AS a$b, :a$b",
        "SELECT ':no', [:no], \":no\", `:no`, :yes /* :no */ FROM (SELECT 1 AS `:no`) -- :no",
        "SELECT :été, :a1, 'it''s :no' || :b",
    ],
)
def test_names_are_those_that_sqlite_finds(sql: str) -> None:
    asked: list[str] = []

    class Asked(dict[str, Any]):
        def __getitem__(self, name: str) -> None:
            asked.append(name)

    plainly(sql, Asked())
    expected, asked = asked, []
    capture(sql, Asked())
    assert asked == expected
    assert asked


def test_a_name_that_a_mapping_lacks_is_sqlite3s_own_error(db: DbWriter) -> None:
    lacking: list[Mapping[str, Any]] = [{}, {"b": bytearray(b"1")}, collections.ChainMap({})]
    for values in lacking:
        with pytest.raises(sqlite3.ProgrammingError, match="binding parameter"):
            db.run("SELECT :a", values)


def warn(wild: Wild) -> str:
    warnings.warn("old", DeprecationWarning, stacklevel=2)
    return "text"


def here() -> int:
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return frame.f_back.f_lineno


def test_a_warning_of_an_adapter_is_about_the_callers_line(db: DbWriter) -> None:
    sqlite3.register_adapter(Wild, warn)
    db.run("CREATE TABLE t (a)")
    insert, row = "INSERT INTO t VALUES (?)", (Wild(),)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lines = [here() + 1]
        db.run(insert, row)
        lines.append(here() + 1)
        db.run_many(insert, (row for _ in range(1)))
        lines.append(here() + 1)
        db.enqueue(insert, row)
        lines.append(here() + 1)
        db.read("SELECT ?", row)
        with db.transaction() as tx:
            lines.append(here() + 1)
            tx.execute(insert, row)
            lines.append(here() + 1)
            tx.executemany(insert, [row])
    assert [(warning.filename, warning.lineno) for warning in caught] == [(__file__, line) for line in lines]


def test_a_warning_of_an_adapter_that_is_an_error_is_raised_at_the_call(db: DbWriter) -> None:
    sqlite3.register_adapter(Wild, warn)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=DeprecationWarning, module=__name__)
        with pytest.raises(DeprecationWarning, match="old"):
            db.enqueue("SELECT ?", (Wild(),))
    assert db.enqueue("SELECT 1").result(DEADLINE).rows == [(1,)]


def test_the_default_adapters_of_dates_warn_of_the_callers_line(db: DbWriter) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        line = here() + 1
        ticket = db.enqueue("SELECT ?", (datetime.date(2020, 1, 2),))
    deprecated = sys.version_info >= (3, 12)
    assert [(warning.filename, warning.lineno) for warning in caught] == [(__file__, line)] * deprecated
    assert ticket.result(DEADLINE).rows == [("2020-01-02",)]


def test_plain_parameters_are_handed_on_as_they_are() -> None:
    row = (1, "a", 2.5, b"b", None, True)
    assert capture("SELECT ?", row) is row


def test_a_queued_job_keeps_no_more_of_its_caller_than_the_parameters(db: DbWriter) -> None:
    def call() -> None:
        event = Event("text")
        events.append(id(event))
        db.enqueue("SELECT ?", (event,))

    events: list[int] = []
    with parked(db):
        call()
        gc.collect()
        assert not [found for found in gc.get_objects() if type(found) is Event and id(found) in events]


def test_numbers_and_arrays_of_numpy_are_what_sqlite3_makes_of_them(db: DbWriter) -> None:
    numpy = pytest.importorskip("numpy")
    column = numpy.arange(3)
    row = (numpy.float64(1.5), numpy.int64(3), column, numpy.str_("s"))
    expected = plainly("SELECT ?, ?, ?, ?", row)
    with parked(db):
        ticket = db.enqueue("SELECT ?, ?, ?, ?", row)
        column[0] = 9
    assert ticket.result(DEADLINE).rows == expected
    with pytest.raises(ValueError, match="contiguous"):
        db.enqueue("SELECT ?", (numpy.arange(4)[::2],))


def test_parameters_are_those_of_the_call(path: Any) -> None:
    values, named, buffer, rows = [1], {"n": 2}, bytearray(b"3"), [[4], [5]]
    with DbWriter(path) as names_db:
        names_db.run("CREATE TABLE t (n)")
        with parked(names_db):
            names_db.enqueue("INSERT INTO t VALUES (?)", values)
            names_db.enqueue("INSERT INTO t VALUES (:n)", named)
            names_db.enqueue("INSERT INTO t VALUES (?)", (buffer,))
            names_db.enqueue("INSERT INTO t VALUES (:n)", {"n": buffer})
            values[0], named["n"], buffer[0] = 9, 9, ord("9")
        names_db.run_many("INSERT INTO t VALUES (?)", rows)
        assert [n for (n,) in names_db.read("SELECT n FROM t")] == [1, 2, b"3", b"3", 4, 5]


class Row:
    """A sequence of its own making, as sqlite3 accepts it."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        return 6 + index  # of any


@pytest.mark.parametrize(
    "params", [(6,), [6], range(6, 7), {"1": 6}.values(), Row()], ids=lambda params: type(params).__name__
)
def test_parameters_are_any_sequence(names_db: DbWriter, params: Any) -> None:
    assert names_db.run("SELECT ?", params).rows == [(6,)]


class WithoutLength:
    def __getitem__(self, place: int) -> int:
        return (6,)[place]


class WithoutItems:
    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize(
    "params",
    ["a", b"a", bytearray(b"a"), memoryview(b"a"), {1}, frozenset((1,)), 5, None, WithoutLength(), WithoutItems()],
    ids=lambda params: type(params).__name__,
)
def test_what_is_no_row_of_parameters_is_refused(names_db: DbWriter, params: Any) -> None:
    for call in (lambda: names_db.run("SELECT ?", params), lambda: names_db.enqueue("SELECT ?", params)):
        with pytest.raises(TypeError, match="parameters"):
            call()
    with names_db.transaction() as tx, pytest.raises(TypeError, match="parameters"):
        tx.execute("SELECT ?", params)


@pytest.mark.parametrize("rows", ["ab", b"ab", {"a": 1}, 5, None], ids=repr)
def test_what_is_no_iterable_of_rows_is_refused(names_db: DbWriter, rows: Any) -> None:
    with pytest.raises(TypeError, match="seq_of_params"):
        names_db.run_many("SELECT ?", rows)


class Named(Mapping[str, Any]):
    """A mapping that is no dict."""

    def __getitem__(self, key: str) -> Any:
        return {"a": 1, "b": b"2"}[key]

    def __iter__(self) -> Iterator[str]:
        return iter("ab")

    def __len__(self) -> int:
        return 2


def test_named_parameters_come_from_any_mapping(names_db: DbWriter) -> None:
    assert names_db.run("SELECT :a, @b, $a", Named()).rows == [(1, b"2", 1)]
    assert names_db.run("SELECT :a", {"a": 1, "unused": object()}).rows == [(1,)]
    assert names_db.read("SELECT :a, :b", Named()) == [(1, b"2")]
    with pytest.raises(sqlite3.ProgrammingError, match="binding"):
        names_db.run("SELECT :missing", {"a": 1})


def test_a_generator_of_parameters_is_consumed_at_the_call_in_the_callers_thread(path: Path) -> None:
    threads: list[int] = []

    def values() -> Iterator[str]:
        threads.append(threading.get_ident())
        yield "c"

    with DbWriter(path) as names_db:
        names_db.run_script(CREATE)
        with parked(names_db):
            names_db.enqueue(INSERT, values())  # type: ignore[call-overload]
            assert threads == [threading.get_ident()]
        names_db.flush(DEADLINE)
        assert names(names_db) == ["a", "b", "c"]


def test_buffers_of_every_kind_are_those_of_the_call(path: Path) -> None:
    class Buffer(bytearray):
        pass

    buffer, numbers, own = bytearray(b"1"), array.array("B", b"2"), Buffer(b"3")
    with DbWriter(path) as names_db:
        names_db.run("CREATE TABLE t (a, b, c, d)")
        with parked(names_db):
            ticket = names_db.enqueue(
                "INSERT INTO t VALUES (?, ?, ?, ?) RETURNING a, b, c, d", [buffer, numbers, memoryview(buffer), own]
            )
            buffer[0] = numbers[0] = own[0] = ord("9")
        assert ticket.result(DEADLINE).rows == [(b"1", b"2", b"1", b"3")]


def test_rows_of_run_many_are_those_of_the_call(path: Path) -> None:
    """They are changed after the last one was asked for, while the job waits."""
    listed, named, buffer, asked = ["c"], {"1": "d"}, bytearray(b"e"), threading.Event()

    def rows() -> Iterator[Any]:
        yield listed
        yield tuple(named.values())
        yield [buffer]
        asked.set()

    with DbWriter(path) as names_db, ThreadPoolExecutor() as pool:
        names_db.run_script(CREATE)
        with parked(names_db):
            call = pool.submit(names_db.run_many, INSERT, rows(), timeout=DEADLINE)
            assert asked.wait(DEADLINE)
            listed[0] = named["1"] = "z"
            buffer[0] = ord("z")
        assert call.result(DEADLINE).rowcount == 3
        assert names(names_db) == ["a", "b", "c", "d", b"e"]


def test_a_generator_of_rows_that_fails_fails_the_call_and_nothing_is_accepted(names_db: DbWriter) -> None:
    def rows() -> Iterator[tuple[str]]:
        yield ("c",)
        raise LookupError("midway")

    before = names_db.stats().committed
    with pytest.raises(LookupError, match="midway"):
        names_db.run_many(INSERT, rows())
    assert (names_db.stats().committed, names_db.stats().failed) == (before, 0)

    def job(tx: Transaction) -> None:
        with pytest.raises(LookupError, match="midway"):
            tx.executemany(INSERT, rows())

    names_db.run(job)
    assert names(names_db) == ["a", "b"]


@pytest.mark.parametrize("row", ["x", b"x", {"x"}, 5, None], ids=repr)
def test_one_row_that_is_no_row_fails_the_call_of_run_many(names_db: DbWriter, row: Any) -> None:
    with pytest.raises(TypeError, match="parameters"):
        names_db.run_many(INSERT, [("c",), row])
    with names_db.transaction() as tx, pytest.raises(TypeError, match="parameters"):
        tx.executemany(INSERT, [("c",), row])
    assert names(names_db) == ["a", "b"]


def test_rows_of_run_many_may_come_from_a_map_or_a_zip(names_db: DbWriter) -> None:
    assert names_db.run_many(INSERT, map(lambda name: [name], "cd")).rowcount == 2
    assert names_db.run_many("INSERT INTO t VALUES (?, ?)", zip((50, 51), "ef", strict=True)).rowcount == 2
    assert names(names_db) == list("abcdef")


def test_a_type_checker_refuses_a_str_where_values_are_wanted(any_db: DbWriter) -> None:
    any_db.run("CREATE TABLE t (n)")
    calls: list[Callable[[], object]] = [
        lambda: any_db.run("INSERT INTO t VALUES (?)", "a"),  # type: ignore[call-overload]
        lambda: any_db.run("INSERT INTO t VALUES (?)", b"a"),  # type: ignore[call-overload]
        lambda: any_db.run_many("INSERT INTO t VALUES (?)", ["a"]),  # type: ignore[list-item]
        lambda: any_db.read_one("SELECT ?", "a"),  # type: ignore[arg-type]
        lambda: any_db.read_value("SELECT ?", "a"),  # type: ignore[arg-type]
        lambda: any_db.run(lambda tx: tx.execute("SELECT ?", "a")),  # type: ignore[arg-type]
        lambda: any_db.watch("SELECT ?", "a"),  # type: ignore[call-overload]
    ]
    for call in calls:
        with pytest.raises(TypeError):
            call()
    named: dict[str, object] = {"n": 1}
    given: tuple[Params, ...] = ((1,), [1], collections.deque([1]), named, range(1, 2))
    for params in given:
        assert any_db.run("INSERT INTO t VALUES (:n)" if params is named else "INSERT INTO t VALUES (?)", params)
    assert any_db.read("SELECT n FROM t") == [(1,)] * 5


def test_an_adapter_for_a_plain_type_holds_from_the_first_call_on() -> None:
    assert capture("SELECT ?", (1,)) == (1,)
    sqlite3.register_adapter(int, str)
    assert capture("SELECT ?", (1,)) == ("1",)
