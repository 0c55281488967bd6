r"""Shows what a data set holds: numbers, pictures with their captions, and what padding costs.

    python tools/show_data.py --data=data/openmoji --output=runs/openmoji

prints the sizes, buckets and captions, and writes to the output statistics.png and a sheet of each
bucket. With a config the captions are measured as its runs read them: its text encoder, its system
prompt, its caption policy, its buckets. How much of a batch is padding, and what would cost less:

    python tools/show_data.py --config=configs/stage1.py --data=data/photos --tokens
"""

import io
import json
import pathlib
import sys
from collections.abc import Sequence

import numpy as np
import rich.box
import rich.table
from absl import flags, logging
from etils import epath
from jaxtyping import Int
from matplotlib.figure import Figure
from ml_collections import ConfigDict, config_flags
from rich.console import Console

from lumina_jax import cli, files, train
from lumina_jax.data import images, statistics
from lumina_jax.data.buckets import Bucket
from lumina_jax.data.captions import KINDS, CaptionPolicy
from lumina_jax.data.records import Manifest, Record, Split, num_tokens
from lumina_jax.errors import InputError
from lumina_jax.frozen.autoencoder import make_autoencoder
from lumina_jax.frozen.text_encoder import TextEncoder, make_text_encoder
from lumina_jax.models.next_dit import forward_flops
from lumina_jax.sampling.contact_sheet import save_contact_sheet

config_flags.DEFINE_config_file("config", None, "Of the runs to come.")
_DATA = flags.DEFINE_string("data", None, "The data set. Default: data.directory of the config.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory to write pictures to. Default: none.")
_TOKENS = flags.DEFINE_bool("tokens", False, "Whether to say what padding costs a run.")
_NUM_RECORDS = flags.DEFINE_integer("num_records", 10_000, "Records to measure, of all shards.")
_NUM_PICTURES = flags.DEFINE_integer("num_pictures", 24, "Pictures on the sheet of a bucket.")

LONGEST = 4096  # tokens; a longer caption counts as one of this length
MAX_TEXT_PADDING = 0.1  # of the joint sequence; above it a remedy is named
_COLOURS = {"long": "#2563a8", "medium": "#e08a1e", "short": "#3a9a5b", "tags": "#a2479b"}
_QUANTILES = ("5%", "median", "95%", "largest")
_BARS, _FAINT = "#2563a8", "#757575"


def main() -> None:
    config = flags.FLAGS.config
    if config is None and _TOKENS.value:
        raise InputError("--tokens measures what a run of a config reads; give --config as well.")
    directory = _DATA.value or (config.data.directory if config else "")
    if not directory:
        raise InputError("Missing --data. Only a config with data.directory can do without.")
    policy = train.caption_policy(config.data) if config else CaptionPolicy()
    encoder = make_text_encoder(
        **(config.text_encoder if config else {"kind": "use", "max_tokens": 256})
    )

    def count_tokens(texts: Sequence[str]) -> Int[np.ndarray, " n"]:
        return encoder.tokenize(texts, LONGEST)[1].sum(axis=1)

    manifest = Manifest.load(directory)
    wanted = [Bucket.parse(name) for name in config.data.buckets] if config else []
    splits = [s for s in manifest.splits if s.num_records and (not wanted or s.bucket in wanted)]
    policy = policy.among(
        pair for split in splits for captions in split.caption_sets for pair in captions.pairs
    )
    rows = statistics.sample(
        directory, splits, _NUM_RECORDS.value, count_tokens, policy.system_prompt
    )
    found = statistics.summarize(splits, rows, encoder.max_tokens)
    # Words of a data set are no markup.
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    print_statistics(console, manifest, found, encoder.max_tokens)
    if _TOKENS.value:
        empty = policy.text((), None, [0.0] * policy.NUM_DRAWS)
        print_padding(console, config, encoder, rows, policy, int(count_tokens([empty])[0]))
    if _OUTPUT.value:
        output = epath.Path(_OUTPUT.value)
        plot(output / "statistics.png", found, rows, encoder.max_tokens)
        for split in splits:
            write_sheet(output / f"{split.bucket}.png", directory, split)
        console.print(f"statistics.png and {len(splits)} sheets in {output}")


