"""What is known of all pictures without their bytes, and the plan that follows from it.

The index of a part is small (under 200 bytes a picture), so one machine can look at those of 100M
pictures: it finds duplicates across parts and says which records go to which shard. The plan is a
function of the indices alone: who makes it again, after a run was killed, makes the same one.
"""

import collections
import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Int, Int32, UInt64

from lumina_jax.data.captions import Caption
from lumina_jax.data.images import Rejected
from lumina_jax.data.records import CaptionSet

NUM_EXAMPLES = 10  # of each reason, in the report


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of every picture.

    Attributes:
        num_read: pictures that the source gave.
        written: records of each target.
        rejected: of each target, how many for each reason.
        examples: of each reason, some (id, detail).
    """

    num_read: int
    written: tuple[int, ...]
    rejected: tuple[Mapping[str, int], ...]
    examples: Mapping[str, Sequence[tuple[str, str]]]

    def __post_init__(self):
        """Nothing is lost silently."""
        for written, rejected in zip(self.written, self.rejected, strict=True):
            if written + sum(rejected.values()) != self.num_read:
                raise RuntimeError(
                    f"{self.num_read} pictures were read, but {written} were written and "
                    f"{sum(rejected.values())} rejected: {self}. This is a fault of lumina_jax."
                )


class _Rejections:
    """Counts why pictures are not taken, and remembers some of them."""

    def __init__(self, num_targets: int):
        self.counts = tuple(collections.Counter() for _ in range(num_targets))
        self.examples: dict[str, list[tuple[str, str]]] = {}

    def add(self, column: int, id: str, reason: str, detail: str) -> None:
        self.counts[column][reason] += 1
        self.show(id, reason, detail)

    def show(self, id: str, reason: str, detail: str) -> None:
        examples = self.examples.setdefault(reason, [])
        if len(examples) < NUM_EXAMPLES and id not in dict(examples):
            examples.append((id, detail))

    def update(self, counts: Sequence[Mapping[str, int]], examples: Mapping) -> None:
        for mine, others in zip(self.counts, counts, strict=True):
            mine.update(others)
        for reason, shown in examples.items():
            for id, detail in shown:
                self.show(id, reason, detail)


class IndexWriter:
    """Gathers the index of a part: what was rejected, and of each other picture one row.

    Attributes:
        num_read: pictures given by the source.
        attempt: names the spools that belong to this index.
    """

    def __init__(self, num_targets: int, attempt: str):
        self.num_read, self.attempt = 0, attempt
        self._rejections = _Rejections(num_targets)
        self._caption_sets: dict[tuple[tuple[str, str], ...], int] = {}
        self._ids: list[str] = []
        self._rows: list[tuple] = []

    def reject(self, column: int, id: str, why: Rejected) -> None:
        self._rejections.add(column, id, why.reason, why.detail)

    def reject_everywhere(self, id: str, why: Rejected) -> None:
        for column in range(len(self._rejections.counts)):
            self.reject(column, id, why)

    def add(
        self,
        id: str,
        captions: Sequence[Caption],
        pixels: bytes,
        stored: Sequence[tuple[int, bytes] | None],
    ) -> None:
        """Takes a picture.

        Args:
            id: of it.
            captions: of it.
            pixels: what is equal for equal pictures, of any length.
            stored: for each target (index of the bucket, record); None where it was rejected.
        """
        pairs = tuple(sorted({(c.kind, c.language) for c in captions}))
        caption_set = self._caption_sets.setdefault(pairs, len(self._caption_sets))
        columns = [
            (-1, 0, (0, 0)) if s is None else (s[0], len(s[1]), _digest(s[1])) for s in stored
        ]
        self._ids.append(id)
        self._rows.append((_digest(pixels), _digest(id.encode()), caption_set, columns))

    def to_bytes(self) -> bytes:
        """The index as a file."""
        summary = {
            "num_read": self.num_read,
            "attempt": self.attempt,
            "rejected": self._rejections.counts,
            "examples": self._rejections.examples,
            "ids": self._ids,
            "caption_sets": list(self._caption_sets),
        }
        columns = [column for *_, columns in self._rows for column in columns]
        shape = (len(self._rows), len(self._rejections.counts))
        content = io.BytesIO()
        np.savez(
            content,
            summary=np.frombuffer(json.dumps(summary).encode(), np.uint8),
            pixels=_digests([row[0] for row in self._rows]),
            id_digests=_digests([row[1] for row in self._rows]),
            caption_sets=np.array([row[2] for row in self._rows], np.int32),
            buckets=np.array([c[0] for c in columns], np.int16).reshape(shape),
            num_bytes=np.array([c[1] for c in columns], np.int64).reshape(shape),
            digests=_digests([c[2] for c in columns]).reshape(*shape, 2),
        )
        return content.getvalue()


class Index:
    """The index of a part as it was written; arrays have a row for each picture.

    Attributes:
        num_read: pictures given by the source, good or bad.
        attempt: names the spools that belong to this index.
        rejected: of each target, how many for each reason.
        examples: of each reason, some (id, detail).
        ids: of the pictures.
        pixels: digests of their pixels [n, 2].
        id_digests: of their ids [n, 2].
        caption_sets: which of `pairs` their captions are [n].
        pairs: sets of (kind, language).
        buckets: [n, targets]; -1 where the target has no record.
        num_bytes: of the records [n, targets].
        digests: of the records [n, targets, 2].
    """

    def __init__(self, content: bytes):
        arrays = np.load(io.BytesIO(content), allow_pickle=False)
        summary = json.loads(arrays["summary"].tobytes())
        self.num_read: int = summary["num_read"]
        self.attempt: str = summary["attempt"]
        self.rejected: list[dict[str, int]] = summary["rejected"]
        self.examples: dict[str, list[list[str]]] = summary["examples"]
        self.ids: list[str] = summary["ids"]
        self.pairs = [tuple(tuple(pair) for pair in pairs) for pairs in summary["caption_sets"]]
        self.pixels, self.id_digests = arrays["pixels"], arrays["id_digests"]
        self.caption_sets, self.buckets = arrays["caption_sets"], arrays["buckets"]
        self.num_bytes, self.digests = arrays["num_bytes"], arrays["digests"]


@dataclasses.dataclass(frozen=True)
class PlannedShard:
    """A shard to fill with `records`, given as (part, place in the spool of its target) [n, 2]."""

    column: int
    bucket: int
    number: int
    count: int  # of the shards of the bucket
    records: Int32[np.ndarray, "n 2"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which shards there will be.

    Attributes:
        shards: to fill.
        attempts: of each part, the one whose index was planned with.
        caption_sets: of each (column, bucket) with records.
        fingerprints: of each target; it changes with any byte of a record, and with their order.
        report: of the whole run.
    """

    shards: tuple[PlannedShard, ...]
    attempts: tuple[str, ...]
    caption_sets: Mapping[tuple[int, int], tuple[CaptionSet, ...]]
    fingerprints: tuple[str, ...]
    report: Report


