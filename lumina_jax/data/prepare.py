"""From raw pictures to datasets: two maps over tasks, and between them a plan.

    parts of a source -> process_part -> spooled records and an index of them
    all indices       -> plan         -> which of them are duplicates, which shard each goes to
    shards            -> fill_shard   -> ArrayRecord shards, then manifest and report

Every task writes files that appear under their names when they are whole, and is left alone when
they are there. So a run that was killed goes on where it was, a task may be tried twice, and where
tasks run (processes of this machine, or Apache Beam; see `engine`) changes no byte of the result.

A directory under way holds `unfinished/`, with the settings it belongs to, and no manifest.
"""

import collections
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from lumina_jax import files
from lumina_jax.data import images, records
from lumina_jax.data.buckets import (
    Bucket,
    bucket_sizes,
    choose_bucket,
    pad_to_fit,
    resize_and_crop,
)
from lumina_jax.data.captions import KINDS
from lumina_jax.data.engine import Engine, in_threads
from lumina_jax.data.images import Rejected
from lumina_jax.data.plan import Index, IndexWriter, Plan, PlannedShard, Report, make_plan
from lumina_jax.data.records import Manifest, Shard, Split
from lumina_jax.data.sources.base import Item, Part, Source
from lumina_jax.errors import InputError, differences

REPORT = "report.json"
MARKER = records.MARKERS[0]
FITS = {"crop": resize_and_crop, "pad": pad_to_fit}
# Small pictures are stored without loss: at these sizes JPEG artefacts are a visible share of them.
MAX_PNG_RESOLUTION = 128


@dataclasses.dataclass(frozen=True)
class Filter:
    """Keeps pictures whose score lies between two bounds, both included."""

    score: str
    low: float | None = None
    high: float | None = None

    def check(self, scores: Mapping[str, float]) -> None:
        if self.score not in scores:
            raise Rejected(f"no score {self.score}", f"it has {', '.join(scores) or 'none'}")
        value = scores[self.score]
        if self.low is not None and not value >= self.low:  # also what is not a number
            raise Rejected(f"score {self.score} below {self.low:g}", f"{value:g}")
        if self.high is not None and not value <= self.high:
            raise Rejected(f"score {self.score} above {self.high:g}", f"{value:g}")


