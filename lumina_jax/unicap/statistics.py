"""What the captions of many pictures are like: how long, in which words, how alike.

All of it is measured on rows of a table of captions. Of a large table these are the rows of some
pieces at even distances, the same each time; memory grows with what is read, not with the table.

A word is a run of letters, digits and their marks, whatever stands between: "cat's" and
"black-and-white" are one each. Of Chinese and Japanese each character counts as a word. Scripts
that also write without blanks, such as Thai, have a word for each run, which is longer than theirs.

A repeat is a caption whose text a picture before it has already, in the same kind and language;
case, width, blanks and the punctuation at both ends make no difference.
"""

import collections
import dataclasses
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Int

from lumina_jax import files
from lumina_jax.data import caption_table
from lumina_jax.data.caption_table import Piece, Row
from lumina_jax.data.captions import KINDS
from lumina_jax.errors import InputError

QUANTILES = (0.05, 0.5, 0.95)
OPENING = 3  # words
NUM_OPENINGS = 12  # of all kinds and languages
NUM_REPEATED = 8  # texts, of all
SHOWN = 80  # characters of a text in a table

CountTokens = Callable[[Sequence[str]], Int[np.ndarray, " n"]]

_CJK = "\u3005-\u3007\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
# Python's \w leaves out the marks that belong to a letter, and Hindi has one in every word.
_MARKS = "".join(c for c in map(chr, range(0x10000)) if unicodedata.category(c)[0] == "M")
_RUN = rf"(?:[^\W_{_CJK}][{_MARKS}\u200c\u200d]*)+"
_WORD = re.compile(rf"[{_CJK}]|{_RUN}(?:['’-]{_RUN})*")
_ENDS = " .,;:!?\"'…“”‘’«»。，、！？；："
_GROWTH = 1.1  # from one point of the curve to the next


class Place(NamedTuple):
    """Where a row is."""

    piece: Piece
    row: int


class Lengths(NamedTuple):
    """Of captions, in characters, words or tokens."""

    mean: float
    quantiles: tuple[float, ...]  # at QUANTILES
    counts: Mapping[int, int]  # captions of each length


class Frequent(NamedTuple):
    """A text that many captions have, or begin with."""

    text: str
    language: str
    number: int  # of captions


@dataclasses.dataclass(frozen=True)
class Captions:
    """The captions of one kind in one language.

    Attributes:
        kind: of all of them.
        language: likewise.
        number: of captions.
        characters: Unicode's code points.
        words: see above.
        tokens: with the system prompt, before they are cut; None where they were not counted.
        over: share with more tokens than the text encoder reads; None likewise.
        num_distinct: words that differ, whatever their case.
        num_once: of these, the words that stand in one place only.
        growth: (words read, distinct ones among them), from the first caption to the last.
        openings: the commonest first words, where two captions or more share them.
        repeats: captions that a picture before has already.
    """

    kind: str
    language: str
    number: int
    characters: Lengths
    words: Lengths
    tokens: Lengths | None
    over: float | None
    num_distinct: int
    num_once: int
    growth: tuple[tuple[int, int], ...]
    openings: tuple[Frequent, ...]
    repeats: int

    @property
    def num_words(self) -> int:
        return self.growth[-1][0]


class Excluded(NamedTuple):
    """Captions that did not pass, for the same reason."""

    fault: str
    kinds: Mapping[str, int]
    example: str  # the detail of the first


