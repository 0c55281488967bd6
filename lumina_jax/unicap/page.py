"""Pictures with their captions as one HTML page, which can be opened anywhere and sent by mail.

The page has no script and asks nobody for anything: pictures are in it, as thumbnails, and its
Content-Security-Policy allows no more than these and its own style sheet. Ids, captions and all
else that others wrote is text, whatever it looks like; characters that would not be seen, or would
turn the text around them, are shown by their numbers.
"""

import base64
import hashlib
import html
import io
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from PIL import Image

from lumina_jax.data import images
from lumina_jax.data.caption_table import Excluded, Row, Written
from lumina_jax.data.captions import KINDS
from lumina_jax.data.images import Rejected
from lumina_jax.data.sources.base import Item, Source
from lumina_jax.unicap.statistics import CountTokens, Statistics, Table, tables, words_of

SIDE = 384  # pixels of a thumbnail's longer side
QUALITY = 80  # of JPEG
NUM_COLUMNS = 3  # languages side by side; more of them flow
_RIGHT_TO_LEFT = frozenset(("ar", "ckb", "dv", "fa", "he", "ps", "sd", "ug", "ur", "yi"))
# Those of bidirectional text turn what follows, even outside of the caption.
_UNSEEN = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ufeff\ufff9-\uffff\ud800-\udfff\U000e0000-\U000e007f]"
)


class Shown(NamedTuple):
    """A picture for the page.

    Attributes:
        row: its captions.
        picture: JPEG of at most SIDE pixels; None where it cannot be shown.
        why: it cannot.
    """

    row: Row
    picture: bytes | None
    why: str = ""


def find_pictures(
    source: Source, wanted: Mapping[int, Collection[str]]
) -> Iterator[dict[str, bytes | Rejected]]:
    """Yields the thumbnails of each part by id, or why there is none; a part is read once.

    Args:
        source: that the captions were made of.
        wanted: ids by the number of the part that has them.
    """
    parts = source.parts()
    for number, ids in wanted.items():
        gone = Rejected("not in the source any more", f"part {number}")
        found: dict[str, bytes | Rejected] = {}
        for item in source.read(parts[number]) if number < len(parts) else ():
            if item.id in ids and item.id not in found:
                found[item.id] = _thumbnail_of(item)
                if len(found) == len(ids):
                    break
        yield {id: found.get(id, gone) for id in ids}


def _thumbnail_of(item: Item) -> bytes | Rejected:
    try:
        return item.fault or thumbnail(item.image)
    except Rejected as why:
        return why


def thumbnail(image: bytes | Image.Image) -> bytes:
    """Returns a small JPEG of a picture, upright and in sRGB; raises Rejected if it is broken."""
    decoded = images.decode(image) if isinstance(image, bytes) else images.to_rgb(image)
    small = decoded.copy()
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    jpeg = io.BytesIO()
    small.save(jpeg, "JPEG", quality=QUALITY, optimize=True)
    return jpeg.getvalue()


def escape(words: str) -> str:
    """Returns a text as HTML that reads the same; what cannot be seen is shown as U+200E."""
    return _UNSEEN.sub(
        lambda found: f'<span class="unseen">U+{ord(found[0]):04X}</span>', html.escape(words)
    )


def render(
    title: str,
    facts: Sequence[tuple[str, str]],
    found: Statistics,
    pictures: Iterable[Shown],
    faulty: Iterable[Shown],
    *,
    notes: Sequence[str] = (),
    charts: tuple[bytes, bytes] | None = None,
    settings: str = "",
    count_tokens: CountTokens | None = None,
) -> str:
    """Returns the page.

    Args:
        title: what is shown.
        facts: names and values, above all else.
        found: the statistics.
        pictures: to be shown.
        faulty: more pictures, with excluded captions or without any.
        notes: what the reader must know, such as that the table is not complete.
        charts: PNG of the statistics, for a light page and for a dark one.
        settings: of the table, as they are in its file.
        count_tokens: as in `measure`.
    """
    pictures, faulty = list(pictures), list(faulty)
    languages = _languages(found, [*pictures, *faulty])
    kinds = _kinds(found, [*pictures, *faulty])

    def count(words: str) -> int | None:
        return int(count_tokens([words])[0]) if count_tokens else None

    def section(name: str, shown: Sequence[Shown]) -> Iterator[str]:
        if shown:
            yield f"<section><h2>{name}</h2>"
            for one in shown:
                yield from _article(one, kinds, languages, count, found.max_tokens)
            yield "</section>"

    style = _STYLE + "".join(_filters("kind", len(kinds)))
    style += "".join(_filters("language", len(languages)))
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'"
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}; form-action \'none\'">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="referrer" content="no-referrer"><meta name="color-scheme" '
            f'content="light dark"><title>{html.escape(_UNSEEN.sub("", title))}</title>',
            f"<style>{style}</style></head>",
            f"<body><header><h1>{escape(title)}</h1><dl>",
            *(f"<div><dt>{escape(n)}</dt><dd>{escape(v)}</dd></div>" for n, v in facts),
            "</dl>",
            *(f'<p class="note">{escape(note)}</p>' for note in notes),
            "</header>",
            "<details open><summary>Statistics</summary>",
            '<div class="tables">',
            *(_table(table) for table in tables(found)),
            "</div>",
            *_charts(charts),
            "</details>",
            *([f"<details><summary>Settings</summary><pre>{escape(settings)}</pre></details>"]
              if settings else []),
            '<nav aria-label="What is shown">',
            _choice("kind", kinds),
            _choice("language", languages),
            "</nav><main>",
            *section("Pictures", pictures),
            *section("More pictures with excluded captions, or without any", faulty),
            "</main></body></html>\n",
        ]
    )  # fmt: skip


