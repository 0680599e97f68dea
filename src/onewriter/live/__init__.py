"""Live queries: who watches which query, what it reads, and what a commit has written."""
