"""Which lines of the gateway does no test miss? ``python tests/mutants.py [--minutes N] [--files loop.py,queue.py]``.

Takes out or inverts, one at a time, each guard, lock, ``except``, ``del`` and comparison, runs the tests that know the
file and then all fast ones, and lists what nothing noticed. ``tests/equal_mutants.txt`` has those that change nothing
that can be seen, with the reason.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "onewriter"
EQUAL = ROOT / "tests" / "equal_mutants.txt"
LEFT_OUT = {"bench.py", "check.py", "__main__.py", "__init__.py", "testing.py"}
TIMEOUT = 240.0  # seconds; a hang is noticed
INVERSE: dict[type[ast.cmpop], str] = {
    ast.Lt: ">=", ast.LtE: ">", ast.Gt: "<=", ast.GtE: "<", ast.Eq: "!=", ast.NotEq: "==",
    ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in",
}  # fmt: skip
FIRST = {  # besides tests/unit/test_<file>*.py
    "aio": ["unit/test_aio.py", "acceptance/test_asyncio.py"],
    "driver": ["unit/test_queue.py", "unit/test_life.py", "unit/test_block.py"],
    "exit": ["unit/test_life.py", "unit/test_fork.py", "acceptance/test_exit.py"],
    "gateway": ["unit/test_queue.py", "unit/test_statement.py", "unit/test_block.py", "unit/test_readers.py"],
    "holder": ["unit/test_block.py", "unit/test_queue.py", "unit/test_stats.py"],
    "job": ["unit/test_ticket.py", "unit/test_stats.py"],
    "log": ["unit/test_queue.py", "unit/test_stats.py", "unit/test_events.py"],
    "loop": ["unit/test_transaction.py", "unit/test_queue.py", "property"],
}
SLOW = ("bench", "crash", "stress", "libraries")


@dataclass(frozen=True)
class Mutant:
    file: str
    line: int
    what: str
    text: str  # of the whole file

    @property
    def name(self) -> str:
        return f"{self.file}: {self.what}"


def mutants_of(path: Path) -> Iterator[Mutant]:
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line.encode()))
    data = source.encode()

    def place(line: int, column: int) -> int:
        return starts[line - 1] + column

    def mutant(node: ast.expr | ast.stmt, new: str, kind: str) -> Mutant:
        begin = place(node.lineno, node.col_offset)
        end = place(node.end_lineno or 0, node.end_col_offset or 0)
        old = " ".join(data[begin:end].decode().split())
        text = (data[:begin] + new.encode() + data[end:]).decode()
        return Mutant(path.name, node.lineno, f"{kind} `{old[:90]}`", text)

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.If | ast.IfExp | ast.While):
            if ast.unparse(node.test) not in ("True", "TYPE_CHECKING"):
                yield mutant(node.test, f"(not ({ast.unparse(node.test)}))", "inverted")
        elif isinstance(node, ast.With):
            for item in node.items:
                if "lock" in (name := ast.unparse(item.context_expr).lower()) or "mutex" in name:
                    yield mutant(
                        item.context_expr, '__import__("contextlib").nullcontext()', f"no lock, line {node.lineno},"
                    )
        elif isinstance(node, ast.ExceptHandler) and node.type is not None:
            yield mutant(node.type, "()", f"no except, line {node.lineno},")
        elif isinstance(node, ast.Delete):
            yield mutant(node, "pass", "no del")
        elif isinstance(node, ast.Compare) and len(node.ops) == 1:
            sides = ast.unparse(node.left), ast.unparse(node.comparators[0])
            yield mutant(node, f"({sides[0]} {INVERSE[type(node.ops[0])]} {sides[1]})", "inverted")
        elif isinstance(node, ast.BoolOp):
            new = (" or " if isinstance(node.op, ast.And) else " and ").join(f"({ast.unparse(v)})" for v in node.values)
            yield mutant(node, f"({new})", "and for or")


def survives(mutant: Mutant, tree: Path) -> bool:
    target = tree / "src" / "onewriter" / mutant.file
    original = target.read_text(encoding="utf-8")
    target.write_text(mutant.text, encoding="utf-8")
    stem = mutant.file.removesuffix(".py")
    known = [str(path) for path in sorted((tree / "tests" / "unit").glob(f"test_{stem}*.py"))]
    known += [str(tree / "tests" / name) for name in FIRST.get(stem, [])]
    everything = [str(tree / "tests"), *(f"--ignore={tree / 'tests' / folder}" for folder in SLOW)]
    try:
        return all(_pass(tests, tree) for tests in (known, everything) if tests)
    finally:
        target.write_text(original, encoding="utf-8")


def _pass(tests: list[str], tree: Path) -> bool:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(tree / "src")}
    options = {"cwd": tree, "env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, start_new_session=True, **options) as process:  # type: ignore[call-overload]
        try:
            return bool(process.wait(TIMEOUT) == 0)
        except subprocess.TimeoutExpired:
            return False
        finally:
            try:
                os.killpg(process.pid, 9)
            except ProcessLookupError:
                pass


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--files", default="", help="comma-separated; default: all")
    parser.add_argument("--seed", type=int, default=1, help="of the order in which they are tried")
    parser.add_argument("--list", action="store_true", help="only count them")
    arguments = parser.parse_args()
    files = arguments.files.split(",") if arguments.files else sorted(path.name for path in SOURCE.glob("*.py"))
    mutants = [m for name in files if name not in LEFT_OUT for m in mutants_of(SOURCE / name)]
    equal = {line.split(" # ")[0] for line in EQUAL.read_text().splitlines()} if EQUAL.exists() else set()
    mutants = [mutant for mutant in {m.text: m for m in mutants}.values() if mutant.name not in equal]
    random.Random(arguments.seed).shuffle(mutants)
    print(f"{len(mutants)} mutants, {len(equal)} more that change nothing", flush=True)
    if arguments.list:
        return 0
    began, tried, alive = monotonic(), 0, 0
    with tempfile.TemporaryDirectory(prefix="onewriter-mutants-") as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache"))
        for mutant in mutants:
            if monotonic() - began > arguments.minutes * 60:
                break
            tried += 1
            if survives(mutant, tree):
                alive += 1
                print(f"ALIVE {mutant.name} # line {mutant.line}", flush=True)
    print(f"tried {tried} of {len(mutants)}, alive {alive}")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