def print_statistics(
    console: Console, manifest: Manifest, found: statistics.Statistics, max_tokens: int
) -> None:
    console.print(
        f"{found.num_records:,} records of {manifest.source} at {manifest.resolution} px, "
        f"{found.num_sampled:,} of them read\n"
    )
    most = max(found.buckets.values())
    table = _table("bucket", "records", "share")
    table.add_column("")
    for bucket, num_records in found.buckets.items():
        share = f"{num_records / found.num_records:.1%}"
        table.add_row(str(bucket), f"{num_records:,}", share, "█" * round(30 * num_records / most))
    console.print(table)

    table = _table("original size", *_QUANTILES)
    for name, values in (("width", found.widths), ("height", found.heights)):
        table.add_row(name, *(f"{value:,.0f}" for value in values))
    table.add_row("scaled by", *(f"{value:.2f}" for value in found.scales))
    console.print(table)
    console.print(f"{found.enlarged:.1%} were enlarged to fill their bucket\n")

    table = _table("captions", "language", "number", *_QUANTILES, f"over {max_tokens}")
    for captions in found.captions:
        languages = [c.language for c in found.captions if c.kind == captions.kind]
        if captions.language is None and len(languages) == 2:
            continue  # it would repeat the line of the only language
        table.add_row(
            captions.kind,
            captions.language or "all",
            f"{captions.num_captions:,}",
            *(f"{value:,.0f}" for value in captions.num_tokens),
            f"{captions.cut:.1%}",
        )
    console.print(table)
    console.print("lengths in tokens, with the system prompt\n")


def print_padding(
    console: Console,
    config: ConfigDict,
    encoder: TextEncoder,
    rows: Sequence[statistics.Row],
    policy: CaptionPolicy,
    num_empty: int,
) -> None:
    """Prints what padding costs with one number of text slots, and with one for each kind."""
    autoencoder, max_tokens = make_autoencoder(**config.autoencoder), encoder.max_tokens
    model = train.model_config(config, encoder, autoencoder)
    image_slots = num_tokens(config.data.resolution, autoencoder.downscale * model.patch_size)
    image_tokens = _image_tokens(rows, autoencoder.downscale, model.patch_size, image_slots)
    text_slots = statistics.choose_text_slots(rows, policy, max_tokens)
    mixed = statistics.draw_batches(rows, policy, num_empty, max_tokens)
    by_kind = statistics.draw_batches(rows, policy, num_empty, text_slots)

    table = _table("batches of kind", "share", "text slots", "tokens", "padding", "cut")
    for batches in (*mixed, *by_kind):
        table.add_row(
            batches.kind or "mixed",
            f"{batches.share:.0%}",
            f"{batches.text_slots:,}",
            f"{batches.text_tokens.mean():,.1f}",
            f"{1 - batches.text_tokens.mean() / batches.text_slots:.1%}",
            f"{np.mean(batches.num_tokens > batches.text_slots):.1%}",
            end_section=batches.kind is None,
        )
    console.print(table)

    def flops(batches: Sequence[statistics.Batches]) -> float:
        return sum(b.share * forward_flops(model, image_slots, b.text_slots) for b in batches)

    pairs = zip(image_tokens.tolist(), mixed[0].text_tokens.tolist(), strict=True)
    least = np.mean([forward_flops(model, *pair) for pair in pairs])
    table = _table("padding", "text", "image", "joint", "FLOPs", "")
    for name, batches in ((f"{max_tokens} text slots", mixed), ("text slots by kind", by_kind)):
        padding = statistics.padding(batches, image_slots, image_tokens)
        shares = (f"{share:.1%}" for share in (padding.text, padding.image, padding.joint))
        table.add_row(name, *shares, *_cost(flops(batches), flops(mixed)))
    table.add_row("none at all", "", "", "", *_cost(least, flops(mixed)))
    console.print(table)
    console.print("FLOPs of the model's forward pass for one picture\n")

    padding = statistics.padding(mixed, image_slots, image_tokens)
    gain = 1 - flops(by_kind) / flops(mixed)
    console.print(f"{padding.text_of_joint:.1%} of all slots are empty text slots.", end=" ")
    if padding.text_of_joint <= MAX_TEXT_PADDING:
        console.print("That is little: leave data.text_slots empty.\n")
    elif not gain:
        console.print("No kind of caption fits into fewer slots.\n")
    else:
        encoder_gain = 1 - sum(b.share * b.text_slots for b in by_kind) / max_tokens
        console.print(
            f"With slots by kind\nthe model costs {gain:.0%} less, the text encoder about "
            f"{encoder_gain:.0%}:\n\n    config.data.text_slots = {json.dumps(text_slots)}\n"
        )


def _image_tokens(rows, downscale: int, patch_size: int, slots: int) -> Int[np.ndarray, " n"]:
    for bucket in {row.bucket for row in rows}:
        if fault := train.bucket_fault(bucket, downscale, patch_size, slots, pooled=False):
            raise InputError(
                f"Bucket {bucket} {fault}, or name other buckets in config.data.buckets."
            )
    pixels = np.array([row.bucket.width * row.bucket.height for row in rows])
    return pixels // (downscale * patch_size) ** 2


