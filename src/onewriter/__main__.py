"""The command line: ``python -m onewriter COMMAND``."""

from __future__ import annotations

import argparse
import errno
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
    if sys.stdout is None:  # it was closed by who started this: the exit code is told all the same
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # names in a database may have characters that the output has not
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()  # here, and not where the interpreter ends
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        if error.errno == errno.ENOSPC:  # and no word of a closed pipe, as behind `| head`, which has what it wanted
            print(f"cannot write: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or else the interpreter tries it again
        return NOBODY_READS
    return code


if __name__ == "__main__":
    sys.exit(main())
