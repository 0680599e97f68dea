"""The path of a write: a job goes through the queue to the writer, into a batch, and to its ticket."""
