"""What a lock guards is changed only while it is held: looked up in the source, since a lost race is seldom seen."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import onewriter

SOURCE = Path(onewriter.__file__).parent
CHANGING = {"add", "append", "clear", "discard", "pop", "popleft", "put", "remove"}


class Guard(NamedTuple):
    """``lock`` guards ``names``; ``also_read``: even to look at them. ``held``: functions that are called with it."""

    file: str
    lock: str
    names: set[str]
    also_read: bool = False
    held: frozenset[str] = frozenset()
    free: frozenset[str] = (
        frozenset()
    )  # functions that need no lock: nobody else knows the object, or reads in one step


GUARDS = [
    *(
        Guard(file, "lock", {"_stage", "_waiters", "_callbacks"}, free=frozenset(free))
        for file, free in {
            "write/ticket.py": ["__init__", "expect_outcome"],
            "write/jobs.py": ["__init__"],
            "write/batch.py": [],
            "write/block.py": ["__init__"],
            "tasks/block.py": ["__init__"],
        }.items()
    ),
    Guard("write/outcomes.py", "lock", {"_stage", "_waiters", "_callbacks"}, held=frozenset(("_resolve",))),
    *(
        Guard(file, "lock", {"tally"}, also_read=True, free=frozenset(free))
        for file, free in {
            "write/ticket.py": [],
            "write/outcomes.py": ["_is_unheard", "_resolve"],
            "write/writer.py": [],
            "base/state.py": [],
            "core.py": ["back_up"],
            "ends/exit.py": ["_drain"],
        }.items()
    ),
    Guard("base/state.py", "lock", {"_warned_of"}, free=frozenset(("__init__",))),
    Guard(
        "write/queue.py",
        "mutex",
        {
            "queue",
            "_aside",
            "_asleep",
            "_bounded",
            "_limit",
            "_refusal",
            "_room",
            "_withdrawn",
            "ender",
            "guest",
            "is_handed_over",
            "is_nearly_full",
        },
        held=frozenset(
            (
                "_append",
                "_end_turn",
                "_has_become_nearly_full",
                "_made_room",
                "_pop",
                "_put_back",
                "_tell_refused",
                "_tidy",
                "_wake",
            )
        ),
        free=frozenset(("__init__", "after_fork_in_child")),
    ),
    *(
        Guard(
            file,
            "_lock",
            {
                "_closed",
                "_count",
                "_door",
                "_idle",
                "_is_watched",
                "_line",
                "_most",
                "_on_all_back",
                "_opening",
                "_paused_until",
                "_pausing",
                "_readers",
            },
            held=frozenset(("_end_pause", "_interrupt", "_serve")),
            # ``use`` gives one back in one step, and looks afterwards whether somebody waits for it.
            free=frozenset(("__init__", "after_fork_in_child", "use")),
        )
        for file in ("read/places.py", "read/pool.py")
    ),
    Guard(
        "read/clock.py",
        "lock",
        {"deadline", "is_named", "rings_at", "_thread"},
        held=frozenset(("_look",)),
        free=frozenset(("__init__", "turn_off")),
    ),
    Guard("read/reader.py", "_lock", {"lent"}, also_read=True, free=frozenset(("__init__",))),
    Guard(
        "live/hub.py",
        "lock",
        {
            "_all_changed",
            "_asleep",
            "_changed",
            "_commits",
            "_queries",
            "answer",
            "as_of",
            "begun",
            "is_over",
            "known",
            "read_by",
            "waiters",
            "watches",
        },
        held=frozenset(("_is_awake", "_keep", "_make_last_readings", "_waiters_of", "_woken", "begin", "sleep")),
        free=frozenset(("__init__",)),
    ),
    Guard(
        "live/watch.py",
        "lock",
        {"_is_left", "_last", "_looked_at", "_number", "_query", "waiters"},
        held=frozenset(("begin", "sleep")),
        free=frozenset(("__init__",)),
    ),
    Guard("aio.py", "_lock", {"_is_closed", "_reads"}, free=frozenset(("_prepare",))),
    Guard(
        "tasks/threads.py",
        "lock",
        {"threads", "idle", "calls", "is_over"},
        held=frozenset(("_end_all", "_put")),
        free=frozenset(("__init__",)),
    ),
    Guard("tasks/block.py", "_lock", {"_accepts"}, also_read=True, free=frozenset(("__init__", "needs"))),
    Guard("tasks/calls.py", "_lock", {"_line", "_owner"}, held=frozenset(("_next",)), free=frozenset(("__init__",))),
    Guard("tasks/block.py", "_lock", {"_changes"}, also_read=True, free=frozenset(("__init__",))),
    Guard("tasks/block.py", "_lock", {"_is_kept", "failed", "innermost"}, free=frozenset(("__init__",))),
]


def name_of(node: ast.AST) -> str:
    """``c`` of ``a.b.c`` and of ``c``."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def touched(node: ast.AST, guard: Guard) -> bool:
    """Whether this node is an access that needs the lock."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr in guard.held:
            return True
        return node.func.attr in CHANGING and name_of(node.func.value) in guard.names
    if guard.names == {"tally"}:  # its attributes: a name for all of it changes nothing
        return isinstance(node, ast.Attribute) and name_of(node.value) == "tally"
    if isinstance(node, ast.Attribute | ast.Name) and name_of(node) in guard.names:
        return guard.also_read or not isinstance(node.ctx, ast.Load)
    return False


def unguarded(node: ast.AST, guard: Guard, function: str = "", held: bool = False) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        function, held = node.name, node.name in guard.held | guard.free
    elif isinstance(node, ast.With):
        held = held or any(name_of(item.context_expr) == guard.lock for item in node.items)
    if function and not held and touched(node, guard):
        yield f"{guard.file}:{getattr(node, 'lineno', 0)} in {function}: {ast.unparse(node)}"
    for child in ast.iter_child_nodes(node):
        yield from unguarded(child, guard, function, held)


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: f"{guard.file}-{min(guard.names)}")
def test_what_a_lock_guards_is_changed_only_while_it_is_held(guard: Guard) -> None:
    tree = ast.parse((SOURCE / guard.file).read_text(encoding="utf-8"))
    assert list(unguarded(tree, guard)) == []
    assert any(touched(node, guard) for node in ast.walk(tree))


def test_the_search_finds_what_is_not_guarded() -> None:
    source = """
def good(self):
    with self._lock:
        self._open.pop(1)

def bad(self):
    self._open.pop(1)
    with self.other:
        self._open = 2
"""
    guard = Guard("-", "_lock", {"_open"})
    found = list(unguarded(ast.parse(source), guard))
    assert found == ["-:7 in bad: self._open.pop(1)", "-:9 in bad: self._open"]
