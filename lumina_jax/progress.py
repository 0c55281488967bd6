"""A progress bar with time left on a terminal, a line now and then in a log file."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import rich.progress as bars
from absl import logging
from rich.console import Console


@contextmanager
def progress_bar(description: str, total: int, start: int = 0, unit: str = "it") -> Iterator:
    """Yields `advance(done, text)`, to be called with the count so far and what to show beside it.

    Lines in a log come at most every ten seconds.
    """
    if sys.stderr.isatty():
        columns = (  # narrow: all of them fit 80 characters
            bars.TextColumn("{task.description}"),
            bars.BarColumn(bar_width=10),
            bars.MofNCompleteColumn(),
            bars.TimeRemainingColumn(compact=True),
            bars.TextColumn("left"),
            bars.TextColumn("{task.fields[text]}"),
        )
        with bars.Progress(*columns, console=_console()) as bar:
            task = bar.add_task(description, total=total, completed=start, text="")
            yield lambda done, text="": bar.update(task, completed=done, text=text)
        return

    began = last = time.monotonic()

    def advance(done, text=""):
        nonlocal last
        now = time.monotonic()
        if now - last < 10 and done < total:
            return
        last = now
        left = (now - began) / max(done - start, 1) * (total - done)
        logging.info("%s %d/%d %s, %s left. %s", description, done, total, unit, _clock(left), text)

    yield advance


def _console() -> Console:

    return Console(stderr=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
