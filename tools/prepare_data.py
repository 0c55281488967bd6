r"""Makes data sets to train on: pictures in buckets, with captions, in ArrayRecord shards.

    python tools/prepare_data.py folder --input=photos --output=data/photos --resolution=256,1024

reads every picture below `photos`, with its captions beside it (dog.jpg, dog.txt), and makes two
data sets: data/photos/256 and data/photos/1024. report.json and report.png in data/photos say what
became of each picture. Other sources:

    ... json --input=train.jsonl --root=/images      the official fine-tuning format
    ... webdataset --input='gs://bucket/{00000..00999}.tar'
    ... parquet --input=shards/ --image=jpg --captions=llava:long:en,alt:short
    ... tfds --input=tensorflow_datasets/coco_captions/2014/1.1.0
    ... openmoji --resolution=48 --emojis=🐶🍎🚲      drawings, without any download

Captions of tools/caption.py take the place of those beside the pictures, or come behind them, with
--caption_table=captions and --caption_mode. They can also be put into a data set that is there,
whose pictures stay as they are:

    ... dataset --input=data/photos/256 --caption_table=captions --output=data/photos_v2/256

A run that was stopped goes on where it was when the same command is given again, and one that is
finished is left as it is; other settings need --overwrite. On a cluster:

    ... --engine=beam --beam_options='--runner=DataflowRunner --project=... --region=...'
"""

import os
import pathlib
import sys

import rich.console
import rich.table
from absl import flags, logging
from etils import epath

from lumina_jax import cli, plots, source_flags
from lumina_jax.data import caption_table, engine, prepare, recaption
from lumina_jax.data.buckets import Bucket
from lumina_jax.data.caption_table import Merge, Table
from lumina_jax.data.plan import Report
from lumina_jax.data.prepare import Filter, Settings
from lumina_jax.data.records import Manifest
from lumina_jax.data.sources.base import Source
from lumina_jax.data.sources.captioned import WithTable
from lumina_jax.errors import InputError
from lumina_jax.progress import progress_bar

# What a data set that is there is copied with; the other flags are of pictures and their sources.
_OF_DATASET = (
    *("input", "output", "caption_table", "caption_mode"),
    *("num_workers", "engine", "beam_options", "overwrite"),
)

source_flags.define(captions=True)
_OUTPUT = flags.DEFINE_string("output", None, "Directory to write to.")
_RESOLUTION = flags.DEFINE_list(
    "resolution", ["256"], "Side of the square picture, in pixels. Several: a data set for each."
)
_PIXELS_PER_TOKEN = flags.DEFINE_integer(
    "pixels_per_token",
    None,
    "Side of a token in pixels; a bucket is a whole number of tokens wide and high. "
    "Default: 16 from 256 px, 4 below.",
)
_BUCKETS = flags.DEFINE_list(
    "buckets", [], "Sizes such as 48x48,60x36,36x60. Default: the official list of the resolution."
)
# Captions from elsewhere.
_CAPTION_TABLE = flags.DEFINE_list(
    "caption_table", [], "Directories that tools/caption.py has written: captions by picture."
)
_CAPTION_MODE = flags.DEFINE_enum(
    "caption_mode",
    None,
    caption_table.MODES,
    "Of tables: replace the captions of the pictures, or add to them. Default: replace.",
)
# What is taken, and how it is kept.
_FIT = flags.DEFINE_enum(
    "fit", None, sorted(prepare.FITS), "Crop to the bucket, or pad with white. Default: crop."
)
_MIN_SIZE = flags.DEFINE_integer("min_size", 1, "Of the shorter side of a picture, in pixels.")
_MAX_UPSCALE = flags.DEFINE_float(
    "max_upscale", 1.5, "A picture is left out of resolutions that would enlarge it more."
)
_MIN_SCORE = flags.DEFINE_list("min_score", [], "Such as aesthetic=5: pictures below are left out.")
_MAX_SCORE = flags.DEFINE_list("max_score", [], "Such as watermark=0.5.")
_KEEP_DUPLICATES = flags.DEFINE_bool("keep_duplicates", False, "Keep pictures with equal pixels.")
_QUALITY = flags.DEFINE_integer("quality", 95, "Of JPEG, which is used above 128 px.")
_SHARD_MB = flags.DEFINE_float("shard_mb", 512, "Size of a shard in megabytes.")
# How it is run.
_NUM_WORKERS = flags.DEFINE_integer("num_workers", None, "Processes; by default one for each core.")
_ENGINE = flags.DEFINE_enum("engine", "local", ["local", "beam"], "Where the work is done.")
_BEAM_OPTIONS = flags.DEFINE_string("beam_options", "", "Of Beam's pipeline, such as its runner.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace the data sets that are there.")


def main(kind: str) -> None:
    try:
        report, directories = _recaption() if kind == "dataset" else _prepare(kind)
        manifests = [Manifest.load(directory) for directory in directories]
        plots.prepared_data(manifests, report, epath.Path(_OUTPUT.value) / "report.png")
    except OSError as error:
        logging.info("What failed:", exc_info=True)
        raise InputError(
            f"{error}. What is done is kept; mend it and give the same command again."
        ) from error
    _print_summary(report, directories, manifests)


