"""Which processes hold SQLite's locks: on Linux /proc/locks lists them by inode. The file is not opened for it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from onewriter.sqlite.mounts import mount_of

LOCKS = Path("/proc/locks")
READ_BYTES = (123, 127)  # of the -shm file
WRITE_BYTE = 120  # of the -shm file: https://www.sqlite.org/walformat.html#wal_locks
# Of the database: https://www.sqlite.org/lockingv3.html
PENDING, LAST = 0x40000000, 0x40000000 + 511
SHARED = 0x40000002
COMMAND_LENGTH = 100
LOOKS = 3  # at /proc/locks, which may miss lines when locks change while it is read
UNKNOWN_READER = "unknown here, perhaps another connection of this process"


def lock_holders(path: str) -> list[int] | None:
    """The processes that hold the write lock of the database; None where the system does not say."""
    lines, path = _all_locks(), os.path.realpath(path)
    if lines is None:
        return None
    return sorted({*_holders(lines, f"{path}-shm", WRITE_BYTE, WRITE_BYTE), *_holders(lines, path, PENDING, LAST)})


def readers_in_the_way(path: str) -> list[int] | None:
    """The other processes that hold SHARED, for which COMMIT waits without WAL; None where the system does not say.

    Without this process: SQLite holds one SHARED lock for its writer and readers together.
    """
    lines = _all_locks()
    if lines is None:
        return None
    return sorted({*_holders(lines, os.path.realpath(path), SHARED, LAST, kinds=("READ", "WRITE"))} - {os.getpid()})


def wal_readers(path: str) -> list[int] | None:
    """The processes that read from the write-ahead log now; None where the system does not say."""
    lines, path = _all_locks(), os.path.realpath(path)
    if lines is None:
        return None
    return sorted(set(_holders(lines, f"{path}-shm", *READ_BYTES, kinds=("READ", "WRITE"))))


def openers(path: str) -> list[int] | None:
    """The processes that have the database open in WAL mode, in which every connection holds SHARED; None where the
    system does not say."""
    lines = _all_locks()
    if lines is None:
        return None
    return sorted(set(_holders(lines, os.path.realpath(path), SHARED, SHARED, kinds=("READ", "WRITE"))))


def describe_wal_readers(paths: Iterable[str], borrowers: list[str]) -> str:
    """For messages: which readers keep the logs from being reset; ``borrowers`` are readers of the calling gateway."""
    found = dict.fromkeys(process for path in paths for process in wal_readers(path) or [])
    others = [process for process in found if not (borrowers and process == os.getpid())]
    return ", ".join([*borrowers, *map(describe_process, others)]) or "a reader that cannot be determined here"


def describe_readers(paths: Iterable[str], borrowers: list[str]) -> str:
    """For messages: which readers COMMIT waits for; ``borrowers`` are those of the calling gateway."""
    found = dict.fromkeys(process for path in paths for process in readers_in_the_way(path) or [])
    who = ", ".join([*borrowers, *map(describe_process, found)])
    return f"COMMIT waits for readers: {who or UNKNOWN_READER}"


def describe_lock(path: str, attached: Iterable[str] = ()) -> str:
    """For messages: which process holds the lock, or that of an attached file, which a transaction needs too."""
    holders: list[int] | None = None
    for file in (path, *attached) * LOOKS:
        if holders := lock_holders(file):
            whose = "" if file == path else f" of the attached {file}"
            return f"SQLite's lock{whose} is held by {', '.join(map(describe_process, holders))}"
    if holders is None:
        return "the holder of SQLite's lock cannot be determined here"
    return "no holder of SQLite's lock was found: it is free at this moment, or that cannot be determined here"


def _all_locks() -> list[str] | None:
    try:
        return LOCKS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None


def _holders(lines: list[str], path: str, first: int, last: int, kinds: tuple[str, ...] = ("WRITE",)) -> Iterator[int]:
    """The processes with a lock of these ``kinds`` on some byte from ``first`` to ``last`` of the file."""
    try:
        file = os.stat(path)
    except OSError:
        return
    major, minor = os.major(file.st_dev), os.minor(file.st_dev)
    names = {f"{major:02x}:{minor:02x}:{file.st_ino}"}
    if major == 0 and (mount := mount_of(path)) is not None:  # as on btrfs, whose subvolumes have devices of their own
        names.add("{:02x}:{:02x}:{}".format(*mount.device, file.st_ino))
    for line in lines:
        # "1: POSIX  ADVISORY  WRITE 4711 08:01:131 120 120"; with "->" after the "1:" the process only waits
        parts = line.split()
        if len(parts) == 8 and parts[3] in kinds and parts[5] in names:
            end = last if parts[7] == "EOF" else int(parts[7])
            if int(parts[6]) <= last and end >= first:
                yield int(parts[4])


def describe_process(number: int) -> str:
    if number == os.getpid():
        return f"this process ({number}), through another connection"
    command = command_of(number)
    return f"process {number}" + (f" ({command})" if command else "")


def command_of(number: int) -> str:
    """The beginning of its command line; empty if it has ended or may not be read."""
    try:
        command = Path(f"/proc/{number}/cmdline").read_bytes()
    except OSError:
        return ""
    return command.replace(b"\0", b" ").decode(errors="replace").strip()[:COMMAND_LENGTH]
