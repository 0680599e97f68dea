"""Power loss: the write, sync and truncate calls of a real run, cut off anywhere, and the file that this may leave.

What was synced is there. Of what was written after the last sync of its file, a disk may have kept nothing, all, or any
part, down to single sectors.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from experiments import HANG, Outcome, child, environment, load, strace

SECTOR = 512
CALLS = "pwrite64,write,fdatasync,fsync,ftruncate,unlink"
LINE = re.compile(r"^\d+\s+(\w+)\((.*)\)\s+= (-?\d+)")
RESUMED = re.compile(r"^\d+\s+<\.\.\. \w+ resumed>(.*)$")
WRITE = re.compile(r'(\d+<[^>]*>), "((?:\\x[0-9a-f]{2})*)", (\d+)(?:, (\d+))?')


@dataclass(frozen=True)
class Call:
    kind: str  # "write", "truncate", "unlink", "sync" or "told"
    file: str
    offset: int = 0
    data: bytes = b""


def record(folder: Path, synchronous: str, mode: str, jobs: int) -> list[Call]:
    """What a run did to its folder, in order."""
    tool, log, path = strace(), folder / "trace", folder / "app.db"
    assert tool is not None, "needs strace"
    prefix = (tool, "-f", "-qq", "-o", str(log), "-y", "-xx", "-s", "70000", "-e", f"trace={CALLS}")
    command = child(load.CODE, path, 2, jobs, synchronous, mode, folder / "told", prefix=prefix)
    subprocess.run(command, env=environment(), timeout=HANG, check=True)
    calls = [_parse(line, folder) for line in _whole_lines(log.read_text().splitlines())]
    return [call for call in calls if call is not None and not call.file.endswith(("-shm", ".copy", ".unfinished"))]


def _whole_lines(lines: list[str]) -> Iterator[str]:
    """A call during which another thread's call was told is told in two parts; it counts where it ended."""
    begun: dict[str, str] = {}
    for line in lines:
        thread, _, text = line.partition(" ")
        if text.endswith(" <unfinished ...>"):
            begun[thread] = line.removesuffix(" <unfinished ...>")
        elif (match := RESUMED.match(line)) is not None and thread in begun:
            yield begun.pop(thread) + match[1]
        else:
            yield line


def _parse(line: str, folder: Path) -> Call | None:
    match = LINE.match(line)
    if match is None or int(match[3]) < 0:
        return None
    name, arguments = match[1], match[2]
    if name == "unlink":
        file = _bytes(arguments.split('"')[1]).decode()
        return Call("unlink", file) if file.startswith(str(folder)) else None
    file = _bytes(arguments.split("<")[1].split(">")[0]).decode()
    if not file.startswith(str(folder)):
        return None
    if name in ("fdatasync", "fsync"):
        return Call("sync", file)
    if name == "ftruncate":
        return Call("truncate", file, int(arguments.rsplit(",", 1)[1]))
    found = WRITE.match(arguments)
    if found is None:
        return None
    data = _bytes(found[2])
    return Call("told", file, 0, data) if file.endswith("/told") else Call("write", file, int(found[4] or 0), data)


def _bytes(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", "")) if "\\x" in text else text.encode()


def after_cut(calls: list[Call], cut: int, chance: random.Random, folder: Path) -> tuple[dict[str, bytearray], str]:
    """The files as they could stand if the power went after ``cut`` calls; and how it was drawn."""
    durable: dict[str, bytearray] = {}
    pending: dict[str, list[Call]] = {}
    for call in calls[:cut]:
        if call.kind == "sync" and call.file == str(folder):  # brings the names to the disk
            for file, waiting in pending.items():
                gone = [other for other in waiting if other.kind == "unlink"]
                if gone:
                    durable.pop(file, None)
                    pending[file] = waiting[waiting.index(gone[-1]) + 1 :]
        elif call.kind == "sync":
            for other in pending.pop(call.file, []):
                _apply(durable, other)
        elif call.kind != "told":
            pending.setdefault(call.file, []).append(call)
    how = chance.choice(["nothing", "all", "some", "torn"])
    for waiting in pending.values():
        for call in waiting:
            if how == "nothing" or (how in ("some", "torn") and chance.random() < 0.5):
                continue
            if how == "torn" and call.kind == "write" and len(call.data) > SECTOR and chance.random() < 0.5:
                sectors = chance.randrange(1, -(-len(call.data) // SECTOR))
                call = Call("write", call.file, call.offset, call.data[: sectors * SECTOR])
            _apply(durable, call)
    return durable, how


def _apply(files: dict[str, bytearray], call: Call) -> None:
    if call.kind == "unlink":
        files.pop(call.file, None)
        return
    content = files.setdefault(call.file, bytearray())
    end = call.offset + len(call.data)
    content.extend(bytes(max(0, end - len(content))))
    if call.kind == "truncate":
        del content[end:]
    else:
        content[call.offset : end] = call.data


def run(size: int, seed: int, folder: Path, *, synchronous: str = "FULL", mode: str = "WAL") -> Outcome:
    """``size`` cuts of one run. With NORMAL what was acknowledged last may be missing, and nothing else."""
    chance, outcome = random.Random(seed), Outcome()
    calls = record(folder, synchronous, mode, 60)
    first = next(place for place, call in enumerate(calls) if call.kind == "told" and call.data.startswith(b"A"))
    after = folder / "after"
    after.mkdir()
    for _ in range(size):
        cut = chance.randrange(first, len(calls) + 1)
        files, how = after_cut(calls, cut, chance, folder)
        for file, content in files.items():
            Path(file.replace(str(folder), str(after), 1)).write_bytes(content)
        told = b"".join(call.data for call in calls[:cut] if call.kind == "told").decode().splitlines()
        # NORMAL in WAL mode keeps the promise of the last checkpoint; elsewhere each commit is synced.
        load.judge(after / "app.db", told, outcome, f"cut at {cut}, {how}", may_lose=synchronous != "FULL")
        outcome.trials += 1
        outcome.notes[how] += 1
        for name in os.listdir(after):
            (after / name).unlink()
    return outcome