def make_plan(
    indices: Callable[[], Iterator[Index]],
    num_targets: int,
    *,
    shard_bytes: int,
    keep_duplicates: bool,
) -> Plan:
    """Decides which pictures are kept, and the shard of each record.

    Of equal pictures, and of those that share an id, the first one stays. It needs about a hundred
    bytes of memory for a picture.

    Args:
        indices: gives those of all parts, in order; called twice.
        num_targets: how many there are.
        shard_bytes: size of a shard.
        keep_duplicates: whether pictures may be equal.
    """
    repeated = _Repeated(indices(), keep_duplicates)
    rejections = _Rejections(num_targets)
    fillings: dict[tuple[int, int], _Filling] = collections.defaultdict(_Filling)
    num_read, first, attempts = 0, 0, []
    for number, index in enumerate(indices()):
        num_read += index.num_read
        attempts.append(index.attempt)
        rejections.update(index.rejected, index.examples)
        kept = repeated.reject(index, first, rejections)
        first += len(index.ids)
        for column in range(num_targets):
            buckets = index.buckets[:, column]
            spooled = np.cumsum(buckets >= 0) - 1  # the spool has none of the rejected
            for bucket in np.unique(buckets[kept & (buckets >= 0)]).tolist():
                rows = np.flatnonzero(kept & (buckets == bucket))
                fillings[column, bucket].add(
                    number, index, rows, spooled[rows], column, shard_bytes
                )
    keys = sorted(fillings)
    written = [0] * num_targets
    hashes = [hashlib.sha256() for _ in range(num_targets)]
    for column, bucket in keys:
        written[column] += fillings[column, bucket].num_records
        hashes[column].update(f"{bucket} {fillings[column, bucket].digest.hexdigest()} ".encode())
    counts = tuple(+counter for counter in rejections.counts)  # without the zeros
    return Plan(
        shards=tuple(
            PlannedShard(*key, number, len(shards), np.concatenate(pieces))
            for key, shards in ((key, fillings[key].shards) for key in keys)
            for number, pieces in enumerate(shards)
        ),
        attempts=tuple(attempts),
        caption_sets={key: fillings[key].caption_sets() for key in keys},
        fingerprints=tuple(content.hexdigest() for content in hashes),
        report=Report(num_read, tuple(written), counts, rejections.examples),
    )