def _kinds(found: Statistics, shown: Iterable[Shown]) -> list[str]:
    names = {caption.kind for one in shown for caption in (*one.row.captions, *one.row.excluded)}
    names |= set(found.kinds)
    return sorted(names, key=lambda kind: (KINDS.index(kind) if kind in KINDS else 9, kind))


def _languages(found: Statistics, shown: Iterable[Shown]) -> list[str]:
    names = {c.language for one in shown for c in (*one.row.captions, *one.row.excluded)}
    return [*found.languages, *sorted(names - set(found.languages))]


def _filters(name: str, number: int) -> Iterator[str]:
    """Style that hides all captions but the chosen ones; the numbers are those of the buttons."""
    for index in range(number):
        chosen = f"body:has(#{name}-{index}:checked)"
        yield f"{chosen} [data-{name}]:not([data-{name}='{index}']){{display:none}}"
        if name == "language":
            yield f"{chosen} .cells{{grid-template-columns:1fr}}"


def _choice(name: str, values: Sequence[str]) -> str:
    buttons = [
        f'<label><input type="radio" name="{name}" id="{name}-{key}"'
        f"{' checked' if key == 'all' else ''}><span>{escape(words)}</span></label>"
        for key, words in (("all", "all"), *enumerate(values))
    ]
    legend = {"kind": "Level", "language": "Language"}[name]
    return f"<fieldset><legend>{legend}</legend>{''.join(buttons)}</fieldset>"


def _article(one: Shown, kinds, languages, count, max_tokens: int) -> Iterator[str]:
    row = one.row
    yield '<article><figure class="picture">'
    if one.picture is None:
        why = "" if row.fault else escape(one.why)  # a fault of the picture stands beside it
        yield f'<div class="none">no picture<br>{why}</div>'
    else:
        with Image.open(io.BytesIO(one.picture)) as picture:
            width, height = picture.size
        yield (
            f'<img src="{_data_uri(one.picture, "jpeg")}" width="{width}" height="{height}" '
            f'alt="" loading="lazy">'
        )
    yield f'<figcaption dir="auto">{escape(row.id)}</figcaption></figure><div class="levels">'
    if row.fault:
        yield f'<p class="fault"><b>{escape(row.fault[0])}</b> {escape(row.fault[1])}</p>'
    elif not (row.captions or row.excluded):
        yield '<p class="fault">No caption.</p>'
    # Cells of a language stand below each other, where there is room for all of them.
    here = {c.language for c in (*row.captions, *row.excluded)}
    present = [language for language in languages if language in here]
    columns = len(present) if len(present) <= NUM_COLUMNS else 0
    for index, kind in enumerate(kinds):
        by_language: dict[str, list[Written | Excluded]] = {}
        for caption in (*row.captions, *row.excluded):
            if caption.kind == kind:
                by_language.setdefault(caption.language, []).append(caption)
        if by_language:
            yield (
                f'<section data-kind="{index}"><h3>{escape(kind)}</h3>'
                f'<div class="cells columns-{columns}">'
            )
            for language in present:
                if language in by_language or columns:
                    yield f'<div data-language="{languages.index(language)}">'
                    for caption in by_language.get(language, ()):
                        yield _caption(caption, count, max_tokens)
                    yield "</div>"
            yield "</div></section>"
    yield "</div></article>"