def _cost(flops: float, before: float) -> tuple[str, str]:
    return f"{flops / 1e9:,.2f} G", f"{flops / before - 1:.1%}" if flops < before else ""


def _table(name: str, *numbers: str) -> rich.table.Table:
    table = rich.table.Table(name, box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for number in numbers:
        table.add_column(number, justify="left" if number == "language" else "right")
    return table


def write_sheet(path: epath.Path, directory: str, split: Split) -> None:
    """Draws pictures of a bucket, at even distances, each over one caption of every kind."""
    count = min(_NUM_PICTURES.value, split.num_records)
    rows = [index * split.num_records // count for index in range(count)]
    records = list(statistics.read_some(directory, split, rows))
    pictures = np.empty((count, split.bucket.height, split.bucket.width, 3), np.uint8)
    for record, picture in zip(records, pictures, strict=True):
        try:
            images.decode_stored(record.image, picture)
        except Exception as error:  # what a decoder raises on damaged bytes is anything
            logging.warning("%s shows no picture (%s): it is left white.", record.id, error)
            picture[...] = 255
    save_contact_sheet(
        path,
        list(pictures),
        [_some_captions(record, number) for number, record in enumerate(records)],
        columns=4,
        cell_size=288,
        text_size=0.048,
        title=f"{split.bucket}: {count} of {split.num_records:,} records",
        notes=[f"{record.id}, {record.size[0]} x {record.size[1]}" for record in records],
    )


def _some_captions(record: Record, number: int) -> list[str]:
    """One of each kind; from picture to picture another one, to see all languages."""
    texts = []
    for kind in KINDS:
        of_kind = [caption for caption in record.captions if caption.kind == kind]
        if of_kind:
            caption = of_kind[number % len(of_kind)]
            texts.append(f"{kind}, {caption.language}: {caption.text}")
    return texts


def plot(
    path: epath.Path,
    found: statistics.Statistics,
    rows: Sequence[statistics.Row],
    max_tokens: int,
) -> None:
    """Draws how long the captions of each kind are, and how many records each bucket has."""
    lengths: dict[str, list[int]] = {}
    for row in rows:
        for caption, length in zip(row.captions, row.num_tokens, strict=True):
            lengths.setdefault(caption.kind, []).append(length)
    kinds = [kind for kind in KINDS if kind in lengths]
    figure = Figure(figsize=(12, max(5.4, 0.18 * len(found.buckets))), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.5, 1])

    # Without captions, an empty panel.
    panels = left.subplots(max(1, len(kinds)), 1, sharex=True, squeeze=False)[:, 0]
    end = max([1.1 * max_tokens, *(np.quantile(lengths[kind], 0.999) for kind in kinds)])
    bins = np.arange(0, end + 1, max(1, round(end / 100)))  # the same number of lengths in each
    for panel, kind in zip(panels, kinds, strict=False):
        panel.hist(np.minimum(lengths[kind], bins[-1]), bins, color=_COLOURS[kind])
        panel.axvline(max_tokens, color=_FAINT, linestyle="--", linewidth=1)
        cut = np.mean(np.array(lengths[kind]) > max_tokens)
        title = f"{kind}   median {np.median(lengths[kind]):,.0f} tokens   {cut:.1%} cut"
        panel.set_title(title, loc="left", fontsize=10)
        panel.set_yticks([])
        panel.set_xlim(0, bins[-1])
        panel.spines[["top", "right", "left"]].set_visible(False)
    panels[-1].set_xlabel(f"tokens of a caption; dashed: the {max_tokens} text slots")

    panel = right.subplots()
    names = [str(bucket) for bucket in found.buckets]
    bars = panel.barh(names, list(found.buckets.values()), height=0.6, color=_BARS)
    panel.bar_label(bars, fmt="{:,.0f}", padding=4, fontsize=8, color=_FAINT)
    panel.set_title(f"{found.num_records:,} records in buckets", loc="left", fontsize=10)
    panel.set_xticks([])
    panel.margins(x=0.15, y=0.01)
    panel.invert_yaxis()
    panel.spines[["top", "right", "bottom"]].set_visible(False)
    for panel in (*left.axes, *right.axes):
        panel.tick_params(labelsize=8)

    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    files.write(path, png.getvalue())


if __name__ == "__main__":
    # Run as a file, Python looks for modules beside it; a config imports its base from the root.
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    cli.run(main)
