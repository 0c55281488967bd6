"""Looking at what others wrote: JSON files of bounded size, and numbers within bounds.

A file of a data set or of a model may come from anywhere. A size out of it is looked at before
anything of that size is made.
"""

import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from lumina_jax.errors import InputError

# Bytes of a JSON file, in memory perhaps forty times as many. The manifest of 300,000 shards fits.
MAX_JSON = 2**25
# Of any network that this code is for, and far beyond.
MAX_LAYERS, MAX_WIDTH = 2**10, 2**20


def read_json(path: epath.PathLike, remedy: str) -> dict[str, Any]:
    """The JSON object in a file; InputError where it is none, ending in what to do.

    A file that is missing raises FileNotFoundError, for the caller knows what it is for.
    """
    try:
        with epath.Path(path).open("rb") as file:
            content = file.read(MAX_JSON + 1)
        if len(content) > MAX_JSON:
            raise ValueError(f"it has more than {MAX_JSON:,} bytes")
        value = json.loads(content)
        if not isinstance(value, dict):
            raise ValueError(f"needed a JSON object, got a {type(value).__name__}")
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise InputError(f"{path!s:.300} cannot be read ({error.strerror}). {remedy}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path!s:.300} is damaged ({error}). {remedy}") from None
    return value


def is_whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_finite(value: Any) -> bool:
    """Whether this is a number that float64 can hold: JSON's whole numbers have no limit."""
    return isinstance(value, int | float) and bool(abs(value) <= sys.float_info.max)


def is_positive(value: Any) -> bool:
    """Whether this is a finite number above zero."""
    return is_finite(value) and bool(value > 0)


def whole(value: Any, least: int, most: int) -> int:
    """`value`, if it is a whole number of these bounds; else ValueError."""
    if not is_whole(value, least, most):
        raise ValueError(f"{_short(value)} is not a whole number of {least:,} to {most:,}")
    return value


def text(value: Any) -> str:
    """`value`, if it is text that can be written; else ValueError."""
    if not isinstance(value, str):
        raise ValueError(f"{_short(value)} is not text")
    value.encode()  # JSON can spell half a character
    return value


def number_faults(
    values: Mapping[str, Any], names: Iterable[str], least: int, most: int
) -> list[str]:
    """What is wrong with these of the values, each to be a whole number of the bounds."""
    return [
        f"{name}={_short(values[name])} must be at least {least}, at most {most:,}, and whole"
        for name in names
        if not is_whole(values[name], least, most)
    ]


def _short(value: Any) -> str:
    """As it is where it is short; a number of JSON may be too long to be written."""
    if isinstance(value, int):
        return str(value) if abs(value) < 2**64 else "a number of very many digits"
    return (
        f"{value!r:.60}" if isinstance(value, str | float | None) else f"a {type(value).__name__}"
    )
