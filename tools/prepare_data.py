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

A run that was stopped goes on where it was when the same command is given again, and one that is
finished is left as it is; other settings need --overwrite. On a cluster:

    ... --engine=beam --beam_options='--runner=DataflowRunner --project=... --region=...'
"""

import os
import pathlib

import rich.console
import rich.table
from absl import flags, logging
from etils import epath

from lumina_jax import cli, plots
from lumina_jax.data import engine, prepare
from lumina_jax.data.buckets import Bucket
from lumina_jax.data.plan import Report
from lumina_jax.data.prepare import Filter, Settings, Target
from lumina_jax.data.records import Manifest
from lumina_jax.data.sources import KINDS, make_source
from lumina_jax.data.sources.base import Source
from lumina_jax.data.sources.openmoji import OpenMojiSource
from lumina_jax.errors import InputError
from lumina_jax.progress import progress_bar

SOURCES = ("openmoji", *KINDS)

_INPUT = flags.DEFINE_string("input", None, "Where the pictures are: a path or URL, see above.")
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
# Of the sources.
_ROOT = flags.DEFINE_string("root", None, "json, parquet: where relative picture paths begin.")
_IMAGE = flags.DEFINE_string("image", None, "parquet: the column of pictures, or of their paths.")
_SPLIT = flags.DEFINE_string("split", None, "tfds: the split to read.")
_CAPTIONS = flags.DEFINE_list(
    "captions", None, "Where captions are, as key:kind:language. Default: keys of well-known names."
)
_KIND = flags.DEFINE_string("kind", None, "Of captions that do not say: long, medium, short, tags.")
_LANGUAGE = flags.DEFINE_string("language", None, "Of captions that do not say; en by default.")
_LICENSE = flags.DEFINE_string("license", None, "Of the pictures, for the manifest.")
_ATTRIBUTION = flags.DEFINE_string("attribution", None, "What has to be said with the pictures.")
_EMOJIS = flags.DEFINE_string("emojis", "all", "openmoji: the characters to draw, or all.")
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
    try:
        report = prepare.prepare(
            source, _OUTPUT.value, targets, settings, engine=where, overwrite=_OVERWRITE.value
        )
        manifests = [Manifest.load(target.directory) for target in targets]
        plots.prepared_data(manifests, report, epath.Path(_OUTPUT.value) / "report.png")
    except OSError as error:
        logging.info("What failed:", exc_info=True)
        raise InputError(
            f"{error}. What is done is kept; mend it and give the same command again."
        ) from error
    _print_summary(report, targets, manifests)


def _check_apart() -> None:
    """What is written must not be read as pictures, nor what is read be removed."""
    if not _INPUT.value or "://" in _INPUT.value + _OUTPUT.value:
        folder = f"{(_INPUT.value or '').rstrip('/')}/"
        apart = not _INPUT.value or not f"{_OUTPUT.value}/".startswith(folder)
    else:
        folder, output = (pathlib.Path(path).resolve() for path in (_INPUT.value, _OUTPUT.value))
        apart = folder != output and folder not in output.parents
    if not apart:
        raise InputError(
            f"--output={_OUTPUT.value} lies in --input={_INPUT.value}. Choose a directory outside."
        )


def _make_source(kind: str, resolution: int) -> Source:
    given = {
        "root": _ROOT.value,
        "image": _IMAGE.value,
        "split": _SPLIT.value,
        "captions": None if _CAPTIONS.value is None else tuple(_CAPTIONS.value),
        "kind": _KIND.value,
        "language": _LANGUAGE.value,
        "license": _LICENSE.value,
        "attribution": _ATTRIBUTION.value,
    }
    options = {name: value for name, value in given.items() if value is not None}
    if kind == "openmoji":
        if options or _INPUT.value:
            names = ", ".join(
                f"--{name}" for name in (*options, *(["input"] if _INPUT.value else []))
            )
            raise InputError(f"The source openmoji takes no {names}; it has --emojis.")
        return OpenMojiSource(_EMOJIS.value, resolution)
    if _EMOJIS.value != "all":
        raise InputError(f"--emojis are of the source openmoji, not of {kind}.")
    if not _INPUT.value:
        raise InputError(f"Missing --input, where the {kind} source is. `--help` shows an example.")
    return make_source(kind, _INPUT.value, **options)


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


def _print_summary(report: Report, targets: tuple[Target, ...], manifests: list[Manifest]) -> None:
    console = rich.console.Console()
    table = rich.table.Table("", *(f"{target.resolution} px" for target in targets))
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("read", *[f"{report.num_read:,}"] * len(targets))
    table.add_row("written", *(f"{written:,}" for written in report.written))
    reasons = {reason: None for rejected in report.rejected for reason in sorted(rejected)}
    for reason in reasons:
        counts = (rejected.get(reason, 0) for rejected in report.rejected)
        table.add_row(f"rejected: {reason}", *(f"{count:,}" for count in counts))
    console.print(table)
    for target, manifest in zip(targets, manifests, strict=True):
        filled = sum(bool(split.num_records) for split in manifest.splits)
        console.print(
            f"{manifest.num_records:,} records of {manifest.source} in {target.directory}: "
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
    cli.run(main, required=("output",), commands=SOURCES)
