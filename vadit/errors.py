"""The two kinds of failure that a user sees as one sentence, without a traceback."""


class UsageError(ValueError):
    """A setting or argument is wrong: the value found, the value needed, what to change. Exit code 2."""


class RunError(RuntimeError):
    """The work itself failed: a damaged file, a full disk, a lost process. Exit code 1."""
