"""The errors that a user can mend, and the exit status that each of them ends a command with.

2    the input is wrong; started again, the same command fails again
75   nothing is wrong with it: start the same command again, it goes on
130  interrupted by a person
"""

from collections.abc import Mapping, Sequence
from typing import Any

RESTART = 75  # EX_TEMPFAIL of sysexits.h, which says the same to a scheduler
INTERRUPTED = 130
_CLIENTS = ("aiohttp", "botocore", "fsspec", "gcsfs", "google", "requests", "s3fs", "urllib3")


class InputError(ValueError):
    """Says what was given, what was needed and what to do.

    Raised at the door, where input enters the program. The command line prints the message alone,
    without a traceback, and leaves with its exit status.
    """

    status = 2


class DamagedError(InputError):
    """A checkpoint is not as it was written."""


class RestartError(InputError):
    """What ended the run lies outside of it; started again, it goes on from its checkpoint."""

    status = RESTART


class JoinError(RestartError):
    """The processes of a run did not find each other."""


def causes(error: BaseException) -> list[BaseException]:
    """An error and what it was raised from, the first cause last."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    return chain


def is_of_storage(error: BaseException) -> bool:
    """Whether an error comes of a disk or a store, whose clients have errors of their own."""
    *_, first = causes(error)
    return isinstance(first, OSError) or is_of_store(first)


def is_of_store(error: BaseException) -> bool:
    """Whether an error is one of a store's client, which says nothing of the file itself."""
    return type(error).__module__.split(".")[0] in _CLIENTS


def listed(names: Sequence[str], most: int) -> str:
    """The first names for a message, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What settings that were found and those that are wanted differ in; "" where they do not."""
    return "; ".join(
        f"{name} is {there.get(name)!r:.300} there and {here.get(name)!r:.300} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    )
