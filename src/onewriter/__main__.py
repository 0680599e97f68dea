"""The command line: ``python -m onewriter COMMAND``."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from onewriter.base.version import VERSION
from onewriter.tools import bench, check
from onewriter.tools.versions import versions

INTERRUPTED, NOBODY_READS = 130, 141  # 128 + SIGINT and + SIGPIPE, as a shell reports them

# Each has add_command(subparsers), which sets ``run``: a function of the parsed arguments that returns the exit code.
COMMANDS = (bench, check)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; bad arguments end with SystemExit(2)."""
    parser = argparse.ArgumentParser(prog="python -m onewriter", description="A single-writer gateway for SQLite.")
    parser.add_argument("--version", action="version", version=f"onewriter {VERSION} ({versions()})")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_command(subparsers)
    arguments = parser.parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # names in a database may have characters that the output has not
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()  # here, and not where the interpreter ends
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # as behind `| head`, which has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NOBODY_READS
    return code


if __name__ == "__main__":
    sys.exit(main())
