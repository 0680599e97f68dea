"""What is SQLite's: opening connections, what a statement may do, locks, the file and its company."""
