"""The command line: ``python -m onewriter COMMAND``."""

from __future__ import annotations

import argparse
import platform
import sqlite3
import sys
from collections.abc import Sequence

from onewriter.base.version import VERSION
from onewriter.tools import bench, check

INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it

# Each has add_command(subparsers), which sets ``run``: a function of the parsed arguments that returns the exit code.
COMMANDS = (bench, check)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; bad arguments end with SystemExit(2)."""
    parser = argparse.ArgumentParser(prog="python -m onewriter", description="A single-writer gateway for SQLite.")
    version = f"onewriter {VERSION} (SQLite {sqlite3.sqlite_version}, Python {platform.python_version()})"
    parser.add_argument("--version", action="version", version=version)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_command(subparsers)
    arguments = parser.parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return code


if __name__ == "__main__":
    sys.exit(main())
