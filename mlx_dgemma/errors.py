"""The mistakes a caller can make, as opposed to bugs in this package."""


class InputError(ValueError):
    """Something given to us is wrong. The message is one line: what, where, and what to do."""


class UsageError(InputError):
    """An option is out of range, unknown, or of the other mode. Commands exit with status 2."""
