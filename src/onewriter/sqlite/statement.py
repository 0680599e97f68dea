"""What the text of an SQL statement says, and how a script is split into statements."""

from __future__ import annotations

import functools
import re
import sqlite3
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

Parameters: TypeAlias = tuple[Any, ...] | Mapping[str, Any]
# A doubled quote inside quotes is treated as two quoted texts side by side.
QUOTED = r"""'[^']*+(?:'|\Z)|"[^"]*+(?:"|\Z)|`[^`]*+(?:`|\Z)|\[[^\]]*+(?:\]|\Z)"""
COMMENT = r"--[^\n]*+|/\*(?:[^*]++|\*(?!/))*+(?:\*/|\Z)"
BLANK = rf"(?:\s|{COMMENT})"
# A text can have millions of values: whatever scans it all is one regular expression, not a loop.
NOISE = re.compile(f"{QUOTED}|{COMMENT}", re.DOTALL)
NOTHING = re.compile(f"{BLANK}*+", re.DOTALL)
ONE = rf"[^;'\"`\[/-]*+(?:(?:{QUOTED}|{COMMENT}|[/-])[^;'\"`\[/-]*+)*+;"
STATEMENT = re.compile(ONE, re.DOTALL)
STATEMENTS = re.compile(f"(?:{ONE}){{1,500}}+", re.DOTALL)
TRIGGER = re.compile(
    rf"{BLANK}*+(?:EXPLAIN{BLANK}++(?:QUERY{BLANK}++PLAN{BLANK}++)?+)?+"
    rf"CREATE{BLANK}++(?:TEMP(?:ORARY)?{BLANK}++)?+TRIGGER\b",
    re.DOTALL | re.IGNORECASE,
)
TRIGGER_END = re.compile(rf"{BLANK}*+END{BLANK}*+;", re.DOTALL | re.IGNORECASE)
# A script that is one transaction, as `.dump` writes it, and other tools with the keys on again behind it.
DUMP_HEAD = re.compile(
    rf"{BLANK}*+(?P<off>PRAGMA{BLANK}++foreign_keys{BLANK}*+={BLANK}*+(?:OFF|NO|FALSE|0){BLANK}*+;{BLANK}*+)?+"
    rf"BEGIN(?:{BLANK}++(?:DEFERRED|IMMEDIATE|EXCLUSIVE))?+(?:{BLANK}++TRANSACTION)?+{BLANK}*+;",
    re.DOTALL | re.IGNORECASE,
)
DUMP_TAIL = re.compile(
    rf"(?<=[;\n/])\s*(?:COMMIT(?:{BLANK}++TRANSACTION)?+|END{BLANK}++TRANSACTION)(?:{BLANK}|;)*+"
    rf"(?:PRAGMA{BLANK}++foreign_keys{BLANK}*+={BLANK}*+(?:ON|YES|TRUE|1)(?:{BLANK}|;)*+)?+\Z",
    re.DOTALL | re.IGNORECASE,
)
LONGEST_TAIL = 1_000  # characters
INNERMOST = re.compile(r"\([^()]*+\)")
PARENTHESIS = re.compile(r"[()]")
WORD = re.compile(r"(?<![\w$:@])[^\W\d][\w$]*+")  # no parameter names
MAIN_VERB = re.compile(r"\b(?:INSERT|REPLACE|UPDATE|DELETE|SELECT|VALUES)\b")
UPSERT = re.compile(r"\bDO\s+UPDATE\b")
INTO = re.compile(rf"{QUOTED}|{COMMENT}|\b(?P<into>INTO)\b", re.DOTALL | re.IGNORECASE)
NAME = re.compile(rf"{BLANK}*+(?P<name>(?:{QUOTED})++|[\w$\x80-\U0010ffff]++|\.)", re.DOTALL)
CHANGING = frozenset(("INSERT", "REPLACE", "UPDATE", "DELETE"))
READING = frozenset(("SELECT", "VALUES", "EXPLAIN", "PRAGMA"))
ASKING = ("SELECT", "VALUES")
ISOLATED = ("ROLLBACK", "PRAGMA", "DEFERRED")
LONG = 10_000  # characters; such a text has its values in it, and seldom comes twice
# With the argument it reads one table only. Not by count(), which on_connect may have replaced.
WITHOUT_ROWID = "SELECT EXISTS (SELECT 1 FROM pragma_table_list(?) WHERE wr)"


class OwnText(str):
    """A parameter of the gateway's own, for which no adapter is called that the user has registered for ``str``."""

    __slots__ = ()


class OwnNumber(int):
    """The same for ``int``."""

    __slots__ = ()