def _caption(caption: Written | Excluded, count, max_tokens: int) -> str:
    language, shown = escape(caption.language), escape(caption.text)
    direction = "rtl" if caption.language in _RIGHT_TO_LEFT else "ltr"
    num_words, num_tokens = len(words_of(caption.text)), count(caption.text)
    small = [
        f'<b class="language">{language}</b>',
        _count(len(caption.text), "character"),
        _count(num_words, "word"),
    ]
    if num_tokens is not None:
        tokens = _count(num_tokens, "token")
        over = num_tokens > max_tokens
        small.append(f'<b class="over">{tokens}, over {max_tokens}</b>' if over else tokens)
    if isinstance(caption, Excluded):
        shown = f"<s>{shown}</s>"
        fault = f'<b class="badge">{escape(caption.fault)}</b> {escape(caption.detail)}'
        small.insert(0, f'<span class="why">{fault}</span>')
    elif caption.model:
        small.append(
            f"{escape(caption.model)}, prompts {escape(caption.prompts)}, seed {caption.seed}"
        )
    return (
        f'<p lang="{language}" dir="{direction}" class="caption">{shown}</p>'
        f'<p class="small">{" · ".join(small)}</p>'
    )


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}{'s' if number != 1 else ''}"


def _table(table: Table) -> str:
    def cell(tag: str, column: int, words: str, language: str | None = None) -> str:
        which = "" if column < table.num_names else ' class="number"'
        spoken = ""
        if language is not None and table.columns[column] == "":
            direction = "rtl" if language in _RIGHT_TO_LEFT else "ltr"
            spoken = f' lang="{escape(language)}" dir="{direction}"'
        return f"<{tag}{which}{spoken}>{escape(words)}</{tag}>"

    head = "".join(cell("th", column, name) for column, name in enumerate(table.columns))
    rows = "".join(
        f"<tr>{''.join(cell('td', n, words, language) for n, words in enumerate(row))}</tr>"
        for row, language in zip(table.rows, table.languages, strict=True)
    )
    note = f"<small>{escape(table.note)}</small>" if table.note else ""
    return (
        f"<table><caption>{escape(table.title)} {note}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    )


def _charts(charts: tuple[bytes, bytes] | None) -> list[str]:
    if charts is None:
        return []
    light, dark = (_data_uri(png, "png") for png in charts)
    return [
        '<picture class="charts">'
        f'<source media="screen and (prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="Lengths of the captions by level, their number by language, and '
        'the growth of the vocabulary"></picture>'
    ]


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


_STYLE = """
:root{color-scheme:light dark;--page:#f6f6f4;--card:#fff;--ink:#1d1f21;--faint:#6a6e73;
--line:#e2e2de;--accent:#2563a8;--warn:#a8430f;--warn-page:#fbeee6}
@media (prefers-color-scheme:dark){:root{--page:#16181a;--card:#1f2224;--ink:#e4e4e1;
--faint:#989da3;--line:#33373a;--accent:#7fb2e6;--warn:#f0a274;--warn-page:#3a271c}}
*{box-sizing:border-box}
html{scroll-padding-top:4rem}
body{margin:0 auto;padding:1.5rem;max-width:84rem;background:var(--page);color:var(--ink);
font:15px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Liberation Sans",
"DejaVu Sans","Noto Sans CJK SC","PingFang SC","Microsoft YaHei",sans-serif}
:lang(zh){font-family:"PingFang SC","Microsoft YaHei","Noto Sans CJK SC","Noto Sans SC",
"Source Han Sans SC",system-ui,sans-serif;line-height:1.6}
:lang(ja){font-family:"Hiragino Sans","Yu Gothic UI","Noto Sans CJK JP","Noto Sans JP",
"Noto Sans CJK SC",system-ui,sans-serif;line-height:1.6}
:lang(ko){font-family:"Apple SD Gothic Neo","Malgun Gothic","Noto Sans CJK KR","Noto Sans KR",
"Noto Sans CJK SC",system-ui,sans-serif}
h1{font-size:1.35rem;margin:0 0 .5rem;overflow-wrap:anywhere}
h2{font-size:1.05rem;margin:1.6rem 0 .6rem}
h3{font-size:.72rem;letter-spacing:.06em;text-transform:uppercase;color:var(--faint);margin:0;
padding-top:.2rem}
dl{display:flex;flex-wrap:wrap;gap:.2rem 1.6rem;margin:0}
dl div{display:flex;gap:.4rem}dt{color:var(--faint)}dd{margin:0;overflow-wrap:anywhere}
.note,.fault{margin:.6rem 0 0;padding:.35rem .7rem;border-radius:4px;color:var(--warn);
background:var(--warn-page);overflow-wrap:anywhere}
.fault{margin:0}
details{margin-top:1rem;padding:.6rem .9rem;background:var(--card);border:1px solid var(--line);
border-radius:6px}
summary{cursor:pointer;font-weight:600}
pre{overflow:auto;font-size:.8rem;white-space:pre-wrap;overflow-wrap:anywhere}
.tables{display:flex;flex-wrap:wrap;gap:1.1rem 2.4rem;margin:.8rem 0 .4rem;align-items:flex-start}
table{border-collapse:collapse;font-size:.82rem;font-variant-numeric:tabular-nums}
caption{text-align:start;font-weight:600;padding-bottom:.25rem}
caption small{font-weight:400;color:var(--faint);padding-inline-start:.4rem}
th{font-weight:400;color:var(--faint);border-bottom:1px solid var(--line)}
th,td{text-align:start;padding:.1rem .9rem .1rem 0;vertical-align:top;max-width:34rem;
overflow-wrap:anywhere}
.number{text-align:end;white-space:nowrap}th:last-child,td:last-child{padding-right:0}
.charts img{display:block;width:100%;height:auto;margin-top:.8rem}
nav{position:sticky;top:0;z-index:1;display:flex;flex-wrap:wrap;gap:.4rem 1.6rem;
padding:.6rem 0;margin-top:1rem;background:var(--page);border-bottom:1px solid var(--line)}
fieldset{display:flex;flex-wrap:wrap;gap:.2rem;align-items:center;border:0;margin:0;padding:0}
legend{float:left;padding:0 .5rem 0 0;color:var(--faint);font-size:.85rem}
label{cursor:pointer;font-size:.85rem}
input{position:absolute;opacity:0;pointer-events:none}
label span{display:inline-block;padding:.1rem .6rem;border:1px solid var(--line);
border-radius:99px;background:var(--card)}
input:checked+span{background:var(--accent);border-color:var(--accent);color:var(--page)}
input:focus-visible+span{outline:2px solid var(--accent);outline-offset:2px}
article{display:grid;grid-template-columns:minmax(9rem,15rem) minmax(0,1fr);gap:1.1rem;
padding:1rem;margin-bottom:.8rem;background:var(--card);border:1px solid var(--line);
border-radius:6px}
.picture{margin:0;min-width:0}
.picture img{display:block;max-width:100%;height:auto;border-radius:3px;background:#fff}
.none{padding:.8rem .6rem;border:1px dashed var(--line);border-radius:3px;text-align:center;
color:var(--faint);font-size:.82rem;overflow-wrap:anywhere}
figcaption{margin-top:.35rem;color:var(--faint);font-size:.78rem;overflow-wrap:anywhere}
.levels{display:flex;flex-direction:column;gap:.7rem;min-width:0}
.levels section{display:grid;grid-template-columns:4.2rem minmax(0,1fr);gap:.4rem}
.cells{display:grid;gap:.7rem 1.4rem;grid-template-columns:repeat(auto-fill,minmax(13rem,1fr))}
.columns-1{grid-template-columns:1fr}
.columns-2{grid-template-columns:repeat(2,minmax(0,1fr))}
.columns-3{grid-template-columns:repeat(3,minmax(0,1fr))}
.cells>div{min-width:0}
.caption{margin:0;white-space:pre-wrap;overflow-wrap:anywhere}
.small{margin:.15rem 0 .5rem;color:var(--faint);font-size:.74rem;overflow-wrap:anywhere}
.small:last-child{margin-bottom:0}
[dir=rtl]+.small{text-align:right}
.language{color:var(--ink);font-weight:600}
s{color:var(--faint);text-decoration-color:var(--warn)}
.over,.why{color:var(--warn)}
.unseen{font:.7em/1 ui-monospace,monospace;padding:0 .2em;border:1px solid var(--line);
border-radius:2px;color:var(--warn);direction:ltr;unicode-bidi:isolate}
@media (max-width:48rem){article{grid-template-columns:1fr}.picture{max-width:20rem}
.levels section{grid-template-columns:1fr}.columns-2,.columns-3{grid-template-columns:1fr}}
@media print{:root{--page:#fff;--card:#fff;--ink:#000;--faint:#555;--line:#ccc}
body{padding:0;font-size:10pt}nav{display:none}article,table,tr{break-inside:avoid}}
"""
