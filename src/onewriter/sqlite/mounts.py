"""Where file systems are mounted: on Linux /proc/self/mountinfo says it. Looks at no database."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

MOUNTS = Path("/proc/self/mountinfo")


class Mount(NamedTuple):
    point: str
    device: tuple[int, int]  # of the file system, which a file in it need not have: btrfs gives each subvolume its own


def mount_of(path: str) -> Mount | None:
    """The mount that has the real ``path``; None if that cannot be told here."""
    try:
        text = MOUNTS.read_bytes()
    except OSError:
        return None
    name, found = os.fsencode(path), None
    for line in text.splitlines():  # in the order of mounting: what was mounted over another comes later
        # "36 35 98:0 /root/of/mount /mount/point rw,noatime …"
        parts = line.split(b" ", 5)
        if len(parts) < 6:
            continue
        point = re.sub(rb"\\(\d{3})", lambda code: bytes([int(code[1], 8)]), parts[4])
        is_above = name == point or name.startswith(point.rstrip(b"/") + b"/")
        if is_above and (found is None or len(point) >= len(os.fsencode(found.point))):
            major, _, minor = parts[2].partition(b":")
            found = Mount(os.fsdecode(point), (int(major), int(minor)))
    return found


def is_mounted_alone(path: str) -> bool:
    """Whether the file is a mount of its own: what is made beside it is not kept where it is.

    Its device says so where nothing better does; a layered file system may give files another one than their folder.
    """
    path = os.path.realpath(path)
    try:
        if not os.path.isfile(path):
            return False
        mount = mount_of(path)
        if mount is not None:
            return mount.point == path
        return os.stat(path).st_dev != os.stat(os.path.dirname(path)).st_dev
    except OSError:
        return False