class Fault(NamedTuple):
    """Pictures without captions, for the same reason."""

    reason: str
    number: int
    example: str  # the id and the detail of the first


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Of the rows that were read.

    Attributes:
        num_rows: pictures, whatever became of them.
        num_captioned: those with a caption or more.
        max_tokens: of the text encoder; 0 where tokens were not counted.
        captions: of each kind and language, the kinds in their order, the languages by number.
        repeated: texts that the most pictures share.
        excluded: the commonest reason first.
        faults: likewise.
    """

    num_rows: int
    num_captioned: int
    max_tokens: int
    captions: tuple[Captions, ...]
    repeated: tuple[Frequent, ...]
    excluded: tuple[Excluded, ...]
    faults: tuple[Fault, ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        """Those that have captions, from long to tags."""
        found = {captions.kind for captions in self.captions}
        return tuple(kind for kind in KINDS if kind in found)

    @property
    def languages(self) -> tuple[str, ...]:
        """Those that have captions, the commonest first."""
        return tuple(_by_number((c.language, c.number) for c in self.captions))


def choose_pieces(directory: epath.PathLike, num_rows: int) -> tuple[list[Piece], int]:
    """Returns pieces at even distances with about so many rows together, and how many there are.

    Args:
        directory: of the table, complete or still being made.
        num_rows: wanted.
    """
    if num_rows < 1:
        raise InputError(f"num_rows={num_rows} reads nothing; give 1 or more.")
    # One listing: a large table has some 400,000 pieces.
    listed = files.sizes(directory).items()
    sizes = {piece: size for name, size in listed if (piece := Piece.parse(name))}
    if not sizes:
        raise InputError(
            f"{directory} has no captions yet. Wait until tools/caption.py has written its first "
            "piece, or give another table."
        )
    # The others by their bytes: the last piece of a part has fewer rows.
    largest = max(sizes, key=sizes.__getitem__)
    rows = max(1, len(caption_table.read_rows(directory, largest)))
    total = rows * sum(sizes.values()) / sizes[largest]
    pieces = sorted(sizes)
    chosen = evenly(len(pieces), round(num_rows / total * len(pieces)))
    return [pieces[index] for index in chosen], len(pieces)


def evenly(total: int, number: int) -> list[int]:
    """Returns so many of the numbers below `total` at even distances, at least one; all if fewer.

    Args:
        total: 1 or more.
        number: wanted.
    """
    number = min(max(number, 1), total)
    return [(2 * index + 1) * total // (2 * number) for index in range(number)]


def read(directory: epath.PathLike, pieces: Iterable[Piece]) -> Iterator[tuple[Place, Row]]:
    """Yields the rows of pieces, one piece in memory at a time."""
    for piece in pieces:
        for number, row in enumerate(caption_table.read_rows(directory, piece)):
            yield Place(piece, number), row


def words_of(text: str) -> list[str]:
    """Returns the words of a text, in lower case."""
    return _WORD.findall(text.casefold())


def measure(
    rows: Iterable[Row],
    count_tokens: CountTokens | None = None,
    max_tokens: int = 0,
) -> Statistics:
    """Returns the statistics of rows, each of which is looked at once.

    Args:
        rows: of pictures.
        count_tokens: of each caption with the system prompt before it, however long it is; None
            counts none.
        max_tokens: that the text encoder reads.
    """
    num_rows = num_captioned = 0
    found: dict[tuple[str, str], _Counter] = collections.defaultdict(_Counter)
    excluded: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    faults: collections.Counter[str] = collections.Counter()
    examples: dict[tuple[str, str], str] = {}
    for row in rows:
        num_rows += 1
        num_captioned += bool(row.captions)
        num_tokens: list[int] = []
        if count_tokens and row.captions:
            num_tokens = count_tokens([caption.text for caption in row.captions]).tolist()
        for number, caption in enumerate(row.captions):
            counter = found[caption.kind, caption.language]
            counter.add(row.id, caption.text, num_tokens[number] if num_tokens else None)
        for caption in row.excluded:
            excluded[caption.fault][caption.kind] += 1
            examples.setdefault(("excluded", caption.fault), caption.detail)
        if row.fault:
            faults[row.fault[0]] += 1
            examples.setdefault(("fault", row.fault[0]), f"{row.id}: {row.fault[1]}")

    languages = _by_number((language, c.number) for (_, language), c in found.items())
    captions = [
        found[kind, language].captions(kind, language, max_tokens)
        for kind in KINDS
        for language in languages
        if (kind, language) in found
    ]
    repeated = [
        Frequent(text, language, number)
        for (_, language), counter in found.items()
        for text, number in counter.repeated.most_common(NUM_REPEATED)
    ]
    return Statistics(
        num_rows,
        num_captioned,
        max_tokens if count_tokens else 0,
        tuple(captions),
        tuple(sorted(repeated, key=lambda frequent: -frequent.number)[:NUM_REPEATED]),
        tuple(
            Excluded(fault, excluded[fault], examples["excluded", fault])
            for fault in _by_number((f, kinds.total()) for f, kinds in excluded.items())
        ),
        tuple(Fault(name, n, examples["fault", name]) for name, n in faults.most_common()),
    )


class _Counter:
    """Counts the captions of one kind in one language."""

    def __init__(self):
        self.number = 0
        self.characters, self.words, self.tokens = (collections.Counter[int]() for _ in range(3))
        self.vocabulary, self.openings = (collections.Counter[str]() for _ in range(2))
        self.num_words = 0
        self.growth: list[tuple[int, int]] = []
        self.repeats = 0
        self.repeated = collections.Counter[str]()  # captions of each text that two pictures have
        self._first: dict[int, str] = {}  # the id of the first picture with a text

    def add(self, id: str, text: str, num_tokens: int | None) -> None:
        words = words_of(text)
        self.number += 1
        self.characters[len(text)] += 1
        self.words[len(words)] += 1
        if num_tokens is not None:
            self.tokens[num_tokens] += 1
        self.vocabulary.update(words)
        self.num_words += len(words)
        if not self.growth or self.num_words >= _GROWTH * self.growth[-1][0]:
            self.growth.append((self.num_words, len(self.vocabulary)))
        if len(words) >= OPENING:
            self.openings[_joined(words[:OPENING])] += 1
        key = _normalised(text)
        if self._first.setdefault(hash(key), id) != id:
            self.repeats += 1
            # The first one was not counted when it was met.
            self.repeated[key] += 1 if key in self.repeated else 2

    def captions(self, kind: str, language: str, max_tokens: int) -> Captions:
        openings = self.openings.most_common(NUM_OPENINGS)
        is_over = [n for length, n in self.tokens.items() if length > max_tokens]
        return Captions(
            kind,
            language,
            self.number,
            _lengths(self.characters),
            _lengths(self.words),
            _lengths(self.tokens) if self.tokens else None,
            sum(is_over) / self.number if self.tokens else None,
            len(self.vocabulary),
            sum(number == 1 for number in self.vocabulary.values()),
            (*self.growth, (self.num_words, len(self.vocabulary))),
            tuple(Frequent(text, language, n) for text, n in openings if n > 1),
            self.repeats,
        )


def _lengths(counts: collections.Counter[int]) -> Lengths:
    values, weights = np.array(sorted(counts.items())).T
    quantiles = np.quantile(values, QUANTILES, weights=weights, method="inverted_cdf")
    return Lengths(float(np.average(values, weights=weights)), tuple(quantiles.tolist()), counts)


def _normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(_ENDS)


def _joined(words: Sequence[str]) -> str:
    """Words as they are written: with blanks between them, but for Chinese and Japanese."""
    return re.sub(rf"(?<=[{_CJK}]) (?=[{_CJK}])", "", " ".join(words))


def _by_number(pairs: Iterable[tuple[str, int]]) -> list[str]:
    """Names, those with the most first; those of equal number by the alphabet."""
    numbers: collections.Counter[str] = collections.Counter()
    for name, number in pairs:
        numbers[name] += number
    return sorted(numbers, key=lambda name: (-numbers[name], name))


class Table(NamedTuple):
    """Numbers to be shown, on a terminal or a page.

    Attributes:
        title: what they are.
        columns: their names; "" has texts.
        num_names: how many of the first columns are names; the other ones are numbers.
        rows: the cells.
        languages: of the texts of each row, None where it has none.
        note: what must be said with it, or "".
    """

    title: str
    columns: tuple[str, ...]
    num_names: int
    rows: tuple[tuple[str, ...], ...]
    languages: tuple[str | None, ...]
    note: str = ""


def tables(found: Statistics) -> list[Table]:
    """Returns the statistics as tables; those that would be empty are left out."""
    made = []

    def add(title, names, numbers, rows, languages=None, note=""):
        rows = tuple(rows)
        languages = tuple(languages or [None] * len(rows))
        if rows:
            made.append(Table(title, (*names, *numbers), len(names), rows, languages, note))

    pair = ("captions", "language")
    quantiles = ("mean", "5%", "median", "95%")
    add(
        "Captions",
        ("captions",),
        (*found.languages, "all"),
        (_counts_of_kind(found, kind) for kind in found.kinds),
    )
    add(
        "Characters",
        pair,
        quantiles,
        ((c.kind, c.language, *_cells(c.characters)) for c in found.captions),
    )
    add(
        "Words",
        pair,
        quantiles,
        ((c.kind, c.language, *_cells(c.words)) for c in found.captions),
        note="each character of Chinese and Japanese counts as a word",
    )
    if found.max_tokens:
        add(
            "Tokens",
            pair,
            (*quantiles, f"over {found.max_tokens}"),
            (
                (c.kind, c.language, *_cells(c.tokens), f"{c.over:.1%}")
                for c in found.captions
                if c.tokens is not None
            ),
            note="of the text encoder, with the system prompt; what is over is cut",
        )
    add(
        "Vocabulary",
        pair,
        ("words", "distinct", "per 1000", "once", "repeats"),
        (
            (
                c.kind,
                c.language,
                f"{c.num_words:,}",
                f"{c.num_distinct:,}",
                f"{1000 * c.num_distinct / max(c.num_words, 1):,.0f}",
                f"{c.num_once:,}",
                f"{c.repeats / c.number:.1%}",
            )
            for c in found.captions
        ),
        note="repeats: captions that a picture before has already",
    )
    openings = [(c, opening) for c in found.captions for opening in c.openings]
    openings.sort(key=lambda pair: -pair[1].number / pair[0].number)
    add(
        "Openings",
        (*pair, ""),
        ("captions", "share"),
        (
            (c.kind, c.language, f"{o.text} …", f"{o.number:,}", f"{o.number / c.number:.1%}")
            for c, o in openings[:NUM_OPENINGS]
        ),
        [c.language for c, _ in openings[:NUM_OPENINGS]],
        note=f"the commonest first {OPENING} words",
    )
    add(
        "Repeated",
        ("language", ""),
        ("captions",),
        ((f.language, _cut(f.text), f"{f.number:,}") for f in found.repeated),
        [f.language for f in found.repeated],
    )
    add(
        "Excluded captions",
        ("fault", "for example"),
        kinds := _kinds(found),
        (
            (e.fault, _cut(e.example), *(f"{e.kinds.get(kind, 0):,}" for kind in kinds))
            for e in found.excluded
        ),
    )
    add(
        "Pictures without captions",
        ("fault", "for example"),
        ("pictures",),
        ((f.reason, _cut(f.example), f"{f.number:,}") for f in found.faults),
    )
    return made


def _counts_of_kind(found: Statistics, kind: str) -> tuple[str, ...]:
    numbers = {c.language: c.number for c in found.captions if c.kind == kind}
    of_languages = (numbers.get(language, 0) for language in found.languages)
    return (kind, *(f"{n:,}" for n in of_languages), f"{sum(numbers.values()):,}")


def _kinds(found: Statistics) -> tuple[str, ...]:
    """Those that captions were excluded of."""
    kinds = {kind for excluded in found.excluded for kind in excluded.kinds}
    return tuple(sorted(kinds, key=lambda kind: (KINDS.index(kind) if kind in KINDS else 9, kind)))


def _cells(lengths: Lengths) -> tuple[str, ...]:
    return (f"{lengths.mean:,.1f}", *(f"{value:,.0f}" for value in lengths.quantiles))


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
