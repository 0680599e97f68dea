"""What a framework has dropped in a reference cycle, with the block it is inside: it is there until a collection."""

from __future__ import annotations

import contextlib
import gc
import threading

LONG = 5.0  # seconds for which something is kept from others before it is looked for there: a collection stops all


def collect_soon() -> None:
    """Have the garbage collector run, unless the program has turned it off. In a thread of its own, since code of the
    user's that it finalizes may wait, or write.
    """
    if gc.isenabled():
        with contextlib.suppress(RuntimeError):  # the interpreter ends, or the system has no thread left
            threading.Thread(target=gc.collect, name="onewriter-collect", daemon=True).start()
