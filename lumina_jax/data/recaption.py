"""Other captions in a dataset that is there: its records are copied, its pictures are not touched.

    shards of a dataset -> copy_shard -> shards with other captions, and counts of each
    all counts          -> settle     -> names without gaps, then manifest and report

No picture is decoded: their bytes and the cached latents are copied as they are. Features of the
old captions are left out. As in `prepare`, every task writes files that appear under their names
when they are whole, so a run that was killed goes on where it was, wherever its tasks run.
"""

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from absl import logging
from etils import epath

from lumina_jax import files
from lumina_jax.data import records
from lumina_jax.data.caption_table import Merge, Table
from lumina_jax.data.engine import Engine, in_threads
from lumina_jax.data.images import Rejected
from lumina_jax.data.plan import NUM_EXAMPLES, Report
from lumina_jax.data.prepare import REPORT, load_report, save_report
from lumina_jax.data.records import CaptionSet, Manifest, Record, Records, Shard, Split
from lumina_jax.errors import InputError
from lumina_jax.version import __version__

MARKER = records.MARKERS[1]
_RECORDS_AT_ONCE = 64


def recaption(
    dataset: epath.PathLike,
    output: epath.PathLike,
    tables: Sequence[Table],
    *,
    mode: str = "replace",
    engine: Engine | None = None,
    overwrite: bool = False,
) -> Report:
    """Writes a copy of a dataset with the captions of tables; returns what became of its records.

    Records keep their order; those that have no caption after all are left out. A finished copy is
    left as it is, and what an earlier call has done already is not done again.

    Args:
        dataset: the directory to read, of one resolution.
        output: the directory to write.
        tables: of captions, by the ids of the records.
        mode: "replace" takes the tables' captions alone, "add" those of the record before them.
        engine: where the work is done; by default in this process.
        overwrite: whether to replace another dataset at `output`.
    """
    merge, output = Merge(tuple(tables), mode), epath.Path(output)
    found = Manifest.load(dataset)
    records.check_store(output)
    if epath.Path(dataset).resolve() == output.resolve():
        raise InputError(f"Output {output} is the dataset to read; name another directory.")
    merged = {"dataset": found.fingerprint, **merge.settings()}
    history = [*found.settings.get("recaptioned", []), merged]
    fingerprint = hashlib.sha256(json.dumps(merged).encode()).hexdigest()
    finished = records.begin_copy(
        dataset,
        output,
        found,
        fingerprint,
        change="one with other captions",
        overwrite=overwrite,
    )
    if finished is not None:
        return load_report(output)
    if overwrite:
        (output / REPORT).unlink(missing_ok=True)
    if "cap_feats" in found.cache:
        logging.info(
            "The cap_feats of %s are of its captions, so they are left out. Cache those of the new "
            "captions with tools/cache_features.py.",
            os.fspath(dataset),
        )

    job = Job(os.fspath(dataset), os.fspath(output), merge)
    tasks = [job.tasks(split) for split in found.splits]
    (engine or Engine()).run("Writing", job.copy_shard, job.missing(itertools.chain(*tasks)))
    counts = [list(in_threads(job.counts, of_split)) for of_split in tasks]
    report = _report(found, list(itertools.chain(*counts)))
    if report.written == (0,):
        save_report(output, report, [found.resolution])
        examples = [id for id, _ in report.examples.get("no caption", [])[:3]]
        theirs = [row.id for row in itertools.islice(tables[0].rows(), 3)]
        raise InputError(
            f"None of the {found.num_records:,} records of {os.fspath(dataset)} would have a "
            f"caption: it has ids such as {', '.join(examples)}, and {tables[0].directory} such as "
            f"{', '.join(theirs) or 'none'}. Give the table that was made of these pictures, and "
            "use --overwrite."
        )
    sizes = files.sizes(output)
    manifest = dataclasses.replace(
        found,
        splits=tuple(
            job.settle(*of_split, sizes)
            for of_split in zip(found.splits, tasks, counts, strict=True)
        ),
        settings={**found.settings, "recaptioned": history},
        cache={name: cache for name, cache in found.cache.items() if name != "cap_feats"},
        fingerprint=fingerprint,
        version=__version__,
    )
    records.finish(output, manifest)
    save_report(output, report, [found.resolution])
    files.remove_folder(output / records.UNFINISHED, last=MARKER)
    return report


class Task(NamedTuple):
    """A shard to copy.

    Attributes:
        split: with this shard alone.
        name: of the copy, until all are there.
    """

    split: Split
    name: str