class Description(NamedTuple):
    """What the text of a statement says about it."""

    verb: str  # INSERT, UPDATE, PRAGMA …; after WITH, the verb of the main statement
    behind_with: bool
    returning: bool
    inserts: bool  # INSERT or REPLACE, not an upsert, so ``lastrowid`` is defined
    table: OwnText  # the target of INSERT or REPLACE
    fails: bool  # has the keyword FAIL, which keeps the changes made before an error
    isolated: bool  # may undo or change the transaction that it runs in, so it does not share one


def describe_sql(sql: str) -> Description:
    return _describe_short(sql) if len(sql) < LONG else _describe_long(sql)


def _describe(sql: str) -> Description:
    text = NOISE.sub(" ", sql).upper()
    first = WORD.search(text)
    verb = first.group() if first else ""
    main = None
    if verb in ("WITH", "EXPLAIN"):
        main = MAIN_VERB.search(_outside_parentheses(text), len(verb))
        verb = main.group() if main and verb == "WITH" else verb
    inserting = verb in ("INSERT", "REPLACE")
    return Description(
        verb=verb,
        behind_with=main is not None,
        returning=verb in CHANGING and "RETURNING" in text and _has(_outside_parentheses(text), "RETURNING"),
        inserts=inserting and not ("DO" in text and UPSERT.search(text) and UPSERT.search(_outside_parentheses(text))),
        table=OwnText(_target(sql) if inserting else ""),
        fails=_has(text, "FAIL"),
        isolated=any(_has(text, word) for word in ISOLATED),
    )


_describe_short, _describe_long = functools.lru_cache(1024)(_describe), functools.lru_cache(2)(_describe)


def words_of(sql: str) -> set[str]:
    """The words of ``sql`` in upper case, without strings, comments and quoted names."""
    return set(WORD.findall(NOISE.sub(" ", sql).upper()))


def _has(text: str, word: str) -> bool:
    return word in text and re.search(rf"(?<![\w$:@]){word}(?![\w$])", text) is not None


def _outside_parentheses(text: str) -> str:
    for _ in range(4):  # few texts nest deeper, and what is left of them is short
        text = INNERMOST.sub(" ", text)
    parts, depth, start = [], 0, 0
    for match in PARENTHESIS.finditer(text):
        if match.group() == ")":
            depth -= 1
            start = match.end()
        elif depth == 0:
            parts.append(text[start : match.start()])
            depth = 1
        else:
            depth += 1
    if depth == 0:
        parts.append(text[start:])
    return " ".join(parts)


def _target(sql: str) -> str:
    """The table named after INTO, without quotes and schema."""
    into = next((match for match in INTO.finditer(sql) if match["into"]), None)
    name = ""
    position = into.end() if into else len(sql)
    for _ in range(3):  # schema, dot, table
        found = NAME.match(sql, position)
        if found is None or (name not in ("", ".") and found["name"] != "."):
            break
        name, position = found["name"], found.end()
    return name[1:-1].replace(name[0] * 2, name[0]) if name[:1] in ("'", '"', "`", "[") else name


def inside_of_dump(script: str) -> tuple[str, bool]:
    """The statements between BEGIN and COMMIT of a script that is one transaction, and whether it turns foreign keys
    off; any other script unchanged.
    """
    head = DUMP_HEAD.match(script)
    tail = DUMP_TAIL.search(script, max(head.end(), len(script) - LONGEST_TAIL)) if head else None
    if head is None or tail is None:
        return script, False
    return script[head.end() : tail.start()], head["off"] is not None


def split_script(script: str) -> Iterator[str]:
    """The statements of ``script``, one by one; the body of a trigger is not split."""
    start = 0
    while (end := _end(script, start)) is not None:
        yield script[start:end]
        start = end
    if _has_statement(script, start):
        yield script[start:]


def script_parts(script: str) -> Iterator[str]:
    """``script`` in parts of whole statements, up to 500 of them."""
    start = 0
    while several := STATEMENTS.match(script, start):
        stop = several.end()
        if "TRIGGER" not in several.group().upper():
            yield script[start:stop]
            start = stop
        while start < stop:  # the part may end inside a trigger
            end = _end(script, start)
            if end is None:
                yield script[start:]
                return
            yield script[start:end]
            start = end
    if _has_statement(script, start):
        yield script[start:]


def _end(script: str, start: int) -> int | None:
    """Where the statement that begins at ``start`` ends; None: it is not terminated."""
    end = STATEMENT.match(script, start)
    if end and TRIGGER.match(script, start):  # it ends with END, which looks like a statement
        while end and not (last := TRIGGER_END.match(script, end.end())):
            end = STATEMENT.match(script, end.end())
        end = end and last
    return end.end() if end else None


def _has_statement(script: str, start: int) -> bool:
    nothing = NOTHING.match(script, start)
    return nothing is None or nothing.end() < len(script)


def check_many(sql: str) -> None:
    if describe_sql(sql).returning:
        raise sqlite3.ProgrammingError(
            "run_many and executemany cannot give back the rows of RETURNING: use run, or execute in a loop"
        )
