"""The one error that a user can mend: a bad flag, file, size or layout."""


class InputError(ValueError):
    """Says what was given, what was needed and what to do.

    Raised at the door, where input enters the program. The command line prints the message alone,
    without a traceback, and leaves with exit status 2.
    """
