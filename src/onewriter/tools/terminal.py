"""Text output: on a terminal wrapped to its width, elsewhere one line stays one line."""

from __future__ import annotations

import shutil
import sys
import textwrap


def wrap(line: str, indent: int = 0) -> str:
    """The line, on a terminal broken between words; what is continued is indented by so many spaces."""
    if not sys.stdout.isatty():
        return line
    width = shutil.get_terminal_size().columns
    return textwrap.fill(
        line, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False, tabsize=1
    )


def printable(text: str) -> str:
    """The text without control characters for a terminal: names in a database can contain any."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )
