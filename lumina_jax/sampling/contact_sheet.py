"""Contact sheets: many pictures on one white page, each with its prompt underneath.

Pillow places the pictures. The words are one transparent SVG over them, drawn by resvg, which
shapes Arabic and Persian, runs them from right to left, and borrows missing letters from other
fonts. The fonts are those that Python packages bring, so a sheet looks the same on every machine;
the fonts of the system are asked only for letters that no package has.
"""

import dataclasses
import functools
import importlib.util
import io
import itertools
import re
import unicodedata
from collections.abc import Sequence
from xml.sax.saxutils import escape

import matplotlib
import numpy as np
import resvg_py
from absl import logging
from etils import epath
from jaxtyping import UInt8
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from lumina_jax import files
from lumina_jax.errors import InputError

_INK, _FAINT, _FRAME = "#1f1f1f", "#8a8a8a", "#e4e4e4"

# Where a line may be broken. Chinese and Japanese have no spaces: any character ends a piece, and
# takes along the marks that may not open a line. Everything else is broken at its spaces.
_CLOSING = r"[、。，．・：；？！ー゛゜」』）】〉》〕々ぁぃぅぇぉっゃゅょゎァィゥェォッャュョヮ]"
_CJK = r"\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uff60"
_PIECES = re.compile(rf"[{_CJK}]{_CLOSING}*\s*|[^\s{_CJK}]+\s*")


@dataclasses.dataclass(frozen=True)
class _Words:
    """One line of text; x is its start or its middle, y its baseline."""

    text: str
    x: float
    y: float
    size: float
    colour: str
    anchor: str = "start"


def contact_sheet(
    images: Sequence[UInt8[np.ndarray, "_ _ 3"]],
    captions: Sequence[str | Sequence[str]],
    *,
    columns: int,
    cell_size: int = 192,
    text_size: float = 0.074,
    title: str | None = None,
    notes: Sequence[str] | None = None,
) -> Image.Image:
    """Draws pictures of any sizes, their longer sides of one length, row by row.

    Args:
      images: the pictures; each is scaled until its longer side is that of a cell.
      captions: what stands under each, in any script, on two lines at most; several texts stand one
        below another.
      columns: pictures per row.
      cell_size: width of a cell in pixels, and its height unless all of a row are wide.
      text_size: height of a caption's letters, in cells.
      title: a line above the pictures.
      notes: a small grey line under each caption, for example its language.
    """
    _check(images, captions, columns, cell_size, notes)
    texts = [[_clean(t) for t in ([c] if isinstance(c, str) else c)] for c in captions]
    title, notes = _clean(title or ""), [_clean(n) for n in notes or ()]
    fonts = _find_fonts("".join([title, *itertools.chain(*texts), *notes, "…"]))
    columns = min(columns, len(images))
    gap = cell_size // 8
    width = gap + columns * (cell_size + gap)
    text_width = 1.04 * cell_size
    title_size, caption_size = 0.115 * cell_size, text_size * cell_size
    note_size = 0.84 * caption_size
    pictures = [_fit(image, cell_size) for image in images]

    words, corners = [], []

    def write(text, x, y, size, line_height, text_width, max_lines, **style) -> float:
        """Adds lines of text under y and returns where they end."""
        font = _best_font(text, fonts)
        for line in _wrap(text, font, size, text_width, max_lines) if text else []:
            y += line_height * size
            words.append(_Words(line, x, y, size, **style))
        return y

    top = gap
    if title:
        top = write(title, float(gap), gap, title_size, 0.8, width - 2.0 * gap, 1, colour=_INK)
        top = round(top + 0.9 * title_size)
    for start in range(0, len(images), columns):
        bottoms = []
        height = max(picture.height for picture in pictures[start : start + columns])
        for i in range(start, min(start + columns, len(images))):
            left = gap + (i - start) * (cell_size + gap)
            x, y = (cell_size - pictures[i].width) // 2, (height - pictures[i].height) // 2
            corners.append((left + x, top + y))
            middle, y = left + cell_size / 2, top + height + 0.4 * caption_size
            style = {"anchor": "middle", "text_width": text_width}
            for number, text in enumerate(texts[i]):
                y += 0.5 * caption_size * (number > 0)
                y = write(text, middle, y, caption_size, 1.35, max_lines=2, colour=_INK, **style)
            if notes:
                y = write(notes[i], middle, y, note_size, 1.6, max_lines=1, colour=_FAINT, **style)
            bottoms.append(y)
        top = round(max(bottoms)) + gap

    sheet = Image.new("RGB", (width, top), "white")
    for picture, (x, y) in zip(pictures, corners, strict=True):
        sheet.paste(picture, (x, y))
        # Around the picture: a white one would have no visible edge on the white page.
        frame = (x - 1, y - 1, x + picture.width, y + picture.height)
        ImageDraw.Draw(sheet).rectangle(frame, outline=_FRAME)
    svg = _svg(words, fonts, *sheet.size)
    png = resvg_py.svg_to_bytes(svg_string=svg, font_files=fonts, skip_system_fonts=True)
    layer = Image.open(io.BytesIO(png)).convert("RGBA")
    sheet.paste(layer, mask=layer)
    return sheet


