"""Which lines of the gateway does no test miss? ``python tests/mutants.py [--minutes N] [--files read/pool.py]``.

Takes out or inverts, one at a time, each guard, lock, ``except``, ``del`` and comparison, runs the fast tests that come
by there, the quickest first, and lists what nothing noticed. ``tests/equal_mutants.txt`` has those that change nothing
that can be seen, with the reason. Which tests come by is found out first, in one run of all; this file is the plugin
of that run. ``--map FOLDER`` keeps what was found out for the next time: what has moved since is found again by its
text, and new tests are named with ``--also``. Needs ``pip install coverage``.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import itertools
import json
import math
import os
import queue
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import pytest

SECONDS: dict[str, float] = {}  # that each test took
ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "onewriter"
EQUAL = ROOT / "tests" / "equal_mutants.txt"
LEFT_OUT = ("tools/", "__main__.py", "testing.py", "sqlalchemy.py")  # or tested by what is not FAST
HANG = 20  # seconds that one test may take
TIMEOUT = 600.0  # seconds for all tests that come by
BEHIND = 3  # lines behind a mutant
FEW = 100  # tests
INVERSE: dict[type[ast.cmpop], str] = {
    ast.Lt: ">=", ast.LtE: ">", ast.Gt: "<=", ast.GtE: "<", ast.Eq: "!=", ast.NotEq: "==",
    ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in",
}  # fmt: skip
PYTEST = ["pytest", "-x", "-q", "-p", "no:cacheprovider", "-o", f"faulthandler_timeout={HANG}"]
COLLECTED = ["collected", str(HANG)]  # tests/collected.py
READERS = ("tests/unit/test_guarded_by.py", "tests/unit/test_rules.py")  # come by no line: they read the source
FAST = ("unit", "acceptance", "property")
# An interpreter that a test starts: coverage has the configuration of the first one, and would not know the test.
IN_CHILDREN = """
import os
import coverage
if (started := coverage.Coverage.current()) is not None and (test := os.environ.get("PYTEST_CURRENT_TEST")):
    started.switch_context(test)
