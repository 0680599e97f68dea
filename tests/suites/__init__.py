"""Other people's tests, run on lent connections: ``tests/foreign.py`` is the program."""
