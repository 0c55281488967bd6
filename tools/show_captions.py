r"""Shows captions beside their pictures, and what they are like, as one HTML page.

    python tools/show_captions.py --table=captions --output=runs/captions

prints the statistics of a table that tools/caption.py makes, complete or still being made, and
writes captions.html and statistics.png to the output. The page needs no other file. The pictures
come from where the captions were made of them; --input says where they are now, if elsewhere. The
captions of a data set that is prepared already:

    python tools/show_captions.py --data=data/photos/256 --output=runs/captions

Tokens are those of the text encoder of a config, behind the system prompt of its runs:

    ... --config=configs/stage1.py
"""

import bisect
import io
import itertools
import json
import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
import rich.box
import rich.table
from absl import flags, logging
from etils import epath
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from ml_collections import config_flags
from rich.console import Console

from lumina_jax import cli, files
from lumina_jax.data import caption_table
from lumina_jax.data.caption_table import Row, Written
from lumina_jax.data.images import Rejected
from lumina_jax.data.records import Manifest, Record
from lumina_jax.data.sources.reading import without_secrets
from lumina_jax.data.statistics import read_some
from lumina_jax.errors import InputError, is_of_storage
from lumina_jax.progress import progress_bar
from lumina_jax.unicap import page, statistics
from lumina_jax.unicap.page import Shown
from lumina_jax.unicap.pictures import open_source
from lumina_jax.unicap.statistics import Place, Statistics
from lumina_jax.unicap.tokens import TokenCounter
from lumina_jax.untrusted import read_json

config_flags.DEFINE_config_file("config", None, "Of the runs to come; it names the text encoder.")
_TABLE = flags.DEFINE_string("table", None, "The table of captions.")
_DATA = flags.DEFINE_string("data", None, "Instead of a table: a data set.")
_INPUT = flags.DEFINE_string("input", None, "Where the pictures of the table are now.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory to write to. Default: none.")
_NUM_PICTURES = flags.DEFINE_integer("num_pictures", 60, "On the page, at even distances.")
_NUM_FAULTY = flags.DEFINE_integer("num_faulty", 20, "More, with excluded captions or without any.")
_NUM_ROWS = flags.DEFINE_integer("num_rows", 20_000, "Pictures to measure, at even distances.")

PAGE, CHART = "captions.html", "statistics.png"
MAX_PICTURES = 1000  # about 30 MB of page
# Of levels, on a light page and on a dark one.
_COLOURS = (
    {"long": "#2563a8", "medium": "#e08a1e", "short": "#3a9a5b", "tags": "#a2479b"},
    {"long": "#6fa8e0", "medium": "#e8a14c", "short": "#6cc48c", "tags": "#cf82c8"},
)
_STYLES = ("-", "--", ":", "-.")  # of languages


