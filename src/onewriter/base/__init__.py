"""What everything else is built on: no SQLite, no jobs."""
