"""Everything that knows SQLite: opening connections, what a statement may do, locks, the file and those beside it."""
