"""onewriter: the single writer of a SQLite database."""

from onewriter.aio import AsyncDbWriter
from onewriter.base.tally import CheckpointResult, CloseReport, Latency, Running, Stats, Timings
from onewriter.base.version import VERSION as __version__
from onewriter.errors import (
    CommitUnknownError,
    ForkedError,
    OneWriterError,
    QueueFullError,
    ReadTimeoutError,
    ReentrantWriteError,
    TransactionAbortedError,
    TransactionClosedError,
    WriterBrokenError,
    WriterClosedError,
    WriteTimeoutError,
)
from onewriter.gateway import DbWriter
from onewriter.live.watch import Watch
from onewriter.sqlite.result import Result
from onewriter.tasks.reader import AsyncReader
from onewriter.tasks.transaction import AsyncTransaction
from onewriter.tasks.watch import AsyncWatch
from onewriter.write.checkpoint import Checkpoint
from onewriter.write.ticket import Ticket
from onewriter.write.transaction import Transaction

__all__ = [
    "AsyncDbWriter",
    "AsyncReader",
    "AsyncTransaction",
    "AsyncWatch",
    "Checkpoint",
    "CheckpointResult",
    "CloseReport",
    "CommitUnknownError",
    "DbWriter",
    "ForkedError",
    "Latency",
    "OneWriterError",
    "QueueFullError",
    "ReadTimeoutError",
    "ReentrantWriteError",
    "Result",
    "Running",
    "Stats",
    "Ticket",
    "Timings",
    "Transaction",
    "TransactionAbortedError",
    "TransactionClosedError",
    "Watch",
    "WriteTimeoutError",
    "WriterBrokenError",
    "WriterClosedError",
    "__version__",
]


def __dir__() -> list[str]:
    return list(__all__)
