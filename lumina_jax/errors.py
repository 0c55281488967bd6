"""The errors that a user can mend: a bad flag, file, size or layout; processes that do not meet."""


class InputError(ValueError):
    """Says what was given, what was needed and what to do.

    Raised at the door, where input enters the program. The command line prints the message alone,
    without a traceback, and leaves with exit status 2.
    """

    status = 2


class JoinError(InputError):
    """The processes of a run did not find each other; starting again may help.

    Attributes:
      status: Of the exit; EX_TEMPFAIL of sysexits.h, which says the same to a scheduler.
    """

    status = 75
