"""Live queries: who watches which query, which tables it reads, and which a commit has written."""
