"""onewriter: the single writer of a SQLite database."""

from onewriter.aio import AsyncDbWriter
from onewriter.base.tally import CloseReport, Stats
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
from onewriter.tasks.block import AsyncTransaction
from onewriter.tasks.watch import AsyncWatch
from onewriter.write.ticket import Ticket
from onewriter.write.transaction import Transaction

__all__ = [
    "AsyncDbWriter",
    "AsyncTransaction",
    "AsyncWatch",
    "CloseReport",
    "CommitUnknownError",
    "DbWriter",
    "ForkedError",
    "OneWriterError",
    "QueueFullError",
    "ReadTimeoutError",
    "ReentrantWriteError",
    "Result",
    "Stats",
    "Ticket",
    "Transaction",
    "TransactionAbortedError",
    "TransactionClosedError",
    "Watch",
    "WriteTimeoutError",
    "WriterBrokenError",
    "WriterClosedError",
]


def __dir__() -> list[str]:
    return list(__all__)
