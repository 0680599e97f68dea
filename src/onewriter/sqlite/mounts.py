"""Where file systems are mounted: on Linux /proc/self/mountinfo lists them. Touches no database."""

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
    """The mount that contains ``path``, which has no symbolic links; None where the system does not say."""
    try:
        text = MOUNTS.read_bytes()
    except OSError:
        return None
    name, found = os.fsencode(path), None
    for line in text.splitlines():  # in the order of mounting: one that hides another comes later
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
    """Whether the file is mounted without its folder, so that the log in that folder is on another file system.

    Where the mounts are unknown, its device decides; on a layered file system that may differ from the folder's anyway.
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
