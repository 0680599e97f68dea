"""Rules of the source: what a file may import, how large it may be, what is done in one place; the public names."""

from __future__ import annotations

import ast
import functools
import io
import re
import tokenize
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any, assert_type

import pytest

import onewriter
from onewriter import DbWriter, Result, Ticket, Transaction

SOURCE = Path(onewriter.__file__).parent
FILES = {path.relative_to(SOURCE).as_posix(): path.read_text(encoding="utf-8") for path in sorted(SOURCE.rglob("*.py"))}
PROGRAMS = {name for name in FILES if name.startswith("tools/")}
TREES = {name: ast.parse(text) for name, text in FILES.items()}
ROOT = Path(__file__).parents[2]
PAGES = ("architecture", "locks", "contributing")
ARCHITECTURE = "\n".join((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8") for page in PAGES)

# From low to high: a file imports lower floors, and its own folder.
FLOORS = (
    *("errors.py", "base", "sqlite", "events.py", "write", "read", "live", "tasks", "ends", "options.py", "core.py"),
    *("gateway.py", "aio.py", "sqlalchemy.py", "tools", "testing.py", "__main__.py __init__.py"),
)
FACES = ("aio.py", "gateway.py")
LARGEST_FILE, LARGEST_CLASS, LARGEST_FUNCTION = 340, 300, 40  # lines of code
LARGEST_FACE, LARGEST_CLASS_OF_A_FACE = 440, 400


def files_with(pattern: str) -> set[str]:
    return {name for name, text in FILES.items() if re.search(pattern, text)} - PROGRAMS


def test_the_public_names_are_these() -> None:
    expected = [
        "AsyncDbWriter",
        "AsyncReader",
        "AsyncTransaction",
        "AsyncWatch",
        "Checkpoint",
        "CheckpointResult",
        "CloseReport",
        "CommitUnknownError",
        "DbWriter",
        "ForkedError",
        "Latency",
        "Running",
        "Timings",
        "OneWriterError",
        "QueueFullError",
        "ReadTimeoutError",
        "ReentrantWriteError",
        "Result",
        "Stats",
        "Ticket",
        "Transaction",
        "TransactionAbortedError",
        "TransactionClosedError",
        "Watch",
        "WriteTimeoutError",
        "WriterBrokenError",
        "WriterClosedError",
        "__version__",
    ]
    assert sorted(onewriter.__all__) == sorted(expected)
    assert all(hasattr(onewriter, name) for name in expected)


def test_dir_shows_the_public_names_alone() -> None:
    assert dir(onewriter) == sorted(onewriter.__all__)


OWN_CLASSES = {node.name for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
FOR_OURSELVES = {"lends"}  # methods that have a public name and are no part of the interface


def types_given_by(name: str) -> set[str]:
    """The classes of this package that the attributes and methods of a public one give."""
    members = vars(getattr(onewriter, name, object))
    said = list(members.get("__annotations__", {}).values())
    for member_name, member in members.items():
        if not member_name.startswith("_") and member_name not in FOR_OURSELVES:
            said.append(getattr(getattr(member, "fget", member), "__annotations__", {}).get("return", ""))
    return set(re.findall(r"[A-Z]\w+", " ".join(map(str, said)))) & OWN_CLASSES


def test_every_type_that_a_public_call_returns_is_public() -> None:
    found, new = set[str](), {"DbWriter", "AsyncDbWriter"}
    while new:
        found |= new
        new = set().union(*map(types_given_by, new)) - found
    assert {"Checkpoint", "Latency", "Timings", "AsyncReader", "Result"} <= found
    assert found <= set(onewriter.__all__)


def test_the_version_is_that_of_the_distribution() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^version = "(.+)"$', text, re.MULTILINE)[1] == onewriter.__version__  # type: ignore[index]


def test_every_error_is_one_of_the_packages_and_says_what_became_of_the_write() -> None:
    errors = [getattr(onewriter, name) for name in onewriter.__all__ if name.endswith("Error")]
    assert all(issubclass(error, onewriter.OneWriterError) and error.__doc__ for error in errors)
    assert issubclass(onewriter.WriteTimeoutError, TimeoutError)
    assert issubclass(onewriter.ReadTimeoutError, TimeoutError)


RULES = re.findall(r"^- The only `(.+?)`: (.+)$", ARCHITECTURE, re.MULTILINE)


@pytest.mark.parametrize(("text", "places"), RULES, ids=[text for text, _ in RULES])
def test_there_is_one_place_for_it(text: str, places: str) -> None:
    assert files_with(rf"(?<!\w){re.escape(text)}") == set(re.findall(r"`([\w/]+\.py)`", places))


def test_the_architecture_page_has_the_rules() -> None:
    assert len(RULES) == 12
    assert files_with(r"from tenacity|\bdatetime\b|open\(self\._?path") == set()


def module_of(name: str) -> str:
    """``onewriter.write.queue`` for ``write/queue.py``; a package for its ``__init__.py``."""
    return f"onewriter/{name.removesuffix('.py').removesuffix('__init__')}".rstrip("/").replace("/", ".")


MODULES = {module_of(name): name for name in FILES}


def imported_by(tree: ast.AST) -> set[str]:
    """The files of the package that it imports, wherever in it the statement is."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            module = node.module or ""
            found |= {
                MODULES.get(f"{module}.{alias.name}") or MODULES.get(module)  # a file of a package, or a name of a file
                for alias in node.names
            }
        elif isinstance(node, ast.Import):
            found |= {MODULES.get(alias.name) for alias in node.names}
    return {name for name in found if name is not None}


IMPORTS = {name: imported_by(tree) for name, tree in TREES.items()}


def floor_of(name: str) -> int:
    folder = name.partition("/")[0]
    return next(number for number, floor in enumerate(FLOORS) if folder in floor.split())


def upward(name: str, imports: Set[str]) -> set[str]:
    """Those of ``imports`` that are not below ``name``, nor beside it in a folder."""
    folder, _, file = name.partition("/")
    floor = floor_of(name)
    return {
        other
        for other in imports
        if floor_of(other) > floor or (floor_of(other) == floor and not (file and other.startswith(f"{folder}/")))
    }


def circles(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """What is left of a graph when all that leads into no circle is taken away."""
    left = graph
    while free := {name for name, needs in left.items() if not needs & left.keys()}:
        left = {name: needs for name, needs in left.items() if name not in free}
    return left


def test_every_file_has_a_floor() -> None:
    assert {name.partition("/")[0] for name in FILES} == {part for floor in FLOORS for part in floor.split()}


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_lower_floors_only(name: str) -> None:
    """Also for annotations, and also inside a function."""
    assert upward(name, IMPORTS[name]) == set()


def test_imports_point_one_way() -> None:
    assert circles(IMPORTS) == {}


def test_no_import_is_for_annotations_only() -> None:
    assert {name for name, text in FILES.items() if "TYPE_CHECKING" in text} == set()


def test_what_points_upward_and_what_is_a_circle_is_found() -> None:
    source = """
def late():
    from onewriter.ends import exit as at_exit
    import onewriter.base.state
    from onewriter import DbWriter
"""
    assert imported_by(ast.parse(source)) == {"ends/exit.py", "base/state.py", "__init__.py"}
    assert upward("write/queue.py", {"base/log.py", "write/ticket.py", "read/pool.py"}) == {"read/pool.py"}
    assert upward("gateway.py", {"aio.py", "core.py"}) == {"aio.py"}
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}).keys() == {"a", "b", "c"}


def code_lines(text: str) -> set[int]:
    """The numbers of the lines that are neither blank, comment nor docstring."""
    blank = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in blank:
            code.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            code.difference_update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return code


def sizes_of(name: str, text: str) -> Iterator[tuple[str, int, int]]:
    """Its files, classes and functions: lines of code, and how many there may be."""
    code, is_face = code_lines(text), name in FACES

    def inner(node: ast.AST, path: str) -> Iterator[tuple[str, int, int]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                size = len(code.intersection(range(child.lineno, (child.end_lineno or 0) + 1)))
                most = LARGEST_FUNCTION
                if not isinstance(child, ast.ClassDef):  # its signature is as long as what may be said
                    size -= len(code.intersection(range(child.lineno, child.body[0].lineno)))
                else:
                    most = LARGEST_CLASS_OF_A_FACE if is_face else LARGEST_CLASS
                yield f"{name} {path}{child.name}", size, most
                yield from inner(child, f"{path}{child.name}.")
            else:
                yield from inner(child, path)

    yield name, len(code), LARGEST_FACE if is_face else LARGEST_FILE
    yield from inner(ast.parse(text), "")


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_too_large(name: str) -> None:
    found = {what: size for what, size, most in sizes_of(name, FILES[name]) if size > most}
    assert found == {}


def test_lines_of_code_are_counted_without_docstrings_and_comments() -> None:
    source = '''"""Doc."""

class Box:
    """Of
    three lines.
    """

    size = 1  # a comment

    # Another.
    async def open(self):
        """Doc."""
        text = """
        not a docstring"""
        return text
'''
    assert dict((what, size) for what, size, _ in sizes_of("x.py", source)) == {
        "x.py": 6,
        "x.py Box": 6,
        "x.py Box.open": 3,  # but for its signature
    }


def private_reach(tree: ast.AST) -> list[str]:
    """Each ``x._y`` that is not ``self._y`` or ``cls._y``; ``sys._getframe`` is public in all but its name."""
    return [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and re.match(r"_(?!_)", node.attr)
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "sys"))
    ]


@pytest.mark.parametrize("name", FACES)
def test_a_face_touches_nobodys_private_names(name: str) -> None:
    found = private_reach(TREES[name])
    assert found == []


def test_reach_for_private_names_is_found() -> None:
    source = "self._a, cls._b, sys._getframe(1), self._db._c, db._d(), x.__dict__"
    assert private_reach(ast.parse(source)) == ["self._db._c", "db._d"]


def test_the_files_that_the_architecture_page_names_are_there() -> None:
    named = re.findall(r"`((?:base|sqlite|write|read|live|tasks|ends|tools)/\w+\.py)`", ARCHITECTURE)
    assert named
    assert set(named) - FILES.keys() == set()


LOCK_ROWS = re.findall(r"^\| `([\w/]+\.py)`: ((?:`\w+`(?:, )?)+) \|", ARCHITECTURE, re.MULTILINE)
LOCK_KINDS = {"Lock", "RLock", "Condition", "Semaphore", "BoundedSemaphore", "allocate_lock"}


def locks_made(tree: ast.AST) -> set[str]:
    """The names, in the first of its targets, of what each lock that is made there is assigned to; "?": to nothing."""
    made = {node for node in ast.walk(tree) if isinstance(node, ast.Call) and last_name(node.func) in LOCK_KINDS}
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=True))
            for left, value in pairs:
                if value in made:
                    names.add(last_name(left))
                    made.discard(value)
    return names | ({"?"} if made else set())


def last_name(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else "?"


def test_the_table_of_locks_has_every_lock() -> None:
    told = {(file, name) for file, names in LOCK_ROWS for name in re.findall(r"\w+", names)}
    assert {(file, name) for file in FILES.keys() - PROGRAMS for name in locks_made(TREES[file])} == told


def test_locks_are_found_wherever_they_are_made() -> None:
    source = """
class A:
    turn: asyncio.Lock = asyncio.Lock()
    def __init__(self):
        self.one = self.other.lock = threading.RLock()
        self.two, count, self.three = Lock(), 1, threading.Condition()
"""
    assert locks_made(ast.parse(source)) == {"turn", "one", "two", "three"}
    assert locks_made(ast.parse("use(threading.Lock())")) == {"?"}


@functools.cache
def all_locks() -> set[str]:
    return {lock for tree in TREES.values() for lock in locks_made(tree)} | {"lock", "mutex"}


def loops_under_locks(tree: ast.AST, locks: Set[str]) -> list[int]:
    """The lines of the loops that are directly in the body of a ``with`` on one of ``locks``."""
    loops = (ast.For, ast.While, ast.ListComp, ast.SetComp, ast.DictComp)

    def inside(node: ast.AST) -> Iterator[int]:
        if isinstance(node, loops):
            yield node.lineno
        if not isinstance(node, ast.FunctionDef | ast.Lambda):
            for child in ast.iter_child_nodes(node):
                yield from inside(child)

    return [
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.With) and locks & {last_name(item.context_expr) for item in node.items}
        for statement in node.body
        for line in inside(statement)
    ]


@pytest.mark.parametrize("name", sorted(FILES.keys() - PROGRAMS))
def test_a_loop_under_a_lock_is_a_function_of_its_own(name: str) -> None:
    """In CPython 3.12 and 3.13, what a signal handler raises as a loop jumps back goes past a ``with`` around it."""
    assert loops_under_locks(TREES[name], all_locks()) == []


def test_loops_under_locks_are_found() -> None:
    source = """
with self.lock, other:
    while True: pass
    names = [name for name in names]
    def later():
        for name in names: pass
with file:
    for line in file: pass
"""
    assert loops_under_locks(ast.parse(source), {"lock"}) == [3, 4]


def test_every_file_says_what_it_is() -> None:
    assert all(ast.get_docstring(ast.parse(text)) for text in FILES.values())


def test_types_follow_the_function(any_db: DbWriter) -> None:
    def length(tx: Transaction) -> int:
        return 3

    assert_type(any_db.run(length), int)
    assert_type(any_db.run("SELECT 1"), Result)
    assert_type(any_db.enqueue(length), Ticket[int])
    assert_type(any_db.enqueue("SELECT 1"), Ticket[Result])
    assert_type(any_db.enqueue(length).result(), int)
    assert_type(any_db.read("SELECT 1"), list[Any])
    assert_type(any_db.read(lambda connection: str(connection.total_changes)), str)
