"""The command line's two programs."""