@dataclasses.dataclass(frozen=True)
class Target:
    """A dataset to make: of one resolution, below `directory`."""

    directory: str
    resolution: int
    pixels_per_token: int
    buckets: tuple[Bucket, ...]

    def __post_init__(self):
        """Checks the buckets against the token budget that the model gives to a resolution."""
        side = self.pixels_per_token
        budget = records.num_tokens(self.resolution, side)
        faults = []
        for bucket in self.buckets:
            if bucket.width % side or bucket.height % side:
                faults.append(f"{bucket} is not a multiple of {side} pixels")
            elif (bucket.width // side) * (bucket.height // side) > budget:
                faults.append(f"{bucket} holds more than {budget} tokens")
        if faults:
            raise InputError(
                f"Buckets do not fit resolution {self.resolution} with {side} pixels per token: "
                f"{'; '.join(faults)}. Change the buckets, the resolution or the pixels per token."
            )
        if not self.buckets or len(set(self.buckets)) < len(self.buckets):
            raise InputError(
                f"Buckets {', '.join(map(str, self.buckets)) or '()'}: need one or more, each once."
            )


def make_targets(
    output: epath.PathLike,
    resolutions: Sequence[int],
    pixels_per_token: int | None = None,
    buckets: Sequence[Bucket] = (),
) -> tuple[Target, ...]:
    """Returns the datasets to make: one lies at `output`, several below it by resolution.

    Without `pixels_per_token` it is 16, as the full model has it, and 4 below 256 px, for a small
    one. Without `buckets` they are the official list of the resolution.
    """
    records.check_store(output)
    if not resolutions or len(set(resolutions)) < len(resolutions):
        raise InputError(f"Resolutions {list(resolutions)}: need one or more, each once.")
    if buckets and len(resolutions) > 1:
        raise InputError(
            f"Buckets are sizes of one resolution, and there are {len(resolutions)}. Name one "
            "resolution, or leave the buckets to be the official lists."
        )
    made = []
    for resolution in sorted(resolutions):
        side = (16 if resolution >= 256 else 4) if pixels_per_token is None else pixels_per_token
        sizes = buckets or bucket_sizes(records.num_tokens(resolution, side), side)
        directory = epath.Path(output)
        if len(resolutions) > 1:
            directory /= str(resolution)
        made.append(Target(os.fspath(directory), resolution, side, tuple(sizes)))
    return tuple(made)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How pictures become records.

    Args:
        fit: "crop" keeps the centre, "pad" keeps all and adds white.
        min_size: of the shorter side of a picture, in pixels.
        max_upscale: a picture is left out of a resolution that would enlarge it more.
        filters: on the scores that a source gives.
        keep_duplicates: whether pictures with equal pixels are kept.
        quality: of JPEG, 1 to 95.
        shard_bytes: size of a shard; the last one of a bucket is smaller.
    """

    fit: str = "crop"
    min_size: int = 1
    max_upscale: float = 1.5
    filters: tuple[Filter, ...] = ()
    keep_duplicates: bool = False
    quality: int = 95
    shard_bytes: int = 512 << 20

    def __post_init__(self):
        faults = []
        if self.fit not in FITS:
            faults.append(f"fit={self.fit!r} is not {' or '.join(FITS)}")
        if self.min_size < 1:
            faults.append(f"min_size={self.min_size} must be 1 pixel or more")
        if not self.max_upscale > 0:
            faults.append(f"max_upscale={self.max_upscale} must be above 0; 1 enlarges nothing")
        if not 1 <= self.quality <= 95:
            faults.append(f"quality={self.quality} must be 1 to 95")
        if self.shard_bytes < 1:
            faults.append(f"shard_bytes={self.shard_bytes} must be 1 or more")
        if faults:
            raise InputError(f"Cannot prepare data: {'; '.join(faults)}.")


def prepare(
    source: Source,
    output: epath.PathLike,
    targets: Sequence[Target],
    settings: Settings | None = None,
    *,
    engine: Engine | None = None,
    overwrite: bool = False,
) -> Report:
    """Makes the datasets, and returns what became of the pictures.

    Finished datasets are left as they are. What an earlier call of the same settings has done
    already is not done again.

    Args:
        source: of the pictures.
        output: directory of the report, and of the datasets (see `make_targets`).
        targets: the datasets to make.
        settings: how.
        engine: where the work is done; by default in this process.
        overwrite: whether to replace datasets that are there.
    """
    settings, engine, output = settings or Settings(), engine or Engine(), epath.Path(output)
    wanted = {target: _dataset_settings(source, target, settings) for target in targets}
    if not overwrite and (report := _find_finished(output, wanted)) is not None:
        return report
    parts = source.parts()
    job = Job(source, os.fspath(output / records.UNFINISHED), tuple(targets), settings)
    _start(output, job, list(wanted.values()), parts, overwrite)

    engine.run("Reading", job.process_part, job.missing_parts(parts))
    plan = job.make_plan(len(parts))
    if not any(plan.report.written):
        # What was read stays, and so does the report, until the settings are others.
        save_report(output, plan.report, [target.resolution for target in targets])
        raise InputError(
            f"None of the {plan.report.num_read:,} pictures of {source.name} can be written; "
            f"{output / REPORT} says why. Change the source or the settings, and use --overwrite."
        )
    engine.run("Writing", job.fill_shard, job.missing_shards(plan))
    for column, (target, found) in enumerate(wanted.items()):
        records.finish(
            target.directory,
            Manifest(
                job.splits(plan, column),
                found,
                source.license,
                source.attribution,
                plan.fingerprints[column],
            ),
        )
    files.remove_asides(output)
    save_report(output, plan.report, [target.resolution for target in targets])
    files.remove_folder(output / records.UNFINISHED, last=MARKER)
    return plan.report


@dataclasses.dataclass(frozen=True)
class Job:
    """The two kinds of tasks; it is sent to where they run.

    Args:
        source: of the pictures.
        folder: what is kept between the tasks.
        targets: the datasets to make.
        settings: how.
    """

    source: Source
    folder: str
    targets: tuple[Target, ...]
    settings: Settings

    def missing_parts(self, parts: Sequence[Part]) -> list[int]:
        """Returns the numbers of the parts that are still to be processed, and keeps what they are.

        The tasks themselves are numbers: the parts of 100 million pictures do not fit what a
        cluster takes as the description of its work.
        """
        there = files.sizes(self.folder)
        missing = [n for n in range(len(parts)) if self._path(n, "npz").name not in there]
        new = [n for n in missing if self._path(n, "json").name not in there]

        def write(number):
            content = json.dumps(dataclasses.asdict(parts[number]))
            files.write(self._path(number, "json"), content)

        for _ in in_threads(write, new):
            pass
        return missing

    def process_part(self, number: int) -> None:
        """Spools the records of a part, one file for each target, then writes their index."""
        index_path = self._path(number, "npz")
        if index_path.exists():
            return
        given = json.loads(self._path(number, "json").read_text())
        part = Part(**{**given, "names": tuple(given["names"])})
        index = IndexWriter(len(self.targets), attempt=uuid.uuid4().hex[:8])
        with contextlib.ExitStack() as stack:
            # A name of this attempt alone: another one may meet other pictures, where a source
            # fails now and then, and its index would not fit these records.
            spools = [
                stack.enter_context(
                    records.shard_writer(self._spool(number, index.attempt, column))
                )
                for column in range(len(self.targets))
            ]
            for item in self.source.read(part):
                index.num_read += 1
                try:
                    self._process(item, index, spools)
                except Rejected as why:
                    index.reject_everywhere(item.id, why)
        files.write(index_path, index.to_bytes())

    def _process(self, item: Item, index: IndexWriter, spools: Sequence[Callable]) -> None:
        image = self._accept(item)
        stored = []
        for column, target in enumerate(self.targets):
            bucket = choose_bucket(*image.size, target.buckets)
            try:
                record = self._make_record(item, image, bucket, target)
            except Rejected as why:
                index.reject(column, item.id, why)
                stored.append(None)
            else:
                spools[column](record)
                stored.append((target.buckets.index(bucket), record))
        pixels = repr(image.size).encode() + image.tobytes()
        index.add(item.id, item.captions, pixels, stored)

    def _accept(self, item: Item) -> Image.Image:
        """Returns the picture of an item, unless no target can have it."""
        if item.fault is not None:
            raise item.fault
        if not item.captions:
            raise Rejected("no caption")
        if unknown := {caption.kind for caption in item.captions} - set(KINDS):
            raise Rejected("unknown caption kind", ", ".join(sorted(unknown)))
        for score in self.settings.filters:
            score.check(item.scores)
        drawn = isinstance(item.image, Image.Image)
        image = images.to_rgb(item.image) if drawn else images.decode(item.image)
        if min(image.size) < self.settings.min_size:
            raise Rejected("too small", f"{image.width}x{image.height}")
        return image

    def _make_record(self, item: Item, image: Image.Image, bucket: Bucket, target: Target) -> bytes:
        scales = bucket.width / image.width, bucket.height / image.height
        upscale = max(scales) if self.settings.fit == "crop" else min(scales)
        if upscale > self.settings.max_upscale:
            size = f"{image.width}x{image.height}"
            raise Rejected("too small", f"{size}, to be enlarged {upscale:.1f} times")
        fitted = FITS[self.settings.fit](image, bucket)
        return records.serialize(
            id=item.id,
            source=self.source.name,
            image=encode(fitted, target.resolution, self.settings.quality),
            captions=item.captions,
            size=image.size,
        )

    def make_plan(self, num_parts: int) -> Plan:
        return make_plan(
            lambda: in_threads(self._load_index, range(num_parts)),
            len(self.targets),
            shard_bytes=self.settings.shard_bytes,
            keep_duplicates=self.settings.keep_duplicates,
        )

    def missing_shards(self, plan: Plan) -> list[tuple[int, str]]:
        """Returns the tasks of the shards that are still to be filled, and keeps their records."""
        there = [set(files.sizes(target.directory)) for target in self.targets]
        missing = [
            shard for shard in plan.shards if self._shard_name(shard) not in there[shard.column]
        ]

        def write(shard):
            parts = np.unique(shard.records[:, 0])
            content = io.BytesIO()
            np.savez(
                content,
                records=shard.records,
                parts=parts,
                attempts=np.array([plan.attempts[part] for part in parts.tolist()]),
            )
            files.write(self._plan_path(shard.column, self._shard_name(shard)), content.getvalue())

        for _ in in_threads(write, missing):
            pass
        return [(shard.column, self._shard_name(shard)) for shard in missing]

    def fill_shard(self, task: tuple[int, str]) -> None:
        """Copies the records of a shard out of the spools."""
        column, name = task
        path = epath.Path(self.targets[column].directory) / name
        if path.exists():
            return
        planned = np.load(
            io.BytesIO(self._plan_path(column, name).read_bytes()), allow_pickle=False
        )
        wanted = planned["records"]
        attempts = dict(zip(planned["parts"].tolist(), planned["attempts"].tolist(), strict=True))
        pieces = np.split(wanted, np.flatnonzero(np.diff(wanted[:, 0])) + 1)

        def read(piece):
            part = int(piece[0, 0])
            spool = self._spool(part, attempts[part], column)
            return list(records.read_shard(spool, piece[:, 1].tolist()))

        with records.shard_writer(path) as write:
            for found in in_threads(read, pieces, ahead=8):
                for record in found:
                    write(record)

    def splits(self, plan: Plan, column: int) -> tuple[Split, ...]:
        """The splits of a target, when its shards are filled; those without records too."""
        sizes = files.sizes(self.targets[column].directory)
        shards: dict[int, list[Shard]] = collections.defaultdict(list)
        for planned in plan.shards:
            if planned.column == column:
                name = self._shard_name(planned)
                shards[planned.bucket].append(Shard(name, len(planned.records), sizes[name]))
        buckets = self.targets[column].buckets
        return tuple(
            Split(buckets[i], tuple(shards[i]), plan.caption_sets.get((column, i), ()))
            for i in sorted(range(len(buckets)), key=lambda i: buckets[i])
        )

    def _path(self, number: int, ending: str) -> epath.Path:
        return epath.Path(self.folder) / f"{number:06d}.{ending}"

    def _spool(self, number: int, attempt: str, column: int) -> epath.Path:
        return self._path(number, f"{attempt}.{self.targets[column].resolution}px")

    def _load_index(self, number: int) -> Index:
        return Index(self._path(number, "npz").read_bytes())

    def _plan_path(self, column: int, name: str) -> epath.Path:
        return epath.Path(self.folder) / f"{self.targets[column].resolution}px.{name}.plan"

    def _shard_name(self, shard: PlannedShard) -> str:
        bucket = self.targets[shard.column].buckets[shard.bucket]
        return records.shard_name(bucket, shard.number, shard.count)


def encode(image: Image.Image, resolution: int, quality: int) -> bytes:
    """Returns the picture as it is stored."""
    content = io.BytesIO()
    if resolution <= MAX_PNG_RESOLUTION:
        image.save(content, format="PNG")
    else:
        image.save(content, format="JPEG", quality=quality)
    return content.getvalue()


def _dataset_settings(source: Source, target: Target, settings: Settings) -> dict[str, Any]:
    """What must be equal for a dataset to be used again, as JSON knows it."""
    given = {
        "source": source.name,
        "resolution": target.resolution,
        "pixels_per_token": target.pixels_per_token,
        "buckets": sorted(map(str, target.buckets)),
        **dataclasses.asdict(settings),
        **source.settings(),
    }
    return json.loads(json.dumps(given))


def _find_finished(output: epath.Path, wanted: Mapping[Target, dict[str, Any]]) -> Report | None:
    """Returns the report of datasets that are there already; refuses others."""
    unfinished = output / records.UNFINISHED
    begun = (unfinished / MARKER).exists()
    complete = [(epath.Path(t.directory) / records.MANIFEST).exists() for t in wanted]
    if begun and not (all(complete) and (output / REPORT).exists()):
        return None  # `_start` looks whose it is
    manifests = {target: records.find(target.directory) for target in wanted}
    if not any(complete):
        return None
    for target, manifest in manifests.items():
        there = manifest.settings if manifest else {}
        _check_same(target.directory, there, wanted[target])
    if begun:  # a run was killed while it removed it
        files.remove_folder(unfinished, last=MARKER)
    return load_report(output)


def _start(
    output: epath.Path,
    job: Job,
    wanted: list[dict[str, Any]],
    parts: Sequence[Part],
    overwrite: bool,
) -> None:
    """Leaves `unfinished/` as this job may find it: with its own work, or empty."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(dataclasses.astuple(part)).encode())
    mine = {"format": records.FORMAT, "parts": digest.hexdigest(), "datasets": wanted}
    folder = output / records.UNFINISHED
    path = folder / MARKER
    if not path.exists() and (others := set(files.sizes(folder))):
        raise InputError(
            f"{folder} holds {', '.join(sorted(others)[:3])} and is not of this command. Choose "
            "another output, or remove it yourself."
        )
    alone = [os.fspath(output)] == [target.directory for target in job.targets]
    if not alone and (output / records.MANIFEST).exists():
        raise InputError(
            f"{output} is a data set itself, so none can be made below it. Choose another output."
        )
    if overwrite:
        begun = path.exists()
        for target in job.targets:
            records.remove(target.directory)
        if begun:
            files.remove_folder(folder, last=MARKER)
        ours = files.is_json_with(output / REPORT, ("read", "resolutions", "examples"))
        if begun or alone or ours:
            (output / REPORT).unlink(missing_ok=True)
    elif path.exists():
        theirs = json.loads(path.read_text())
        if len(theirs["datasets"]) == len(wanted):
            for target, there, here in zip(job.targets, theirs["datasets"], wanted, strict=True):
                _check_same(target.directory, there, here)
        if theirs != mine:
            raise InputError(
                f"{output} holds unfinished datasets of another source, other resolutions or "
                "another version, or the source has changed. Choose another directory, or begin "
                "again with --overwrite."
            )
    files.write(path, _to_json(mine))
    for target in job.targets:
        epath.Path(target.directory).mkdir(parents=True, exist_ok=True)


def _check_same(directory: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    if found := differences(there, here):
        raise InputError(
            f"{directory} holds another dataset: {found}. Choose another directory, ask for the "
            "same settings, or replace it with --overwrite."
        )


def _to_json(content: Any) -> bytes:
    """Readable JSON; what is no Unicode, of file names of other encodings, is escaped."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace")


def save_report(output: epath.Path, report: Report, resolutions: Sequence[int]) -> None:
    """Writes what became of the pictures, of each dataset by its resolution."""
    datasets = {
        resolution: {"written": written, "rejected": rejected}
        for resolution, written, rejected in zip(
            resolutions, report.written, report.rejected, strict=True
        )
    }
    content = {"read": report.num_read, "resolutions": datasets, "examples": report.examples}
    files.write(output / REPORT, _to_json(content))


def load_report(output: epath.Path) -> Report:
    """Returns the report of datasets that are complete."""
    if not (output / REPORT).exists():
        raise InputError(
            f"The data in {output} is complete, but {REPORT} is gone. Use it as it is, or make it "
            "again with --overwrite."
        )
    content = json.loads((output / REPORT).read_text(encoding="utf-8"))
    resolutions = content["resolutions"].values()
    return Report(
        content["read"],
        tuple(found["written"] for found in resolutions),
        tuple(found["rejected"] for found in resolutions),
        {reason: [(id, detail) for id, detail in e] for reason, e in content["examples"].items()},
    )
