"""What a data set holds, and how much of a batch made from it is padding.

How many records there are is exact, the manifest's. Everything else is measured on a sample of
records, spread evenly over the shards and the same each time: a hundred million are not read.

Padding is measured by drawing captions as training does. A row of the model's input has text slots
and image slots; what its caption and its picture leave empty is computed all the same:

    text    slots of the batch               tokens of the caption, cut to the slots
    image   those of the square picture      tokens of the bucket
    joint   both                             both

With `data.text_slots` a batch has captions of one kind, and as many text slots as this kind needs.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from etils import epath
from jaxtyping import Int

from lumina_jax.data.buckets import Bucket
from lumina_jax.data.captions import KINDS, Caption, CaptionPolicy
from lumina_jax.data.images import Rejected
from lumina_jax.data.records import REMAKE, Record, Records, Split
from lumina_jax.errors import InputError
from lumina_jax.system_prompts import prefixed

QUANTILES = (0.05, 0.5, 0.95, 1.0)
_READ_AT_ONCE = 64

CountTokens = Callable[[Sequence[str]], Int[np.ndarray, " n"]]


@dataclasses.dataclass(frozen=True)
class Row:
    """What is measured of a record."""

    bucket: Bucket
    size: tuple[int, int]  # width and height of the original
    captions: tuple[Caption, ...]
    num_tokens: tuple[int, ...]  # of each caption behind the system prompt, before it is cut


@dataclasses.dataclass(frozen=True)
class Captions:
    """The captions of one kind, in one language or in all."""

    kind: str
    language: str | None
    num_captions: int  # estimated when only a sample was read
    num_tokens: tuple[float, ...]  # at QUANTILES
    cut: float  # share that is longer than the text slots


@dataclasses.dataclass(frozen=True)
class Statistics:
    num_records: int
    num_sampled: int
    buckets: Mapping[Bucket, int]  # number of records
    widths: tuple[float, ...]  # of the originals, at QUANTILES
    heights: tuple[float, ...]
    scales: tuple[float, ...]  # side of the bucket over side of the original, at QUANTILES
    enlarged: float  # share of the originals that are smaller than their bucket
    captions: tuple[Captions, ...]


@dataclasses.dataclass(frozen=True)
class Batches:
    """The batches with one number of text slots."""

    kind: str | None  # of their captions; None: mixed
    share: float  # of all batches
    text_slots: int
    num_tokens: Int[np.ndarray, " n"]  # of the text of each sampled row, before it is cut

    @property
    def text_tokens(self) -> Int[np.ndarray, " n"]:
        return np.minimum(self.num_tokens, self.text_slots)


@dataclasses.dataclass(frozen=True)
class Padding:
    """Slots and what fills them, on average over the rows of training."""

    text_slots: float
    text_tokens: float
    image_slots: int
    image_tokens: float

    @property
    def text(self) -> float:
        """Share of the text slots that are empty."""
        return 1 - self.text_tokens / self.text_slots

    @property
    def image(self) -> float:
        return 1 - self.image_tokens / self.image_slots

    @property
    def text_of_joint(self) -> float:
        """Share of all slots that are empty text slots."""
        return (self.text_slots - self.text_tokens) / (self.text_slots + self.image_slots)

    @property
    def joint(self) -> float:
        return 1 - (self.text_tokens + self.image_tokens) / (self.text_slots + self.image_slots)


def read_some(directory: epath.PathLike, split: Split, rows: Sequence[int]) -> Iterator[Record]:
    """Yields some records of a split, a few in memory at a time; InputError if one is damaged."""
    records = Records(directory, split)
    for start in range(0, len(rows), _READ_AT_ONCE):
        places = rows[start : start + _READ_AT_ONCE]
        try:
            found = [Record(content) for content in records.read(places)]
        except (Rejected, RuntimeError, ValueError, IndexError, OSError) as error:
            raise InputError(
                f"A record of {directory}, bucket {split.bucket}, of the numbers {places[0]} to "
                f"{places[-1]}, cannot be read ({error}). {REMAKE}"
            ) from error
        yield from found


def sample(
    directory: epath.PathLike,
    splits: Sequence[Split],
    num_records: int,
    count_tokens: CountTokens,
    system_prompt: str = "empty",
) -> list[Row]:
    """Reads records at even distances from all splits together.

    Args:
        directory: of the data set.
        splits: those to look at.
        num_records: how many; all, if there are fewer.
        count_tokens: of each text, however long it is.
        system_prompt: name of the text before every caption.
    """
    if num_records < 1:
        raise InputError(f"num_records={num_records} reads nothing; give 1 or more.")
    if not any(split.num_records for split in splits):
        raise InputError(f"{directory} has no records in these buckets; choose others.")
    found = []
    for split, rows in zip(splits, _spread(splits, num_records), strict=True):
        for record in read_some(directory, split, rows):
            captions = record.captions
            texts = [prefixed(caption.text, system_prompt) for caption in captions]
            num_tokens = tuple(count_tokens(texts).tolist()) if texts else ()
            found.append(Row(split.bucket, record.size, captions, num_tokens))
    return found


def _spread(splits: Sequence[Split], num_records: int) -> list[list[int]]:
    """Rows of each split, at even distances in all of them joined."""
    ends = np.cumsum([split.num_records for split in splits])
    num_records = min(num_records, int(ends[-1]))
    rows = (2 * np.arange(num_records) + 1) * ends[-1] // (2 * num_records)
    of_splits = np.split(rows, np.searchsorted(rows, ends[:-1]))
    return [
        (rows - end + split.num_records).tolist()
        for rows, end, split in zip(of_splits, ends, splits, strict=True)
    ]


def summarize(splits: Sequence[Split], rows: Sequence[Row], max_tokens: int) -> Statistics:
    """Returns the numbers of the splits that the rows were read from."""
    num_records = sum(split.num_records for split in splits)
    lengths: dict[tuple[str, str | None], list[int]] = {}
    for row in rows:
        for caption, num_tokens in zip(row.captions, row.num_tokens, strict=True):
            for language in (caption.language, None):
                lengths.setdefault((caption.kind, language), []).append(num_tokens)

    def measure(kind: str, language: str | None) -> Captions:
        of_pair = np.array(lengths[kind, language])
        number = round(len(of_pair) * num_records / len(rows))
        cut = float(np.mean(of_pair > max_tokens))
        return Captions(kind, language, number, _quantiles(of_pair), cut)

    widths, heights = np.array([row.size for row in rows]).T
    stored = np.array([row.bucket.width * row.bucket.height for row in rows])
    scales = np.sqrt(stored / (widths * heights))
    pairs = sorted(lengths, key=lambda pair: (KINDS.index(pair[0]), pair[1] or ""))
    return Statistics(
        num_records=num_records,
        num_sampled=len(rows),
        buckets={split.bucket: split.num_records for split in splits},
        widths=_quantiles(widths),
        heights=_quantiles(heights),
        scales=_quantiles(scales),
        enlarged=float(np.mean(scales > 1)),
        captions=tuple(measure(*pair) for pair in pairs),
    )


def _quantiles(values: np.ndarray) -> tuple[float, ...]:
    return tuple(np.quantile(values, QUANTILES).tolist())


def draw_num_tokens(
    rows: Sequence[Row], policy: CaptionPolicy, num_empty: int, kind: str | None = None
) -> Int[np.ndarray, " n"]:
    """Returns the tokens of one text for each row, before it is cut, drawn as training draws it.

    Args:
        rows: of `sample`.
        policy: that of training.
        num_empty: tokens of the text that stands for a dropped caption.
        kind: of all rows of a batch; those that lack it fall back to one of theirs.
    """
    draws = np.random.default_rng(0).random((len(rows), policy.NUM_DRAWS)).tolist()
    chosen = (
        policy.choose(row.captions, row_draws, kind)
        for row, row_draws in zip(rows, draws, strict=True)
    )
    return np.array(
        [
            num_empty if index is None else row.num_tokens[index]
            for row, index in zip(rows, chosen, strict=True)
        ]
    )


def choose_text_slots(
    rows: Sequence[Row],
    policy: CaptionPolicy,
    max_tokens: int,
    *,
    step: int = 64,
    may_cut: float = 0.01,
) -> dict[str, int]:
    """Returns the text slots that each kind needs, in steps up to `max_tokens`.

    They are the fewest that cut no more than the share `may_cut` of the captions in a batch of this
    kind; those that fall back to another kind count as well.
    """
    policy = dataclasses.replace(policy, dropout=0.0)
    slots = {}
    for kind in _kind_shares(policy):
        num_tokens = np.sort(draw_num_tokens(rows, policy, 0, kind))
        needed = int(num_tokens[-1 - math.floor(may_cut * len(rows))])
        slots[kind] = min(math.ceil(needed / step) * step, max_tokens)
    return slots


def draw_batches(
    rows: Sequence[Row],
    policy: CaptionPolicy,
    num_empty: int,
    text_slots: int | Mapping[str, int],
) -> list[Batches]:
    """Returns the batches of training: all alike with one number of slots, else one of each kind.

    Args:
        rows: of `sample`.
        policy: that of training.
        num_empty: tokens of the text that stands for a dropped caption.
        text_slots: of every batch, or of the batches of each kind.
    """
    if isinstance(text_slots, int):
        num_tokens = draw_num_tokens(rows, policy, num_empty)
        return [Batches(None, 1.0, text_slots, num_tokens)]
    return [
        Batches(kind, share, text_slots[kind], draw_num_tokens(rows, policy, num_empty, kind))
        for kind, share in _kind_shares(policy).items()
    ]


def padding(
    batches: Sequence[Batches], image_slots: int, image_tokens: Int[np.ndarray, " n"]
) -> Padding:
    """Returns the slots of a mixture of batches, given the tokens of each picture."""
    return Padding(
        text_slots=sum(b.share * b.text_slots for b in batches),
        text_tokens=sum(b.share * float(b.text_tokens.mean()) for b in batches),
        image_slots=image_slots,
        image_tokens=float(image_tokens.mean()),
    )


def _kind_shares(policy: CaptionPolicy) -> dict[str, float]:
    weights = {kind: policy.kinds[kind] for kind in KINDS if policy.kinds.get(kind)}
    return {kind: weight / sum(weights.values()) for kind, weight in weights.items()}
