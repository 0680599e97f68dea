"""Everything that knows SQLite: opening connections, what a statement may do, locks, its files."""