def _prepare(kind: str) -> tuple[Report, list[str]]:
    """Makes data sets of a source; returns what became of its pictures, and where they are."""
    resolutions = [_whole("resolution", text) for text in _RESOLUTION.value]
    buckets = tuple(Bucket.parse(text) for text in _BUCKETS.value)
    targets = prepare.make_targets(_OUTPUT.value, resolutions, _PIXELS_PER_TOKEN.value, buckets)
    if not 0 < _SHARD_MB.value < 1e6:
        raise InputError(f"--shard_mb={_SHARD_MB.value} must be more than 0 and less than 1e6.")
    settings = Settings(
        fit=_FIT.value or ("pad" if kind == "openmoji" else "crop"),
        min_size=_MIN_SIZE.value,
        max_upscale=_MAX_UPSCALE.value,
        filters=_filters(),
        keep_duplicates=_KEEP_DUPLICATES.value,
        quality=_QUALITY.value,
        shard_bytes=round(_SHARD_MB.value * 1e6),
    )
    where = _make_engine()
    _check_apart()
    source = _make_source(kind, max(resolutions))
    report = prepare.prepare(
        source, _OUTPUT.value, targets, settings, engine=where, overwrite=_OVERWRITE.value
    )
    return report, [target.directory for target in targets]


def _recaption() -> tuple[Report, list[str]]:
    """Copies a data set with other captions; returns what became of it, and where the copy is."""
    ours = flags.FLAGS.get_key_flags_for_module(sys.argv[0])
    given = [flag.name for flag in ours if flag.present and flag.name not in _OF_DATASET]
    if given:
        raise InputError(
            f"A data set that is there takes no --{', --'.join(sorted(given))}: its pictures stay "
            f"as they are. It has --{', --'.join(_OF_DATASET)}."
        )
    missing = [name for name in ("input", "caption_table") if not flags.FLAGS[name].value]
    if missing:
        raise InputError(f"Missing --{', --'.join(missing)}. `--help` shows an example.")
    where = _make_engine()
    _check_apart()
    merge = _make_merge()
    report = recaption.recaption(
        flags.FLAGS.input,
        _OUTPUT.value,
        merge.tables,
        mode=merge.mode,
        engine=where,
        overwrite=_OVERWRITE.value,
    )
    return report, [_OUTPUT.value]


def _check_apart() -> None:
    """What is written must not be read as pictures, nor what is read be removed."""
    given, output = flags.FLAGS.input, _OUTPUT.value
    if not given or "://" in given + output:
        folder = f"{(given or '').rstrip('/')}/"
        apart = not given or not f"{output}/".startswith(folder)
    else:
        inner, outer = (pathlib.Path(path).resolve() for path in (output, given))
        apart = outer != inner and outer not in inner.parents
    if not apart:
        raise InputError(f"--output={output} lies in --input={given}. Choose a directory outside.")


def _make_merge() -> Merge:
    tables = tuple(Table.load(directory) for directory in _CAPTION_TABLE.value)
    return Merge(tables, _CAPTION_MODE.value or "replace")


def _make_source(kind: str, resolution: int) -> Source:
    """Returns the source, with the captions of tables if there are any."""
    if _CAPTION_TABLE.value:
        merge = _make_merge()
        return WithTable(source_flags.make(kind, resolution, needs_captions=False), merge)
    if _CAPTION_MODE.value:
        raise InputError("--caption_mode is of --caption_table, which is not given.")
    return source_flags.make(kind, resolution)


def _progress(description: str, total: int):
    return progress_bar(description, total, unit="parts" if description == "Reading" else "shards")


def _make_engine() -> engine.Engine:
    if _ENGINE.value == "beam":
        return engine.Beam(_BEAM_OPTIONS.value, _progress)
    if _BEAM_OPTIONS.value:
        raise InputError("--beam_options are of --engine=beam, which is not given.")
    num_workers = _NUM_WORKERS.value or os.cpu_count() or 1
    return (
        engine.Engine(_progress) if num_workers == 1 else engine.Processes(num_workers, _progress)
    )


def _filters() -> tuple[Filter, ...]:
    filters = []
    for flag, bound in ((_MIN_SCORE, "low"), (_MAX_SCORE, "high")):
        for text in flag.value:
            name, _, value = text.rpartition("=")
            try:
                score = Filter(name, **{bound: float(value)})
            except ValueError:
                score = None
            if not name or score is None:
                raise InputError(f"--{flag.name}={text} is not name=number, such as aesthetic=5.")
            filters.append(score)
    return tuple(filters)


def _whole(flag: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(f"--{flag}={text} is not a whole number.") from None


def _print_summary(report: Report, directories: list[str], manifests: list[Manifest]) -> None:
    console = rich.console.Console()
    table = rich.table.Table("", *(f"{manifest.resolution} px" for manifest in manifests))
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("read", *[f"{report.num_read:,}"] * len(manifests))
    table.add_row("written", *(f"{written:,}" for written in report.written))
    reasons = {reason: None for rejected in report.rejected for reason in sorted(rejected)}
    for reason in reasons:
        counts = (rejected.get(reason, 0) for rejected in report.rejected)
        table.add_row(f"rejected: {reason}", *(f"{count:,}" for count in counts))
    console.print(table)
    for directory, manifest in zip(directories, manifests, strict=True):
        filled = sum(bool(split.num_records) for split in manifest.splits)
        console.print(
            f"{manifest.num_records:,} records of {manifest.source} in {directory}: "
            f"{filled} of {len(manifest.splits)} buckets, captions {', '.join(manifest.kinds)} in "
            f"{', '.join(manifest.languages)}.",
            highlight=False,
            soft_wrap=True,
        )
    if reasons:
        console.print(
            f"Some of what was rejected, with the reason, is in {_OUTPUT.value}/report.json.",
            highlight=False,
            soft_wrap=True,
        )
    if manifests[0].attribution:
        console.print(manifests[0].attribution, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    cli.run(main, required=("output",), commands=(*source_flags.SOURCES, "dataset"))
