"""What can be wrong with a load test before it starts."""


class LoadTestError(Exception):
    """The plan, the data or the target cannot be used; the message says why."""
