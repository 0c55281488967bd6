"""What became of the pictures and answers of a captioning run, and what the rest will cost."""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from lumina_jax.data.caption_table import Row
from lumina_jax.data.captions import KINDS

NUM_SAMPLES = 5  # of each fault
_SHOWN = 300  # letters of a sample

CountTokens = Callable[[Sequence[str]], Int[np.ndarray, " n"]]


class Counts:
    """Counts of rows, which can be added up over parts.

    Attributes:
        num_pictures: rows.
        broken: pictures that could not be captioned, by reason.
        passed: captions, by (kind, language).
        at_once: of them, those that passed at the first attempt.
        excluded: captions that no attempt got through, by (kind, language, fault).
        rejected: answers that did not pass, by fault.
        samples: of each fault, some (id, kind, language, detail, text).
        lengths: captions of so many tokens as the text encoder reads them, by (kind, language).
        read: tokens that the models read, over pictures; and the sum of their squares.
        wrote: tokens that they wrote, likewise.
        num_timed: pictures of which the time is known, and `seconds` it.
        max_tokens: that the text encoder reads.
    """

    def __init__(self, count_tokens: CountTokens | None = None, max_tokens: int = 256):
        self._count_tokens, self.max_tokens = count_tokens, max_tokens
        self.num_pictures, self.num_timed, self.seconds = 0, 0, 0.0
        self.broken: collections.Counter[str] = collections.Counter()
        self.passed: collections.Counter[tuple[str, str]] = collections.Counter()
        self.at_once: collections.Counter[tuple[str, str]] = collections.Counter()
        self.excluded: collections.Counter[tuple[str, str, str]] = collections.Counter()
        self.rejected: collections.Counter[str] = collections.Counter()
        self.samples: dict[str, list[list[str]]] = {}
        self.lengths: dict[tuple[str, str], collections.Counter[int]] = {}
        self.read, self.wrote = [0, 0], [0, 0]

    def add(self, row: Row) -> None:
        self.num_pictures += 1
        if row.fault is not None:
            reason, detail = row.fault
            self.broken[reason] += 1
            self._show(reason, [row.id, "", "", detail, ""])
            return
        failed = {(kind, language) for kind, language, _ in row.rejected}
        for caption in row.captions:
            pair = caption.kind, caption.language
            self.passed[pair] += 1
            self.at_once[pair] += pair not in failed
        for caption in row.excluded:
            self.excluded[caption.kind, caption.language, caption.fault] += 1
            shown = [row.id, caption.kind, caption.language, caption.detail, caption.text]
            self._show(caption.fault, [text[:_SHOWN] for text in shown])
        self.rejected.update(fault for *_, fault in row.rejected)
        for sums, number in zip((self.read, self.wrote), row.tokens, strict=True):
            sums[0] += number
            sums[1] += number**2
        if self._count_tokens is not None and row.captions:
            lengths = self._count_tokens([caption.text for caption in row.captions])
            for caption, length in zip(row.captions, lengths, strict=True):
                found = self.lengths.setdefault(
                    (caption.kind, caption.language), collections.Counter()
                )
                found[int(length)] += 1

    def time(self, num_pictures: int, seconds: float) -> None:
        """So many pictures took so many seconds, all together."""
        self.num_timed += num_pictures
        self.seconds += seconds

    def _show(self, fault: str, sample: Sequence[str]) -> None:
        samples = self.samples.setdefault(fault, [])
        if len(samples) < NUM_SAMPLES:
            samples.append(list(sample))

    def to_json(self) -> dict[str, Any]:
        return {
            "num_pictures": self.num_pictures,
            "num_timed": self.num_timed,
            "seconds": self.seconds,
            "tokens_read": self.read,
            "tokens_written": self.wrote,
            "max_tokens": self.max_tokens,
            "broken": self.broken,
            "passed": _joined(self.passed),
            "at_once": _joined(self.at_once),
            "excluded": _joined(self.excluded),
            "rejected": self.rejected,
            "lengths": _joined(self.lengths),
            "samples": self.samples,
        }

    def merge(self, content: Mapping[str, Any]) -> None:
        """Adds what `to_json` gave for other rows."""
        self.num_pictures += content["num_pictures"]
        self.time(content["num_timed"], content["seconds"])
        for sums, others in ((self.read, "tokens_read"), (self.wrote, "tokens_written")):
            sums[:] = [a + b for a, b in zip(sums, content[others], strict=True)]
        self.broken.update(content["broken"])
        self.rejected.update(content["rejected"])
        for mine, name in (
            (self.passed, "passed"), (self.at_once, "at_once"), (self.excluded, "excluded")
        ):  # fmt: skip
            mine.update({tuple(key.split("/")): count for key, count in content[name].items()})
        for key, lengths in content["lengths"].items():
            found = self.lengths.setdefault(tuple(key.split("/")), collections.Counter())
            found.update({int(length): count for length, count in lengths.items()})
        for fault, samples in content["samples"].items():
            for sample in samples:
                self._show(fault, sample)

    def pairs(self) -> list[tuple[str, str]]:
        """The (kind, language) of all captions, in the order of the levels."""
        found = {*self.passed, *((kind, language) for kind, language, _ in self.excluded)}
        return sorted(found, key=lambda pair: (KINDS.index(pair[0]), pair[1]))

    def num_excluded(self, kind: str, language: str) -> int:
        return sum(n for (k, la, _), n in self.excluded.items() if (k, la) == (kind, language))

    def excluded_by_fault(self) -> collections.Counter[str]:
        found: collections.Counter[str] = collections.Counter()
        for (*_, fault), count in self.excluded.items():
            found[fault] += count
        return found


