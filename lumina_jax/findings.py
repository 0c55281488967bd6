"""What an examination finds, on all processes, as one report.

A check is a function that yields `ok(text)`, `warning(text)` and so on. Each is run by itself:
whatever one of them raises becomes a finding of its own, so that it hides no other.
"""

import dataclasses
import json
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import rich.box
import rich.text
from absl import logging
from jax.experimental import multihost_utils
from rich.console import Console
from rich.table import Table

from lumina_jax.errors import InputError

OK, WARNING, ERROR, NOT_CHECKED = "ok", "warning", "error", "not checked"
_STYLES = {OK: "green", WARNING: "yellow", ERROR: "bold red", NOT_CHECKED: "dim"}
_MAX_LINES = 12  # of one finding
_WIDTH = 100  # columns, where the output is no terminal

Told = tuple[str, str]  # level and text
Check = Callable[[Any], Iterator[Told]]


def ok(text: str) -> Told:
    """Something is as it must be."""
    return OK, text


def warning(text: str) -> Told:
    """The run would start; somebody should know all the same."""
    return WARNING, text


def error(text: str) -> Told:
    """The run would not start, or not end."""
    return ERROR, text


def not_checked(text: str) -> Told:
    """Why nothing can be said."""
    return NOT_CHECKED, text


@dataclasses.dataclass(frozen=True)
class Finding:
    """What was found: of which check, how bad it is, and what is given, needed and to be done."""

    check: str
    level: str
    text: str


class MissingError(Exception):
    """Something that several checks need is not there.

    Attributes:
      check: The one that reports it.
      level: How bad it is.
    """

    def __init__(self, check: str, level: str, text: str):
        super().__init__(text)
        self.check, self.level = check, level


def faults(door: Callable, *args, **settings) -> Iterator[Told]:
    """What a function refuses, as findings; nothing where it returns."""
    try:
        door(*args, **settings)
    except InputError as fault:
        yield error(str(fault))


def examine(checks: Mapping[str, Check], subject: Any) -> list[Finding]:
    """Runs every check on the subject; what is found twice is told where it was found first."""
    found: dict[Finding, None] = {}  # in order, each once
    told: dict[str, str] = {}  # texts of faults, and the check that told them
    for name, check in checks.items():
        for level, text in _guarded(name, check, subject):
            if level in (WARNING, ERROR) and told.setdefault(text, name) != name:
                level, text = NOT_CHECKED, _because(told[text])
            found[Finding(name, level, text)] = None
    return list(found)


def _guarded(name: str, check: Check, subject: Any) -> Iterator[Told]:
    begun = False
    try:
        for told in check(subject):
            yield told
            begun = True
    except MissingError as missing:
        if missing.check == name:
            yield missing.level, str(missing)
        else:
            yield not_checked(("the rest, " if begun else "") + _because(missing.check))
    except InputError as fault:
        yield error(str(fault))
    except Exception as fault:  # of a store, a library or this program: it must not hide the rest
        logging.exception("The check %r failed.", name)
        yield error(f"{type(fault).__name__}: {fault}")


def _because(check: str) -> str:
    return f"because of what is said under {check!r}"


def gather(value: Any) -> list[Any]:
    """A value of each process, to all of them; it must be what JSON can hold."""
    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
    if jax.process_count() == 1:
        return [json.loads(content.tobytes())]
    sizes = multihost_utils.process_allgather(np.array([len(content)], np.int32)).reshape(-1)
    padded = np.zeros(max(sizes), np.uint8)
    padded[: len(content)] = content
    rows = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def gather_findings(found: Sequence[Finding]) -> list[Finding]:
    """Those of all processes, to all of them.

    What is well is told once, by process 0; a fault names the processes that have it, unless all
    do.
    """
    told = gather([socket.gethostname(), [dataclasses.astuple(each) for each in found]])
    by: dict[Finding, list[str]] = {}
    for process, (host, theirs) in enumerate(told):
        for each in (Finding(*fields) for fields in theirs):
            by.setdefault(each, []).append(f"{process} ({host})")
    merged = []
    for each, processes in by.items():
        if len(processes) == len(told) or (each.level == OK and each in found):
            merged.append(each)
        elif each.level != OK:
            others = f" and {len(processes) - 4} more" if len(processes) > 4 else ""
            who = f"process {', '.join(processes[:4])}{others}: "
            merged.append(dataclasses.replace(each, text=who + each.text))
    return merged


def render(title: str, found: Sequence[Finding], file: Any = None) -> None:
    """Prints the report, in the order of the checks."""
    console = Console(file=file, highlight=False)
    if not console.is_terminal:
        console = Console(file=file, highlight=False, width=_WIDTH)
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for name, ratio in (("check", None), ("", None), ("found", 1)):
        table.add_column(name, ratio=ratio, overflow="fold", no_wrap=ratio is None)
    order = list(dict.fromkeys(each.check for each in found))
    before = None
    for each in sorted(found, key=lambda each: order.index(each.check)):
        style = _STYLES[each.level]
        table.add_row(
            rich.text.Text(each.check if each.check != before else "", "bold"),
            rich.text.Text(each.level, style),
            rich.text.Text(_cut(each.text)),
        )
        before = each.check
    console.print(table)


def _cut(text: str) -> str:
    lines = text.splitlines()
    more = len(lines) - _MAX_LINES
    return "\n".join(lines[:_MAX_LINES]) + (f"\n  and {more} more" if more > 0 else "")