@dataclasses.dataclass
class Counts:
    """What became of the records of a shard.

    Attributes:
        caption_sets: how many have these (kind, language), and the id of the first of them.
        num_left_out: how many have no caption.
        examples: (id, detail) of some of those.
    """

    caption_sets: dict[tuple[tuple[str, str], ...], tuple[int, str]] = dataclasses.field(
        default_factory=dict
    )
    num_left_out: int = 0
    examples: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    @property
    def num_written(self) -> int:
        return sum(count for count, _ in self.caption_sets.values())

    def add(self, pairs: tuple[tuple[str, str], ...], count: int, id: str) -> None:
        before, first = self.caption_sets.get(pairs, (0, id))
        self.caption_sets[pairs] = (before + count, first)

    def leave_out(self, id: str, why: Rejected) -> None:
        self.num_left_out += 1
        if len(self.examples) < NUM_EXAMPLES:
            self.examples.append((id, why.detail))

    def to_json(self) -> str:
        sets = [(pairs, *counted) for pairs, counted in self.caption_sets.items()]
        return json.dumps([sets, self.num_left_out, self.examples])

    @classmethod
    def from_json(cls, content: str) -> "Counts":
        sets, num_left_out, examples = json.loads(content)
        counts = cls({}, num_left_out, [(id, detail) for id, detail in examples])
        for pairs, count, id in sets:
            counts.add(tuple((kind, language) for kind, language in pairs), count, id)
        return counts


@dataclasses.dataclass(frozen=True)
class Job:
    """The tasks; it is sent to where they run.

    Args:
        dataset: the directory to read.
        output: the directory to write.
        merge: the captions to take.
    """

    dataset: str
    output: str
    merge: Merge

    def tasks(self, split: Split) -> list[Task]:
        count = len(split.shards)
        return [
            Task(
                dataclasses.replace(split, shards=(shard,), caption_sets=()),
                records.shard_name(split.bucket, index, count),
            )
            for index, shard in enumerate(split.shards)
        ]

    def missing(self, tasks: Iterator[Task]) -> list[Task]:
        """Returns those that are still to be done."""
        there = files.sizes(epath.Path(self.output) / records.UNFINISHED)
        return [task for task in tasks if self._counts_path(task).name not in there]

    def copy_shard(self, task: Task) -> None:
        """Writes the copy, unless it would be empty, then its counts."""
        if self._counts_path(task).exists():
            return
        counts = Counts()
        copies = self._copies(task, counts)
        if (first := next(copies, None)) is not None:
            with records.shard_writer(epath.Path(self.output) / task.name) as write:
                for content in itertools.chain([first], copies):
                    write(content)
        files.write(self._counts_path(task), counts.to_json())

    def _copies(self, task: Task, counts: Counts) -> Iterator[bytes]:
        stored = Records(self.dataset, task.split)
        for start in range(0, len(stored), _RECORDS_AT_ONCE):
            rows = range(start, min(start + _RECORDS_AT_ONCE, len(stored)))
            try:
                found = [Record(content) for content in stored.read(rows)]
            except Rejected as error:
                raise InputError(
                    f"{stored.shard_of(start)} cannot be copied ({error}). {records.REMAKE}"
                ) from error
            ids, own = [record.id for record in found], [record.captions for record in found]
            for record, captions in zip(found, self.merge.captions(ids, own), strict=True):
                if captions:
                    pairs = sorted({(caption.kind, caption.language) for caption in captions})
                    counts.add(tuple(pairs), 1, record.id)
                    yield record.with_captions(captions)
                else:
                    counts.leave_out(record.id, self.merge.missing())

    def counts(self, task: Task) -> Counts:
        """Returns those of a task that is done."""
        return Counts.from_json(self._counts_path(task).read_text(encoding="utf-8"))

    def settle(
        self,
        split: Split,
        tasks: Sequence[Task],
        counts: Sequence[Counts],
        sizes: Mapping[str, int],
    ) -> Split:
        """Renames the shards of a split as if the empty ones had never been; returns the split.

        TFDS takes no shard without records, and no gap in their numbers. The names say how many
        there are, so a new name is never an old one, and who was killed here does it again.

        Args:
            split: of the dataset that is read.
            tasks: of its shards.
            counts: of these tasks.
            sizes: of the files that are in the output.
        """
        filled = [(t.name, c.num_written) for t, c in zip(tasks, counts, strict=True)]
        filled = [(name, num_records) for name, num_records in filled if num_records]
        shards = []
        for index, (name, num_records) in enumerate(filled):
            settled = records.shard_name(split.bucket, index, len(filled))
            if name in sizes and name != settled:
                files.move(epath.Path(self.output) / name, epath.Path(self.output) / settled)
            num_bytes = sizes[name] if name in sizes else sizes[settled]
            shards.append(Shard(settled, num_records, num_bytes))
        found = _total(counts).caption_sets
        sets = [CaptionSet(pairs, *found[pairs]) for pairs in sorted(found)]
        return Split(split.bucket, tuple(shards), tuple(sets))

    def _counts_path(self, task: Task) -> epath.Path:
        return epath.Path(self.output) / records.UNFINISHED / f"{task.name}.json"


def _total(counts: Sequence[Counts]) -> Counts:
    total = Counts()
    for one in counts:
        for pairs, counted in one.caption_sets.items():
            total.add(pairs, *counted)
        total.num_left_out += one.num_left_out
        total.examples += one.examples[: NUM_EXAMPLES - len(total.examples)]
    return total


def _report(found: Manifest, counts: Sequence[Counts]) -> Report:
    """What became of the records; it cannot be made where one is missing."""
    total = _total(counts)
    rejected = {"no caption": total.num_left_out} if total.num_left_out else {}
    examples = {"no caption": total.examples} if total.num_left_out else {}
    return Report(found.num_records, (total.num_written,), (rejected,), examples)