class _Filling:
    """The shards of a bucket, as records are added to them."""

    def __init__(self):
        self.shards: list[list[Int32[np.ndarray, "n 2"]]] = []
        self.digest = hashlib.sha256()
        self.num_records = 0
        self._num_bytes = 0  # of all records so far
        self._last_shard = -1
        self._counts: collections.Counter = collections.Counter()
        self._examples: dict[tuple, str] = {}

    def add(
        self,
        part: int,
        index: Index,
        rows: Int[np.ndarray, " m"],
        spooled: Int[np.ndarray, " m"],
        column: int,
        shard_bytes: int,
    ) -> None:
        self.digest.update(index.digests[rows, column].tobytes())
        # A record belongs to the shard in which its first byte lies.
        sizes = index.num_bytes[rows, column]
        begins = self._num_bytes + np.cumsum(sizes) - sizes
        shards, starts = np.unique(begins // shard_bytes, return_index=True)
        records = np.stack([np.full_like(spooled, part), spooled], axis=1).astype(np.int32)
        for shard, piece in zip(shards.tolist(), np.split(records, starts[1:]), strict=True):
            if shard != self._last_shard:
                self.shards.append([])
            self.shards[-1].append(piece)
            self._last_shard = shard
        self._num_bytes += int(sizes.sum())
        self.num_records += len(rows)
        sets, firsts, counts = np.unique(
            index.caption_sets[rows], return_index=True, return_counts=True
        )
        for which, first, count in zip(
            sets.tolist(), firsts.tolist(), counts.tolist(), strict=True
        ):
            self._counts[index.pairs[which]] += count
            self._examples.setdefault(index.pairs[which], index.ids[rows[first]])

    def caption_sets(self) -> tuple[CaptionSet, ...]:
        return tuple(
            CaptionSet(pairs, self._counts[pairs], self._examples[pairs])
            for pairs in sorted(self._counts)
        )


class _Repeated:
    """The pictures that an earlier one makes superfluous, by their places among all pictures."""

    def __init__(self, indices: Iterator[Index], keep_duplicates: bool):
        found = [(index.pixels, index.id_digests) for index in indices]
        pixels, ids = (np.concatenate([_EMPTY, *column]) for column in zip(*found, strict=True))
        self._duplicate = np.zeros(len(ids), bool) if keep_duplicates else repeats(pixels)
        unique = np.flatnonzero(~self._duplicate)
        self._taken = np.zeros(len(ids), bool)
        self._taken[unique[repeats(ids[unique])]] = True
        # The picture that is kept, of the duplicates that the report will show; and its id.
        shown = np.flatnonzero(self._duplicate)[:NUM_EXAMPLES].tolist()
        self._kept = {
            place: int(np.flatnonzero((pixels == pixels[place]).all(axis=1))[0]) for place in shown
        }
        self._ids: dict[int, str] = {}

    def reject(self, index: Index, first: int, rejections: _Rejections) -> Bool[np.ndarray, " n"]:
        """Returns which pictures of a part are kept; the part begins at the place `first`."""
        end = first + len(index.ids)
        for place in self._kept.values():
            if first <= place < end:
                self._ids[place] = index.ids[place - first]
        duplicate, taken = self._duplicate[first:end], self._taken[first:end]
        for mask, reason in ((duplicate, "duplicate"), (taken, "id taken")):
            for column, stored in enumerate((index.buckets >= 0).T):
                rejections.counts[column].update({reason: int((mask & stored).sum())})
            for row in np.flatnonzero(mask)[:NUM_EXAMPLES].tolist():
                kept = self._ids.get(self._kept.get(first + row, -1))
                detail = "" if kept is None else f"the same pixels as {kept}"
                if reason == "id taken":
                    detail = "another picture has it"
                rejections.show(index.ids[row], reason, detail)
        return ~(duplicate | taken)


def repeats(digests: UInt64[np.ndarray, "n 2"]) -> Bool[np.ndarray, " n"]:
    """Whether an equal one comes before."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal ones stay in order
    ordered = digests[order]
    found = np.zeros(len(digests), bool)
    found[order[1:][(ordered[1:] == ordered[:-1]).all(axis=1)]] = True
    return found


_EMPTY = np.zeros((0, 2), np.uint64)


def _digest(content: bytes) -> tuple[int, int]:
    digest = hashlib.blake2b(content, digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def _digests(rows: Sequence[tuple[int, int]]) -> UInt64[np.ndarray, "n 2"]:
    return np.array(rows, np.uint64).reshape(-1, 2)
