"""What everything else stands on: no SQLite, no jobs."""
