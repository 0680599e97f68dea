"""The path of a read: a claim on a connection of the pool, a reader, and its snapshot."""
