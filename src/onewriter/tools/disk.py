"""How fast the disk is, which is most of the cost of a COMMIT."""

from __future__ import annotations

import os
import statistics
import sys
from pathlib import Path
from time import perf_counter

FSYNCS = 20


def fsync_ms(folder: Path) -> float:
    """The median time, in milliseconds, to sync one page of a file in ``folder`` to the disk."""
    times = []
    with open(folder / "fsync", "wb", buffering=0) as file:
        for _ in range(FSYNCS):
            began = perf_counter()
            file.write(bytes(4096))
            _sync(file.fileno())
            times.append(1000 * (perf_counter() - began))
    return statistics.median(times)


def _sync(descriptor: int) -> None:
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    else:
        os.fsync(descriptor)