def save_contact_sheet(
    path: epath.PathLike,
    images: Sequence[UInt8[np.ndarray, "_ _ 3"]],
    captions: Sequence[str | Sequence[str]],
    **layout,
) -> None:
    """Writes the sheet as a PNG, aside first: the path never holds half a picture.

    Args:
      path: a file on any filesystem that epath knows; its folder is made.
      images: as for `contact_sheet`.
      captions: as for `contact_sheet`.
      **layout: the other arguments of `contact_sheet`.
    """
    files.write_png(path, contact_sheet(images, captions, **layout))


def _check(images, captions, columns, cell_size, notes) -> None:
    if not images:
        raise InputError("A contact sheet needs at least one picture; got none.")
    if len(captions) != len(images):
        raise InputError(
            f"A contact sheet needs one caption for each picture; got {len(images)} pictures and "
            f"{len(captions)} captions. Give '' where there is none."
        )
    if notes is not None and len(notes) != len(images):
        raise InputError(
            f"A contact sheet needs one note for each picture; got {len(images)} pictures and "
            f"{len(notes)} notes. Give '' where there is none."
        )
    if columns < 1 or cell_size < 32:
        raise InputError(
            f"columns={columns} and cell_size={cell_size} leave nothing to draw on; "
            "give 1 column or more, and cells of 32 pixels or more."
        )


def _fit(image: UInt8[np.ndarray, "_ _ 3"], size: int) -> Image.Image:
    """Scales a picture until its longer side is `size`."""
    picture = Image.fromarray(image)
    scale = size / max(picture.size)
    shape = tuple(max(1, round(side * scale)) for side in picture.size)
    return picture.resize(shape, Image.Resampling.LANCZOS)


def _clean(text: str) -> str:
    """One line, without the characters that XML cannot carry.

    The joiners that Persian is written with stay: they are of category Cf.
    """
    text = " ".join(text.split())
    return "".join(c for c in text if unicodedata.category(c) not in ("Cc", "Cs", "Co", "Cn"))


def _wrap(text: str, font: str, size: float, width: float, max_lines: int) -> list[str]:
    """Breaks a text into lines; what does not fit ends in an ellipsis."""
    lines = [""]
    for piece in _PIECES.findall(text):
        if lines[-1] and _width(lines[-1] + piece.rstrip(), font, size) > width:
            lines.append("")
        if _width(piece.rstrip(), font, size) <= width:
            lines[-1] += piece
            continue
        for character in piece:  # a word longer than a line
            if _width(lines[-1] + character, font, size) > width:
                lines.append("")
            lines[-1] += character
    if len(lines) > max_lines:
        lines[max_lines - 1 :] = [_cut("".join(lines[max_lines - 1 :]), font, size, width)]
    return [line.rstrip() for line in lines]


def _cut(line: str, font: str, size: float, width: float) -> str:
    while line and _width(line + "…", font, size) > width:
        line = line[:-1]
    return line.rstrip() + "…"


def _width(text: str, font: str, size: float) -> float:
    return _measure(font).getlength(text) * size / 100


@functools.cache
def _measure(font: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font, 100)


def _find_fonts(text: str) -> list[str]:
    """Font files that have, together, all letters of the text, the preferred ones first."""
    fonts = [f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"]
    if importlib.util.find_spec("cvttf_NotoSansCJK_Regular"):
        fonts.append(importlib.import_module("cvttf_NotoSansCJK_Regular").get_TTF_path())
    missing = {c for c in text if not any(_has(font, c) for font in fonts)}
    if missing:
        from matplotlib import font_manager  # slow: its import lists the fonts of the system

        for font in sorted(font_manager.findSystemFonts()):
            found = {c for c in missing if _has(font, c)}
            if found:
                fonts.append(font)
                missing -= found
    if missing:
        logging.log_first_n(
            logging.WARNING,
            "No font here has the letters %s of the captions; they are drawn as empty boxes. For "
            "Chinese, Japanese and Korean: pip install 'lumina-jax[demo]'. For other scripts, "
            "install a font for the system.",
            1,
            "".join(sorted(missing)[:20]),
        )
    return fonts


def _best_font(text: str, fonts: Sequence[str]) -> str:
    """The font that has the most letters of a text; resvg borrows the others from the rest."""
    return max(fonts, key=lambda font: sum(_has(font, c) for c in text))


_face = functools.cache(FT2Font)


@functools.cache
def _has(font: str, character: str) -> bool:
    """Whether a font can draw a character, if need be from its parts."""
    if unicodedata.category(character) in ("Cf", "Zs"):
        return True
    try:
        face = _face(font)
    except (OSError, RuntimeError):  # of the system's fonts, FreeType cannot read every kind
        return False
    parts = unicodedata.normalize("NFD", character)
    return any(all(face.get_char_index(ord(c)) for c in form) for form in (character, parts))


def _svg(words: Sequence[_Words], fonts: Sequence[str], width: int, height: int) -> str:
    lines = []
    for line in words:
        family = _face(_best_font(line.text, fonts)).family_name
        lines.append(
            f'<text x="{line.x:.1f}" y="{line.y:.1f}" font-size="{line.size:.1f}" '
            f'text-anchor="{line.anchor}" fill="{line.colour}" font-family="{escape(family)}">'
            f"{escape(line.text)}</text>"
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">'
        f"{''.join(lines)}</svg>"
    )
