"""A job knows the line of its call."""

from __future__ import annotations

import _thread
import gc
import inspect
import itertools
import re
import sys
import tracemalloc
import types
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from helpers import DEADLINE, eventually, in_threads, parked
from onewriter import AsyncDbWriter, DbWriter
from onewriter.base.call_site import call_of_pool

WORKER = """
def worker(call):
    return call()
"""


def test_many_call_sites_of_one_long_function_are_named_without_reading_it_anew_for_each(path: Path) -> None:
    calls = 5000
    source = "\n".join(["tickets = []", *["tickets.append(db.enqueue('SELECT 1'))"] * calls])
    with DbWriter(path, maxsize=calls, slow_after=60) as db, parked(db) as release:
        names: dict[str, Any] = {"db": db}
        exec(compile(source, "long.py", "exec"), names)
        places = [ticket.called_from for ticket in names["tickets"]]
        assert places == [f"long.py:{line} in <module>" for line in range(2, calls + 2)]
        release.set()


def memory_of_jobs(db: DbWriter, before: str) -> float:
    """Bytes for each job that waits, whose call is behind the code ``before`` in its function."""
    source = f"{before}\nfor _ in range(1000): tickets.append(db.enqueue('SELECT 1'))"
    names: dict[str, Any] = {"db": db, "tickets": []}
    code = compile(source, "long.py", "exec")
    tracemalloc.start()
    try:
        exec(code, names)
        return tracemalloc.get_traced_memory()[0] / 1000
    finally:
        tracemalloc.stop()


def test_the_jobs_of_a_line_far_down_in_a_long_function_take_no_more_memory(path: Path) -> None:
    with DbWriter(path, maxsize=5000, slow_after=60) as db, parked(db) as release:
        near, far = memory_of_jobs(db, ""), memory_of_jobs(db, "x = 1\n" * 500)
        assert far == pytest.approx(near, abs=10)
        release.set()


def test_called_from_names_the_line_of_the_call(db: DbWriter) -> None:
    ticket = db.enqueue("SELECT 1")
    line = test_called_from_names_the_line_of_the_call.__code__.co_firstlineno + 1
    assert ticket.called_from == f"test_call_site.py:{line} in test_called_from_names_the_line_of_the_call"


def in_a_worker_of(module: str) -> object | None:
    """What a piece of work finds that a pool's worker calls."""
    names: dict[str, Any] = {"__name__": module}
    exec(WORKER, names)
    found: object | None = names["worker"](lambda: call_of_pool())
    return found


def test_the_call_of_a_pool_is_found_in_its_threads_and_in_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of a pool works in its main thread; any other main thread is no worker's."""
    assert in_threads(lambda: in_a_worker_of("multiprocessing.pool") is not None) == [True]
    monkeypatch.setitem(sys.modules, "multiprocessing.pool", types.ModuleType("multiprocessing.pool"))
    assert in_a_worker_of("multiprocessing.pool") is not None
    monkeypatch.delitem(sys.modules, "multiprocessing.pool")
    assert in_a_worker_of("multiprocessing.pool") is None


def test_to_look_for_the_work_of_a_pool_keeps_nothing_of_it_alive() -> None:
    """The pool takes care that a failed one is not kept by its own error."""

    def fails() -> None:
        call_of_pool()
        raise LookupError

    with ThreadPoolExecutor(1) as pool:
        gc.disable()
        try:
            future = pool.submit(fails)
            kept = weakref.ref(future)
            assert isinstance(future.exception(DEADLINE), LookupError)
            del future
            eventually(lambda: kept() is None)
        finally:
            gc.enable()


INSERT = "INSERT INTO t VALUES (?)"
CALLS: dict[str, tuple[Any, ...]] = {
    "run": ("SELECT 1",),
    "run_many": (INSERT, [(1,)]),
    "run_script": ("SELECT 1;",),
    "run_without_transaction": ("SELECT 1",),
    "transaction": (),
    "enqueue": ("SELECT 1",),
    "enqueue_many": (INSERT, [(1,)]),
    "flush": (),
    "migrate": ((),),
    "read": ("SELECT 1",),
    "reader": (),
    "watch": ("SELECT 1",),
    "checkpoint": (),
    "backup": ("backup.db",),
    "stats": (),
    "close": (),
}


def called_by_nobody(method: Any, arguments: tuple[Any, ...]) -> Any:
    """As atexit, a thread of ``_thread`` and a greenlet of gevent call it: with no Python code around the call."""
    found: list[Any] = []
    _thread.start_new_thread(found.extend, (itertools.starmap(method, [arguments]),))
    eventually(lambda: bool(found))
    return found.pop()


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_no_python_code_makes_is_one_like_any_other(db: DbWriter, path: Path, name: str) -> None:
    db.run("CREATE TABLE t (n)")
    arguments = (path.with_name("backup.db"),) if name == "backup" else CALLS[name]
    called_by_nobody(getattr(db, name), arguments)


@pytest.mark.parametrize("name", ["enqueue_wait", *CALLS])
def test_a_tasks_call_that_no_python_code_makes_is_one_like_any_other(path: Path, name: str) -> None:
    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")
        found = called_by_nobody(getattr(AsyncDbWriter.wrap(db), name), CALLS.get(name, ("SELECT 1",)))
        if inspect.iscoroutine(found):
            found.close()


def test_a_job_that_no_python_code_calls_names_the_method(db: DbWriter) -> None:
    with parked(db):
        ticket = called_by_nobody(db.enqueue, ("SELECT 1",))
        assert re.fullmatch(r"gateway\.py:\d+ in enqueue", ticket.called_from)
