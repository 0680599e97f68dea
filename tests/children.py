"""Child processes without an interpreter's start: one that has imported onewriter waits, and forks a child for each.

A child is as new as any: it has opened nothing, has one thread, and ends as an interpreter does, through its own
atexit hooks. What a start does by itself (site, the command line, the first import) it does not show; with
``NEW_INTERPRETERS=1`` in the environment, an interpreter is started for each child instead.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import gc
import os
import selectors
import signal
import socket
import subprocess
import sys
from pathlib import Path
from threading import Lock
from time import monotonic

# Run by the process that waits. It leaves fork_children in a child only, and goes on as if that had been its own code.
MAIN = "import onewriter, children; exec(compile(children.fork_children({}), '<string>', 'exec'))"
NEW_INTERPRETERS = os.environ.get("NEW_INTERPRETERS") == "1"
LONGEST = 1 << 17  # bytes of code


def fork_children(descriptor: int) -> str:
    """Fork a child for each request, until nobody is left to ask; in the child, return the code that it is to run."""
    gc.freeze()  # or each child copies, when it ends, what it never uses
    with socket.socket(fileno=descriptor) as requests:
        while True:
            code, descriptors, _, _ = socket.recv_fds(requests, LONGEST, 3)
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            if not code:
                os._exit(0)
            if os.fork() == 0:
                break
            for given in descriptors:
                os.close(given)
    *streams, told = descriptors
    os.setsid()
    os.write(told, array.array("i", [os.getpid()]))
    child = os.fork()
    if child:
        for stream in streams:
            os.close(stream)
        os.write(told, array.array("i", [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])]))
        os._exit(0)
    os.close(told)
    for number, stream in enumerate(streams, 1):
        os.dup2(stream, number)
        os.close(stream)
    folder, _, program = code.decode().partition("\0")
    os.chdir(folder)
    return program


def environment() -> dict[str, str]:
    """For a process that imports what the tests import."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])}


def run(code: str, timeout: float) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a child, and wait until nobody has its output open any more."""
    if NEW_INTERPRETERS:
        command = [sys.executable, "-c", code]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment())
    return _forker.run(code, timeout)


class _Forker:
    """The process that waits, from the first child on."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._requests: socket.socket | None = None

    def _ask(self, code: str, descriptors: list[int]) -> None:
        with self._lock:
            if self._requests is None:
                self._start()
        assert self._requests is not None
        socket.send_fds(self._requests, [code.encode()], descriptors)

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", MAIN.format(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the tests, which end it
                env=environment(),
            )
        self._requests = ours
        atexit.register(self._end, process)

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        assert self._requests is not None
        self._requests.close()
        process.wait()

    def run(self, code: str, timeout: float) -> subprocess.CompletedProcess[str]:
        read, given = zip(*(os.pipe() for _ in range(3)), strict=True)
        try:
            self._ask(f"{os.getcwd()}\0{code}", list(given))
        finally:
            for descriptor in given:
                os.close(descriptor)
        out, error, told = _read_all(read, timeout)
        numbers = array.array("i", told)
        return subprocess.CompletedProcess("<string>", numbers[1], out.decode(), error.decode())


def _read_all(descriptors: tuple[int, ...], timeout: float) -> list[bytearray]:
    end, parts = monotonic() + timeout, {descriptor: bytearray() for descriptor in descriptors}
    with selectors.DefaultSelector() as selector:
        for descriptor in descriptors:
            selector.register(descriptor, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(end - monotonic())
            if not ready and monotonic() > end:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(array.array("i", parts[descriptors[2]][:4])[0], signal.SIGKILL)
                raise subprocess.TimeoutExpired("<string>", timeout, bytes(parts[descriptors[0]]))
            for key, _ in ready:
                if part := os.read(key.fd, LONGEST):
                    parts[key.fd] += part
                else:
                    selector.unregister(key.fd)
                    os.close(key.fd)
    return [parts[descriptor] for descriptor in descriptors]


_forker = _Forker()