class Subject(NamedTuple):
    """What is shown.

    Attributes:
        title: of the page.
        facts: names and values.
        notes: what the reader must know.
        found: the statistics.
        pictures: to show.
        faulty: more to show, with excluded captions or without any.
        settings: of the table, as they are in its file.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    notes: Sequence[str]
    found: Statistics
    pictures: Sequence[Shown] = ()
    faulty: Sequence[Shown] = ()
    settings: str = ""


def main() -> None:
    if bool(_TABLE.value) == bool(_DATA.value):
        raise InputError("Give --table or --data, one of the two. `--help` shows an example.")
    if _DATA.value and _INPUT.value:
        raise InputError("--input is for a --table; a data set has its pictures in it.")
    for flag in (_NUM_PICTURES, _NUM_FAULTY):
        if not 0 <= flag.value <= MAX_PICTURES:
            raise InputError(f"--{flag.name}={flag.value} must be 0 to {MAX_PICTURES:,}.")
    if _NUM_ROWS.value < 1:
        raise InputError(f"--num_rows={_NUM_ROWS.value} reads nothing; give 1 or more.")
    counter, lacking = _token_counter()
    shown = _of_table(counter) if _TABLE.value else _of_data(counter)
    notes = [*shown.notes, *([lacking] if lacking else [])]
    # Words of captions are no markup.
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    print_statistics(console, shown, notes)
    if not _OUTPUT.value:
        return
    output = epath.Path(_OUTPUT.value)
    light, dark = (plot(shown.found, is_dark) for is_dark in (False, True))
    content = page.render(
        shown.title,
        shown.facts,
        shown.found,
        shown.pictures,
        shown.faulty,
        notes=notes,
        charts=(light, dark),
        settings=shown.settings,
        count_tokens=counter,
    )
    files.write(output / CHART, light)
    files.write(output / PAGE, content)
    console.print(f"{PAGE} ({len(content.encode()) / 1e6:.1f} MB) and {CHART} in {output}")


def _token_counter() -> tuple[TokenCounter | None, str]:
    """Returns what counts tokens, or why nothing does."""
    config = flags.FLAGS.config
    if config is not None:
        return TokenCounter.of(config.text_encoder.to_dict(), config.data.system_prompt), ""
    return TokenCounter.small()


def _measure(rows: Iterable[Row], counter: TokenCounter | None) -> Statistics:
    return statistics.measure(rows, counter, counter.max_tokens if counter else 0)


def _of_table(counter: TokenCounter | None) -> Subject:
    directory = epath.Path(_TABLE.value)
    is_complete = (directory / caption_table.TABLE).exists()
    if is_complete or not (directory / caption_table.SETTINGS).exists():
        settings = caption_table.Table.load(directory).settings  # refuses what is no table
    else:
        settings = read_json(directory / caption_table.SETTINGS, "Make the table again.")
    chosen, num_pieces = statistics.choose_pieces(directory, _NUM_ROWS.value)
    places: list[Place] = []
    with_faults: list[Place] = []

    def rows() -> Iterator[Row]:
        with progress_bar("Reading", len(chosen), unit="pieces") as advance:
            for number, piece in enumerate(chosen, start=1):
                for place, row in statistics.read(directory, [piece]):
                    places.append(place)
                    if row.excluded or row.fault:
                        with_faults.append(place)
                    yield row
                advance(number)

    found = _measure(rows(), counter)
    source = settings.get("source")
    source = source if isinstance(source, Mapping) else {}
    where = _INPUT.value or str(source.get("path", ""))
    share = f"{len(chosen):,} of {num_pieces:,} pieces, " if len(chosen) < num_pieces else ""
    facts = [
        ("table", without_secrets(_TABLE.value)),
        ("source", f"{source.get('kind', 'not named')} {without_secrets(where)}".strip()),
        ("read", f"{share}{found.num_rows:,} pictures, {found.num_captioned:,} with captions"),
    ]
    notes = [] if is_complete else [f"Still being made: so far it has {num_pieces:,} piece(s)."]
    shown = Subject(f"Captions: {directory.name}", facts, notes, found)
    if not _OUTPUT.value:
        return shown
    some = _some(places, _NUM_PICTURES.value)
    others = [place for place in with_faults if place not in set(some)]
    groups = [
        _read_places(directory, some),
        _read_places(directory, _some(others, _NUM_FAULTY.value)),
    ]
    pictures, why = _find_pictures(source, [pair for group in groups for pair in group])
    pictures, faulty = (
        [_shown(row, pictures.get((place.piece.part, row.id), why)) for place, row in group]
        for group in groups
    )
    return shown._replace(
        notes=[*notes, *([f"Pictures are missing. {why}"] if why else [])],
        pictures=pictures,
        faulty=faulty,
        settings=without_secrets(json.dumps(settings, indent=1, ensure_ascii=False)),
    )


def _some(places: Sequence[Place], number: int) -> list[Place]:
    if not places or not number:
        return []
    return [places[index] for index in statistics.evenly(len(places), number)]


def _read_places(directory: epath.Path, places: Sequence[Place]) -> list[tuple[Place, Row]]:
    found = []
    for piece, of_piece in itertools.groupby(places, key=lambda place: place.piece):
        rows = caption_table.read_rows(directory, piece)
        found.extend((place, rows[place.row]) for place in of_piece)
    return found


def _find_pictures(
    named: Mapping, wanted: Sequence[tuple[Place, Row]]
) -> tuple[dict[tuple[int, str], bytes | Rejected], str]:
    """Returns thumbnails by part and id, and why there are no more where the source fails."""
    ids: dict[int, set[str]] = {}
    for place, row in wanted:
        ids.setdefault(place.piece.part, set()).add(row.id)
    found: dict[tuple[int, str], bytes | Rejected] = {}
    try:
        source = open_source(named, _INPUT.value, page.SIDE // 2)  # drawn at twice that
        with progress_bar("Finding", len(ids), unit="parts") as advance:
            parts = zip(ids, page.find_pictures(source, ids), strict=True)
            for number, (part, of_part) in enumerate(parts, start=1):
                found.update({(part, id): picture for id, picture in of_part.items()})
                advance(number)
    except Exception as error:
        if not isinstance(error, InputError) and not is_of_storage(error):
            raise
        logging.info("What failed:", exc_info=True)
        return found, without_secrets(str(error))
    return found, ""


def _shown(row: Row, picture: bytes | Rejected | str) -> Shown:
    if isinstance(picture, bytes):
        return Shown(row, picture)
    return Shown(row, None, without_secrets(str(picture)))


def _of_data(counter: TokenCounter | None) -> Subject:
    manifest = Manifest.load(_DATA.value)
    splits = [split for split in manifest.splits if split.num_records]
    total = manifest.num_records

    def read(number: int) -> Iterator[Record]:
        ends = list(itertools.accumulate(split.num_records for split in splits))
        rows: list[list[int]] = [[] for _ in splits]
        for row in statistics.evenly(total, number) if number else ():
            split = bisect.bisect_right(ends, row)
            rows[split].append(row - ends[split] + splits[split].num_records)
        for split, of_split in zip(splits, rows, strict=True):
            yield from read_some(_DATA.value, split, of_split)

    def rows() -> Iterator[Row]:
        number = min(_NUM_ROWS.value, total)
        with progress_bar("Reading", number, unit="records") as advance:
            for done, record in enumerate(read(number), start=1):
                yield _row(record)
                advance(done)

    found = _measure(rows(), counter)
    facts = [
        ("data", without_secrets(_DATA.value)),
        ("source", manifest.source),
        ("resolution", f"{manifest.resolution} px"),
        ("read", f"{found.num_rows:,} of {total:,} records"),
    ]
    pictures = [
        _shown(_row(record), _thumbnail(record.image))
        for record in (read(_NUM_PICTURES.value) if _OUTPUT.value else ())
    ]
    return Subject(f"Captions: {epath.Path(_DATA.value).name}", facts, (), found, pictures)


def _row(record: Record) -> Row:
    """The captions of a record, which does not say what made them."""
    return Row(record.id, tuple(Written(*caption, "", "", 0) for caption in record.captions))


def _thumbnail(image: bytes) -> bytes | Rejected:
    try:
        return page.thumbnail(image)
    except Rejected as why:
        return why


def print_statistics(console: Console, shown: Subject, notes: Sequence[str]) -> None:
    for name, value in shown.facts:
        console.print(f"{name}: {value}")
    for note in notes:
        console.print(note)
    console.print()
    for table in statistics.tables(shown.found):
        drawn = rich.table.Table(
            title=table.title,
            title_justify="left",
            title_style="bold",
            box=rich.box.SIMPLE_HEAD,
            pad_edge=False,
        )
        for number, name in enumerate(table.columns):
            drawn.add_column(
                name,
                justify="left" if number < table.num_names else "right",
                overflow="fold",
            )
        for row in table.rows:
            drawn.add_row(*map(_visible, row))
        console.print(drawn)
        if table.note:
            console.print(f"{table.note}\n")


def _visible(text: str) -> str:
    """A text without what a terminal would obey."""
    return "".join(c if c.isprintable() else "�" for c in text)


def plot(found: Statistics, is_dark: bool = False) -> bytes:
    """Draws lengths by level, captions by level and language, and the growth of the vocabulary."""
    page_colour, ink, faint, strong = (
        ("#1f2224", "#e4e4e1", "#989da3", "#2e6aa3")
        if is_dark
        else ("#ffffff", "#1d1f21", "#757575", "#8db8e2")
    )
    colours = {
        "figure.facecolor": page_colour, "axes.facecolor": page_colour, "axes.edgecolor": faint,
        "axes.labelcolor": ink, "axes.titlecolor": ink, "text.color": ink, "xtick.color": faint,
        "ytick.color": faint, "savefig.facecolor": page_colour,
    }  # fmt: skip
    with matplotlib.rc_context(colours):
        figure = Figure(figsize=(12, 4.6), layout="constrained")
        lengths, rest = figure.subfigures(1, 2, width_ratios=[1, 1.25])
        level_colours = _COLOURS[is_dark]
        _plot_lengths(lengths, found, level_colours)
        numbers, growth = rest.subplots(1, 2, width_ratios=[1, 1.2])
        _plot_numbers(numbers, found, LinearSegmentedColormap.from_list("", [page_colour, strong]))
        _plot_growth(growth, found, level_colours)
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=110)
    return png.getvalue()


def _plot_lengths(figure, found: Statistics, level_colours: Mapping[str, str]) -> None:
    """A histogram of characters for each level, of its languages together."""
    panels = figure.subplots(max(1, len(found.kinds)), 1, squeeze=False)[:, 0]
    for panel, kind in zip(panels, found.kinds, strict=False):
        of_kind = [c for c in found.captions if c.kind == kind]
        counts = [np.array(sorted(c.characters.counts.items())).T for c in of_kind]
        values, weights = np.concatenate(counts, axis=1)
        # A few very long ones would press the others flat.
        end = float(np.quantile(values, 0.995, weights=weights, method="inverted_cdf"))
        bins = np.arange(0, end + 2, max(1, round(end / 60)))
        heights = [np.clip(v, 0, bins[-1]) for v, _ in counts]
        alphas = np.linspace(1, 0.35, len(of_kind))
        panel.hist(
            heights,
            bins,
            weights=[w for _, w in counts],
            stacked=True,
            color=[(level_colours[kind], alpha) for alpha in alphas],
        )
        means = ", ".join(f"{c.language} {c.characters.mean:,.0f}" for c in of_kind[:4])
        more = f" and {len(of_kind) - 4} more" if len(of_kind) > 4 else ""
        panel.set_title(f"{kind}   mean: {means}{more}", loc="left", fontsize=9)
        panel.set_yticks([])
        panel.set_xlim(0, bins[-1])
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(labelsize=8)
    panels[-1].set_xlabel("characters of a caption", fontsize=9)


def _plot_numbers(panel, found: Statistics, colours: LinearSegmentedColormap) -> None:
    """Levels by languages, each with its number."""
    numbers = {(c.kind, c.language): c.number for c in found.captions}
    table = np.array([[numbers.get((k, g), 0) for k in found.kinds] for g in found.languages])
    panel.set_title("captions read", loc="left", fontsize=9)
    panel.spines[:].set_visible(False)
    if not table.size:
        panel.set_axis_off()
        return
    panel.imshow(table, cmap=colours, vmin=0, vmax=table.max(), aspect="auto")
    for (row, column), number in np.ndenumerate(table):
        panel.text(column, row, f"{number:,}", ha="center", va="center", fontsize=8)
    panel.set_xticks(range(len(found.kinds)), found.kinds, fontsize=8)
    panel.set_yticks(range(len(found.languages)), found.languages, fontsize=8)
    panel.tick_params(length=0)


def _plot_growth(panel, found: Statistics, level_colours: Mapping[str, str]) -> None:
    """Distinct words by words read: a line that flattens early says the same again and again."""
    for captions in found.captions:
        place = found.languages.index(captions.language)
        if place < len(_STYLES):
            words, distinct = np.array(captions.growth).T
            panel.plot(
                words, distinct, _STYLES[place], color=level_colours[captions.kind], linewidth=1.4,
                label=f"{captions.kind}, {captions.language}",
            )  # fmt: skip
    more = len(found.languages) > len(_STYLES)
    title = f"distinct words, the {len(_STYLES)} commonest languages" if more else "distinct words"
    panel.set_title(title, loc="left", fontsize=9)
    panel.set_xlabel("words read", fontsize=9)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=8)
    panel.xaxis.set_major_formatter("{x:,.0f}")
    panel.yaxis.set_major_formatter("{x:,.0f}")
    if found.captions:
        panel.legend(frameon=False, fontsize=7, ncols=1 + (len(found.captions) > 6))


if __name__ == "__main__":
    # Run as a file, Python looks for modules beside it; a config imports its base from the root.
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    cli.run(main)
