r"""Makes a dataset to train on: pictures in buckets, with captions, in ArrayRecord shards.

    python tools/prepare_data.py openmoji --output=data/openmoji --resolution=48

draws all of OpenMoji (1,918 pictures, captions in 14 languages) in about half a minute. Fewer, in
three shapes:

    python tools/prepare_data.py openmoji --output=data/few --resolution=48 \
        --emojis=🐶🍎🚲🇩🇪🍾 --buckets=48x48,60x36,36x60

Running it again leaves a finished dataset as it is; one of other settings needs --overwrite.
"""

from collections.abc import Iterable

import rich.console
import rich.progress
import rich.table
from absl import flags

from lumina_jax import cli
from lumina_jax.data import openmoji
from lumina_jax.data.buckets import Bucket
from lumina_jax.data.records import Manifest, Picture

SOURCES = ("openmoji",)

_OUTPUT = flags.DEFINE_string("output", None, "Directory to write the dataset to.")
_EMOJIS = flags.DEFINE_string("emojis", "all", "openmoji: the characters to draw, or all.")
_RESOLUTION = flags.DEFINE_integer("resolution", 48, "Side of the square picture, in pixels.")
_PIXELS_PER_TOKEN = flags.DEFINE_integer(
    "pixels_per_token",
    None,
    "Side of a token in pixels; a bucket is a whole number of tokens wide and high. "
    "Default: 16 from 256 px, 4 below.",
)
_BUCKETS = flags.DEFINE_list(
    "buckets", [], "Sizes such as 48x48,60x36,36x60. Default: the official list of the resolution."
)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace the dataset that is there.")


def main(source: str) -> None:
    del source  # there is one so far
    manifest = openmoji.prepare(
        _OUTPUT.value,
        emojis=_EMOJIS.value,
        resolution=_RESOLUTION.value,
        pixels_per_token=_PIXELS_PER_TOKEN.value,
        buckets=tuple(Bucket.parse(text) for text in _BUCKETS.value),
        overwrite=_OVERWRITE.value,
        progress=_show_progress,
    )
    _print_summary(manifest, _OUTPUT.value)


def _show_progress(pictures: Iterable[Picture], total: int) -> Iterable[Picture]:
    return rich.progress.track(
        pictures, "Drawing", total=total, console=rich.console.Console(stderr=True)
    )


def _print_summary(manifest: Manifest, output: str) -> None:
    table = rich.table.Table("bucket", rich.table.Column("records", justify="right"))
    for split in manifest.splits:
        table.add_row(str(split.bucket), f"{split.num_records:,}")
    console = rich.console.Console()
    console.print(table)
    console.print(
        f"{manifest.num_records:,} records of {manifest.source} in {output}: captions "
        f"{', '.join(manifest.kinds)} in {', '.join(manifest.languages)}.",
        highlight=False,
        soft_wrap=True,
    )
    console.print(manifest.attribution, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    cli.run(main, required=("output",), commands=SOURCES)
