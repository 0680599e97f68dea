"""Room on the stack: a RecursionError comes where it harms nothing, or not at all."""


def need_stack(calls: int) -> None:
    """Raise RecursionError now, if there is no room for so many calls in calls."""
    if calls:
        need_stack(calls - 1)
