"""onewriter: the single writer of a SQLite database."""

from onewriter.aio import AsyncDbWriter
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
from onewriter.job import Ticket
from onewriter.statement import Result
from onewriter.stats import CloseReport, Stats
from onewriter.taskblock import AsyncTransaction
from onewriter.transaction import Transaction

__all__ = [
    "AsyncDbWriter",
    "AsyncTransaction",
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
    "WriteTimeoutError",
    "WriterBrokenError",
    "WriterClosedError",
]