"""
MAP = "MUTANTS_MAP"  # names the folder for what the plugin finds out
COVERAGE = """
[run]
source_pkgs = onewriter
parallel = true
data_file = {folder}/data
patch = subprocess, _exit, fork
"""


@dataclass(frozen=True)
class Mutant:
    file: str
    line: int
    last: int
    what: str
    text: str  # of the whole file

    @property
    def name(self) -> str:
        return f"{self.file}: {self.what}"


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def mutants_of(path: Path) -> Iterator[Mutant]:
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line.encode()))
    data = source.encode()

    tree, named = ast.parse(source), Counter[str]()
    conditions = {node.test for node in ast.walk(tree) if isinstance(node, ast.If | ast.IfExp | ast.While)}

    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]

    def place(line: int, column: int) -> int:
        return starts[line - 1] + column

    def function_of(node: ast.expr) -> str:
        around = [one for one in functions if one.lineno <= node.lineno <= (one.end_lineno or 0)]
        return around[-1].name if around else "the module"

    def mutant(node: ast.expr | ast.stmt, new: str, kind: str) -> Mutant:
        begin = place(node.lineno, node.col_offset)
        end = place(node.end_lineno or 0, node.end_col_offset or 0)
        what = f"{kind} `{' '.join(data[begin:end].decode().split())[:90]}`"
        named[what] += 1
        if named[what] > 1:
            what += f" ({named[what]})"
        text = (data[:begin] + new.encode() + data[end:]).decode()
        return Mutant(path.relative_to(SOURCE).as_posix(), node.lineno, node.end_lineno or 0, what, text)

    for node in ast.walk(tree):
        if isinstance(node, ast.If | ast.IfExp | ast.While):
            if ast.unparse(node.test) not in ("True", "TYPE_CHECKING"):
                yield mutant(node.test, f"(not ({ast.unparse(node.test)}))", "inverted")
        elif isinstance(node, ast.With):
            for item in node.items:
                if re.search(r"(?<![a-z])(lock|mutex)\b", ast.unparse(item.context_expr)):
                    yield mutant(
                        item.context_expr,
                        '__import__("contextlib").nullcontext()',
                        f"no lock in {function_of(item.context_expr)},",
                    )
        elif isinstance(node, ast.ExceptHandler) and node.type is not None:
            yield mutant(node.type, "()", f"no except in {function_of(node.type)},")
        elif isinstance(node, ast.Delete):
            yield mutant(node, "pass", "no del")
        elif isinstance(node, ast.Compare) and len(node.ops) == 1 and node not in conditions:
            sides = ast.unparse(node.left), ast.unparse(node.comparators[0])
            yield mutant(node, f"({sides[0]} {INVERSE[type(node.ops[0])]} {sides[1]})", "inverted")
        elif isinstance(node, ast.BoolOp):
            new = (" or " if isinstance(node.op, ast.And) else " and ").join(f"({ast.unparse(v)})" for v in node.values)
            yield mutant(node, f"({new})", "and for or")


class Tests:
    """Which fast tests come by which line, and how long each takes."""

    def __init__(self, folder: Path, also: list[str], most: float) -> None:
        self._also, self._most = also, most
        self._former = folder / "onewriter"
        known = json.loads((folder / "tests.json").read_text())
        self.seconds: dict[str, float] = known["seconds"]
        self._names = list(self.seconds)
        self._passing: dict[str, dict[str, list[int]]] = known["passing"]

    @classmethod
    def find(cls, tree: Path, folder: Path, also: list[str], most: float) -> Tests:
        """From ``folder``, or by a run of all if it is not there."""
        if not (folder / "tests.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "coveragerc").write_text(COVERAGE.format(folder=folder))
            (folder / "sitecustomize.py").write_text(IN_CHILDREN)
            command = ["coverage", "run", f"--rcfile={folder / 'coveragerc'}", "-m", "pytest", "-q", "-p", "mutants"]
            # A new interpreter for each child: one that is forked from another's would tell of the other's test.
            variables = {
                MAP: str(folder),
                "NEW_INTERPRETERS": "1",
                "PYTHONPATH": os.pathsep.join([str(folder), _path(tree)]),
            }
            _run([*command, *(f"tests/{name}" for name in FAST)], tree, variables, None)
            shutil.copytree(tree / "src" / "onewriter", folder / "onewriter")
            seconds = json.loads((folder / "seconds.json").read_text())
            known = {"seconds": seconds, "passing": cls._read(folder, list(seconds))}
            (folder / "tests.json").write_text(json.dumps(known))
        return cls(folder, also, most)

    @staticmethod
    def _read(folder: Path, tests: list[str]) -> dict[str, dict[int, list[int]]]:
        """Of each file, the lines, and which of ``tests`` come by, as their places in it."""
        passing: dict[str, dict[int, set[int]]] = {}
        places = {name: place for place, name in enumerate(tests)}
        coverage = importlib.import_module("coverage")
        for part in folder.glob("data*"):
            data = coverage.CoverageData(part)
            try:
                data.read()
            except coverage.exceptions.DataError:  # its process was killed while it wrote this
                continue
            for file in data.measured_files():
                lines = passing.setdefault("/".join(Path(file).parts[Path(file).parts.index("onewriter") + 1 :]), {})
                for line, contexts in data.contexts_by_lineno(file).items():
                    names = {re.sub(r" \((setup|call|teardown)\)$", "", context) for context in contexts}
                    lines.setdefault(line, set()).update(places[name] for name in names & places.keys())
            part.unlink()
        return {file: {line: sorted(found) for line, found in lines.items()} for file, lines in passing.items()}

    def _come_by(self, file: str, lines: range) -> Iterator[list[int]]:
        """Who comes by each of these ``lines``, which were elsewhere when the tests were watched."""
        if not (self._former / file).exists():
            return
        former = (self._former / file).read_text(encoding="utf-8").splitlines()
        current = (SOURCE / file).read_text(encoding="utf-8").splitlines()
        passing = self._passing.get(file, {})
        for start, new, size in difflib.SequenceMatcher(None, former, current, autojunk=False).get_matching_blocks():
            for line in lines:
                if new < line <= new + size:
                    yield passing.get(str(line - new + start), [])

    def of(self, mutant: Mutant) -> list[str]:
        """The few that come by just behind it first, as where a condition is true; then the ones of the same name, then
        the quickest of each file; none that could be taken for hanging.
        """
        end = mutant.last + 1
        found = {place for places in self._come_by(mutant.file, range(mutant.line, end)) for place in places}
        behind = [found.intersection(places) for places in self._come_by(mutant.file, range(end, end + BEHIND))]
        if not found:  # the line is new, or nobody comes by
            of_file = self._passing.get(mutant.file, {}).values()
            found = {place for places in of_file for place in places} or set(range(len(self._names)))
        names = {self._names[place] for place in found}
        near = {self._names[place] for places in behind if len(places) < FEW for place in places}
        first = (Path("tests/unit") / mutant.file).with_name(f"test_{Path(mutant.file).name}").as_posix()
        names = {name for name in names if not name.startswith(READERS)}
        names |= {name for name in self.seconds if name.startswith(READERS) and f"[{mutant.file}" in name}
        seen: Counter[str] = Counter()  # of each file of tests; the next of each in turn, for they are alike in one
        ranks: dict[str, int] = {}
        for name in sorted(names, key=lambda name: self.seconds[name]):
            file = name.partition("::")[0]
            ranks[name] = seen[file]
            seen[file] += 1
        ordered = sorted(
            names, key=lambda name: (name not in near, not name.startswith(first), ranks[name], self.seconds[name])
        )
        ordered = [name for name in ordered if self.seconds[name] < HANG / 2]
        sums = list(itertools.accumulate(self.seconds[name] for name in ordered))
        return [*self._also, *(name for name, total in zip(ordered, sums, strict=True) if total <= self._most)]


class Tree:
    """A copy of the repository, in which one mutant at a time is tried."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache"))
        self._collected: subprocess.Popen[str] | None = None

    def __enter__(self) -> Tree:
        return self

    def __exit__(self, *_: object) -> None:
        if self._collected is not None:
            self._collected.communicate()

    def survives(self, mutant: Mutant, tests: list[str]) -> bool:
        target = self.folder / "src" / "onewriter" / mutant.file
        original = target.read_text(encoding="utf-8")
        process = self._collected = self._collected or self._collect()
        _write(target, mutant.text)
        try:
            passed = _ask(process, [str(target), original, mutant.text, tests])
            if passed is None:
                parts = tests[:FEW], tests[FEW:]  # most are noticed by the first
                passed = all(not some or _run([*PYTEST, *some], self.folder, {}, TIMEOUT) for some in parts)
            return passed
        finally:
            _write(target, original)

    def _collect(self) -> subprocess.Popen[str]:
        """What has imported everything before anything is changed."""
        process = _python([*COLLECTED, *PYTEST[1:], *(f"tests/{name}" for name in FAST)], self.folder, {})
        assert process.stdout is not None
        process.stdout.readline()
        return process