def _joined(counts: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    return {"/".join(key): count for key, count in counts.items()}


def quantiles(lengths: Mapping[int, int], shares: Sequence[float]) -> list[int]:
    """Returns the lengths that these shares of the captions do not exceed."""
    values, counts = list(lengths), list(lengths.values())
    return np.quantile(values, shares, weights=counts, method="inverted_cdf").tolist()


class Range(NamedTuple):
    """An estimate, and how far off it may well be: 1.96 standard errors of it."""

    value: float
    error: float


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What as many pictures would take as were not tried.

    Attributes:
        pictures_per_second: of one worker; None where no time is known.
        read: tokens for a picture.
        wrote: likewise.
        worker_hours: for all pictures; None where no time is known.
        dollars: of the workers' time and of the tokens; None where no price is known.
    """

    pictures_per_second: float | None
    read: Range
    wrote: Range
    worker_hours: float | None
    dollars: Range | None


def estimate(
    counts: Counts,
    num_pictures: float,
    *,
    dollars_per_hour: float = 0.0,
    dollars_per_million: tuple[float, float] = (0.0, 0.0),
) -> Estimate:
    """Extrapolates what was counted.

    Args:
        counts: of a run of any size.
        num_pictures: to be captioned.
        dollars_per_hour: of one worker, with all of its devices.
        dollars_per_million: tokens read, and tokens written.
    """
    rate = counts.num_timed / counts.seconds if counts.seconds else None
    read, wrote = (_per_picture(sums, counts.num_pictures) for sums in (counts.read, counts.wrote))
    hours = num_pictures / rate / 3600 if rate else None
    dollars = None
    if any(dollars_per_million) or (dollars_per_hour and hours is not None):
        prices = [price * num_pictures / 1e6 for price in dollars_per_million]
        value = dollars_per_hour * (hours or 0) + prices[0] * read.value + prices[1] * wrote.value
        error = math.hypot(prices[0] * read.error, prices[1] * wrote.error)
        dollars = Range(value, error)
    return Estimate(rate, read, wrote, hours, dollars)


def _per_picture(sums: Sequence[int], count: int) -> Range:
    if not count:
        return Range(0.0, 0.0)
    mean = sums[0] / count
    variance = max(sums[1] / count - mean**2, 0.0) * count / max(count - 1, 1)
    return Range(mean, 1.96 * math.sqrt(variance / count))