def _ask(process: subprocess.Popen[str], request: list[object]) -> bool | None:
    """Whether the tests pass; None if it cannot tell."""
    assert process.stdin is not None
    assert process.stdout is not None
    print(json.dumps(request), file=process.stdin, flush=True)
    answer: bool | None = json.loads(process.stdout.readline())
    return answer


def _write(target: Path, text: str) -> None:
    """Each at a second of its own, by which its bytecode is known from that of the one before."""
    second = int(target.stat().st_mtime) + 1
    target.write_text(text, encoding="utf-8")
    os.utime(target, (second, second))


def _python(module: list[str], tree: Path, variables: dict[str, str]) -> subprocess.Popen[str]:
    """``python -m module`` in ``tree``."""
    always = {"PYTHONPATH": _path(tree), "PYTHONDONTWRITEBYTECODE": ""}
    return subprocess.Popen(
        [sys.executable, "-m", *module],
        cwd=tree,
        env={**os.environ, **always, **variables},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def _path(tree: Path) -> str:
    return f"{tree / 'src'}{os.pathsep}{tree / 'tests'}"


def _run(module: list[str], tree: Path, variables: dict[str, str], timeout: float | None) -> bool:
    """Whether ``python -m module`` is content in ``tree``."""
    with _python(module, tree, variables) as process:
        try:
            process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            return False
        finally:
            try:
                os.killpg(process.pid, 9)
            except ProcessLookupError:
                pass
        return process.returncode == 0


# The plugin -----------------------------------------------------------------------------------------------------------


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    coverage = importlib.import_module("coverage").Coverage.current()
    coverage.switch_context(item.nodeid)
    began, trace = monotonic(), sys.gettrace()
    yield
    SECONDS[item.nodeid] = monotonic() - began
    if sys.gettrace() is not trace:  # the test has taken it away, and nobody would see where the next ones come by
        sys.settrace(trace)


def pytest_unconfigure() -> None:
    (Path(os.environ[MAP]) / "seconds.json").write_text(json.dumps(SECONDS))


# The command ----------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--files", default="", help="comma-separated; default: all")
    parser.add_argument("--seed", type=int, default=1, help="of the order in which they are tried")
    parser.add_argument("--sample", type=int, help="so many of each file, at most; the seed says which")
    parser.add_argument("--workers", type=int, default=2 * (os.cpu_count() or 1), help="many mutants hang")
    parser.add_argument("--only", default="", help="mutants whose name has this in it")
    parser.add_argument("--again", help="file with what a run has printed: those that it calls ALIVE")
    parser.add_argument("--map", default="", help="folder that keeps which tests come by; default: found out anew")
    parser.add_argument("--seconds", type=float, default=math.inf, help="of tests for each, as long as the map's took")
    parser.add_argument("--also", default="", help="comma-separated tests that are run each time, first")
    parser.add_argument("--list", action="store_true", help="only count them")
    arguments = parser.parse_args()
    files = (
        arguments.files.split(",")
        if arguments.files
        else sorted(path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py"))
    )
    mutants = [m for name in files if not name.startswith(LEFT_OUT) for m in mutants_of(SOURCE / name)]
    equal = {line.split(" # ")[0] for line in EQUAL.read_text().splitlines()} if EQUAL.exists() else set()
    mutants = [mutant for mutant in {m.text: m for m in mutants}.values() if mutant.name not in equal]
    mutants = [mutant for mutant in mutants if arguments.only in mutant.name]
    if arguments.again is not None:
        alive = {text.rpartition(" # ")[0] for text in re.findall("ALIVE (.*)", Path(arguments.again).read_text())}
        mutants = [mutant for mutant in mutants if mutant.name in alive]
    random.Random(arguments.seed).shuffle(mutants)
    if arguments.sample is not None:
        seen: Counter[str] = Counter()
        for mutant in list(mutants):
            seen[mutant.file] += 1
            if seen[mutant.file] > arguments.sample:
                mutants.remove(mutant)
    print(f"{len(mutants)} mutants, {len(equal)} more that change nothing", flush=True)
    if arguments.list:
        return 0
    with tempfile.TemporaryDirectory(prefix="onewriter-mutants-") as folder, ExitStack() as ends:
        trees: queue.Queue[Tree] = queue.Queue()
        for number in range(arguments.workers):
            trees.put(ends.enter_context(Tree(Path(folder) / f"tree{number}")))
        kept = Path(arguments.map or Path(folder) / "map").resolve()
        also = [name for name in arguments.also.split(",") if name]
        tests = Tests.find(Path(folder) / "tree0", kept, also, arguments.seconds)
        print(f"{len(tests.seconds)} tests are known", flush=True)
        end = monotonic() + arguments.minutes * 60
        outcomes: Counter[str] = Counter()
        tried: Counter[str] = Counter()

        def attempt(mutant: Mutant) -> None:
            if monotonic() > end:
                return
            tree = trees.get()
            try:
                is_alive = tree.survives(mutant, tests.of(mutant))
            finally:
                trees.put(tree)  # or the others wait for it without end
            outcomes["alive" if is_alive else "noticed"] += 1
            tried[mutant.file] += 1
            if is_alive:
                print(f"ALIVE {mutant.name} # line {mutant.line}", flush=True)
            if outcomes.total() % 50 == 0:
                print(f"{outcomes.total()} tried", flush=True)

        with ThreadPoolExecutor(arguments.workers) as workers:
            list(workers.map(attempt, mutants))
    for name, made in sorted(Counter(mutant.file for mutant in mutants).items()):
        print(f"{name}: tried {tried[name]} of {made}")
    print(f"tried {outcomes.total()} of {len(mutants)}, alive {outcomes['alive']}")
    return 1 if outcomes["alive"] else 0


if __name__ == "__main__":
    sys.exit(main())
