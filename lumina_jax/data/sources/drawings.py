"""Captions of flat drawings, made from what is measured in their pixels; no model is asked.

A drawing of few colours says much about itself: which colours it has and how much of each, where
they lie and in how many patches, its outlines, its shape, whether its halves mirror each other.
Together with its name that gives captions of the kinds long, medium and tags, in English and
Chinese. They are dry, but true, and follow from the pixels alone: the same drawing has the same
captions on every machine.

    pixels -> the nearest named colour of each (in OKLab) -> patches -> `Facts` -> sentences

OKLab: Ottosson 2020, "A perceptual color space for image processing"; in it, equal distances look
about equally large.

Axes: H W the drawing, reduced to at most 128 pixels; n colours.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.ndimage
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image

from lumina_jax.data.captions import Caption

# The names of colours, in English and Chinese, and what they stand for: OpenMoji's own palette,
# which also parts the other colours well.
COLOURS = {
    "black": ("黑色", "#000000"), "dark grey": ("深灰色", "#3f3f3f"), "grey": ("灰色", "#9b9b9a"),
    "light grey": ("浅灰色", "#d0cfce"), "white": ("白色", "#ffffff"),
    "dark red": ("深红色", "#781e32"), "red": ("红色", "#d22f27"),
    "light red": ("浅红色", "#ea5a47"),
    "rose": ("玫红色", "#e67a94"), "pink": ("粉色", "#ffa7c0"), "orange": ("橙色", "#e27022"),
    "amber": ("琥珀色", "#f3ae2e"), "yellow": ("黄色", "#fcea2b"),
    "yellow-green": ("黄绿色", "#b1cc33"), "green": ("绿色", "#5c9e31"),
    "dark green": ("深绿色", "#186648"), "light blue": ("浅蓝色", "#92d3f5"),
    "blue": ("蓝色", "#61b2e4"), "dark blue": ("深蓝色", "#1e50a0"),
    "purple": ("紫色", "#8967aa"), "lilac": ("淡紫色", "#b399c8"),
    "brown": ("棕色", "#a57939"), "dark brown": ("深棕色", "#6a462f"),
}  # fmt: skip
NAMES = tuple(COLOURS)

_SIDE = 128  # pixels of the longer side that is measured
_LINE = 4  # pixels; what is less than twice as thick, and black, is a line
_SURE = 0.05  # distance in OKLab up to which a pixel is of a colour, not a mixture at an edge
_BLACK = NAMES.index("black")


class Patch(NamedTuple):
    """A connected region of one colour.

    Attributes:
      place: One of the places of `_WORDS`.
      form: One of its forms.
      area: Share of the ink.
    """

    place: str
    form: str
    area: float


class Facts(NamedTuple):
    """What is measured in a drawing.

    Attributes:
      ratio: Width over height.
      filled: Share of the rectangle around it that has ink.
      colours: Of fills, in order of area, and their shares of the ink; lines are left out, so a
        drawing of lines has none.
      patches: Of each of these colours, the largest first.
      bands: The main colour of the upper, the middle and the lower third, then of the left, the
        middle and the right one; "" where there is nothing.
      outlined: Share of its edge that is a black line.
      mirrored: Share of the drawing that is the same in its mirror image.
      num_pieces: Connected pieces of ink.
    """

    ratio: float
    filled: float
    colours: Mapping[str, float]
    patches: Mapping[str, Sequence[Patch]]
    bands: tuple[tuple[str, ...], tuple[str, ...]]
    outlined: float
    mirrored: float
    num_pieces: int


def describe(drawing: Image.Image, names: Mapping[str, str]) -> tuple[Caption, ...]:
    """Returns the captions of a drawing: long, medium and tags, in English and Chinese.

    Args:
      drawing: RGBA, trimmed to its ink.
      names: Of what it shows, by language.
    """
    facts = measure(drawing)
    captions = []
    for language, words in _WORDS.items():
        name = names[language]
        # Which of the sentences that say the same it is, follows from the name alone.
        rng = random.Random(name)
        captions += [
            Caption(_long(name, facts, words, rng), "long", language),
            Caption(_medium(name, facts, words), "medium", language),
            Caption(_tags(name, facts, words), "tags", language),
        ]
    return tuple(captions)


def measure(drawing: Image.Image) -> Facts:
    """Returns the facts of an RGBA drawing that is trimmed to its ink."""
    labels, ink = _labels(drawing)
    height, width = labels.shape
    num_ink = int(ink.sum())
    fills = _without_lines(labels)
    lines = (labels == _BLACK) & (fills < 0)
    areas = {
        name: float((fills == number).sum() / num_ink)
        for number, name in enumerate(NAMES)
        if (fills == number).any()
    }
    colours = {n: a for n, a in sorted(areas.items(), key=lambda item: -item[1]) if a >= 0.02}
    fills = np.where(np.isin(fills, [NAMES.index(name) for name in colours]), fills, -1)
    edge = ink & ~_eroded(ink, 2)
    mirror = labels[:, ::-1]
    return Facts(
        ratio=width / height,
        filled=num_ink / labels.size,
        colours=colours,
        patches={name: _patches(fills == NAMES.index(name), num_ink) for name in colours},
        bands=(_bands(fills, ink, axis=0), _bands(fills, ink, axis=1)),
        outlined=float(lines[edge].mean()),
        mirrored=_mirrored(labels, mirror),
        num_pieces=sum(bool(r.sum() > 0.003 * labels.size) for r in _regions(ink)),
    )


def _labels(drawing: Image.Image) -> tuple[Int[np.ndarray, "H W"], Bool[np.ndarray, "H W"]]:
    """The colour of each pixel, as its number in `NAMES` and -1 without ink; where ink is."""
    scale = _SIDE / max(drawing.size)
    size = tuple(max(1, round(scale * side)) for side in drawing.size)
    # Nearest: an average of neighbours is a colour that the drawing does not have.
    pixels = np.asarray(drawing.convert("RGBA").resize(size, Image.Resampling.NEAREST))
    ink = pixels[..., 3] >= 128
    alpha = pixels[..., 3:] / 255
    over_white = np.uint8(np.round(pixels[..., :3] * alpha + 255 * (1 - alpha)))
    distances = np.linalg.norm(oklab(over_white)[:, :, None] - _palette(), axis=-1)
    labels = distances.argmin(axis=-1)
    # Where two colours meet, their mixture may be near a third one: it takes that of a neighbour.
    sure = ink & (distances.min(axis=-1) < _SURE)
    if sure.any():
        far, (rows, columns) = scipy.ndimage.distance_transform_edt(~sure, return_indices=True)
        labels = np.where(far <= 2, labels[rows, columns], labels)
    return np.where(ink, labels, -1), ink


def oklab(pixels: UInt8[np.ndarray, "*n 3"]) -> Float[np.ndarray, "*n 3"]:
    """Lightness, green to red, blue to yellow, of sRGB."""
    encoded = pixels.astype(np.float64) / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ _TO_CONES.T) @ _FROM_CONES.T


_TO_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_FROM_CONES = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def _palette() -> Float[np.ndarray, "n 3"]:
    codes = [bytes.fromhex(code[1:]) for _, code in COLOURS.values()]
    return oklab(np.array([list(code) for code in codes], np.uint8))


def _without_lines(labels: Int[np.ndarray, "H W"]) -> Int[np.ndarray, "H W"]:
    """The labels without what is black and thin: -1 there."""
    black = labels == _BLACK
    thick = scipy.ndimage.binary_dilation(_eroded(black, _LINE), _disk(_LINE)) & black
    return np.where(black & ~thick, -1, labels)


def _disk(radius: int) -> Bool[np.ndarray, "_ _"]:
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    return x**2 + y**2 <= radius**2


def _eroded(mask: Bool[np.ndarray, "H W"], radius: int) -> Bool[np.ndarray, "H W"]:
    """Beyond the border nothing is set."""
    return scipy.ndimage.binary_erosion(mask, _disk(radius))


def _regions(mask: Bool[np.ndarray, "H W"]) -> list[Bool[np.ndarray, "H W"]]:
    """Connected regions, the largest first."""
    numbers, count = scipy.ndimage.label(mask, np.ones((3, 3)))
    sizes = np.bincount(numbers.ravel(), minlength=count + 1)[1:]
    return [numbers == number + 1 for number in np.argsort(-sizes, kind="stable")]


def _patches(mask: Bool[np.ndarray, "H W"], num_ink: int) -> list[Patch]:
    """Of one colour, the largest first; what is smaller than 0.3 % of the ink is none."""
    regions = _regions(mask)
    chosen = [region for region in regions if region.sum() >= 0.003 * num_ink] or regions[:1]
    patches = []
    for region in chosen:
        # What is drawn inside a patch does not change what it looks like.
        whole = scipy.ndimage.binary_fill_holes(region)
        rows, columns = (np.flatnonzero(whole.any(axis=axis)) for axis in (1, 0))
        box = whole[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        patches.append(Patch(_place(whole, box), _form(box), float(region.sum() / num_ink)))
    return patches


def _place(patch: Bool[np.ndarray, "H W"], box: Bool[np.ndarray, "_ _"]) -> str:
    """Where a patch lies in the drawing, by its name in `_WORDS`."""
    centre = scipy.ndimage.center_of_mass(patch)
    row, column = (
        names[int(at > 0.4 * side) + int(at > 0.6 * side)]
        for at, side, names in zip(
            centre, patch.shape, (("top", "", "bottom"), ("left", "", "right")), strict=True
        )
    )
    # A crescent or a diagonal is as wide as what it fills: it lies where its middle is.
    solid = box.mean() >= 0.55
    down, across = (
        solid and part >= 0.7 * side for part, side in zip(box.shape, patch.shape, strict=True)
    )
    if down and across:
        return "all over"
    if down:
        return f"down {column or 'middle'}"
    if across:
        return f"across {row or 'middle'}"
    return f"{row} {column}".strip() or "middle"


def _form(box: Bool[np.ndarray, "h w"]) -> str:
    """What a patch looks like, by its name in `_WORDS`."""
    height, width = box.shape
    if min(height, width) < 5:
        return "line" if max(height, width) >= 15 else "spot"
    y, x = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    ellipse = x**2 + y**2 <= 1
    equal = 0.83 <= width / height <= 1.2
    if (box & ellipse).sum() / (box | ellipse).sum() >= 0.92:
        return "round" if equal else "oval"
    if box.mean() >= 0.95:
        return "square" if equal else "rectangle"
    if not 0.4 <= width / height <= 2.5:
        return "wide" if width > height else "tall"
    return "patch"


def _bands(
    fills: Int[np.ndarray, "H W"], ink: Bool[np.ndarray, "H W"], axis: int
) -> tuple[str, ...]:
    """The colour that has the most area in each third along an axis; black where only lines are."""
    thirds = zip(np.array_split(fills, 3, axis), np.array_split(ink, 3, axis), strict=True)
    found = []
    for part, part_ink in thirds:
        counts = np.bincount(part[part >= 0], minlength=len(NAMES))
        found.append(NAMES[counts.argmax()] if counts.any() else "black" if part_ink.any() else "")
    return tuple(found)


def _mirrored(labels: Int[np.ndarray, "H W"], mirror: Int[np.ndarray, "H W"]) -> float:
    """The share of equal pixels among those with ink in either; a line may be a pixel off."""
    either = (labels >= 0) | (mirror >= 0)
    same = np.zeros_like(either)
    for shift in (-1, 0, 1):
        same |= labels == np.roll(mirror, shift, axis=1)
    return float(same[either].mean())


def _long(name: str, facts: Facts, words: Mapping[str, Any], rng: random.Random) -> str:
    """Five to nine sentences; each says a fact, in one of the ways there are."""

    def say(sentence: str, **parts: str) -> str:
        return rng.choice(words[sentence]).format(**parts)

    sentences = [
        say("opening", name=name, shape=words["shapes"][_shape(facts)]),
        say("colours are", colours=_amounts(facts, words)) if facts.colours else say("only lines"),
    ]
    for colour in list(facts.colours)[:2]:
        sentence, parts = _where(facts.patches[colour], words)
        sentences.append(say(sentence, colour=words["colours"][colour], **parts))
    sentences.append(say(_outline(facts)))
    if symmetry := _symmetry(facts):
        sentences.append(say(symmetry))
    direction, band = max(
        zip(("downwards", "rightwards"), facts.bands, strict=True), key=lambda x: len(set(x[1]))
    )
    if len(set(band)) > 1 and all(band):
        colours = [words["colours"][colour] for colour in band]
        sentences.append(say(direction, colours=_listed(colours, words)))
    sentences.append(
        say(
            "extent",
            pieces=_counted("pieces", facts.num_pieces, words),
            filled=words["filled"][_filled(facts)],
        )
    )
    return words["space"].join(sentences)


def _medium(name: str, facts: Facts, words: Mapping[str, Any]) -> str:
    marks = words["marks"]
    parts = [
        _amounts(facts, words) if facts.colours else marks["only lines"],
        marks[_outline(facts)],
        words["shapes"][_shape(facts)],
    ]
    if (symmetry := _symmetry(facts)) in marks:
        parts.append(marks[symmetry])
    return words["medium"].format(name=name, parts=words["comma"].join(parts))


def _tags(name: str, facts: Facts, words: Mapping[str, Any]) -> str:
    marks = words["marks"]
    tags = [name, *(words["colours"][colour] for colour in facts.colours)]
    tags += [marks[_outline(facts)], marks[_shape(facts)]]
    if (symmetry := _symmetry(facts)) in marks:
        tags.append(marks[symmetry])
    return words["comma"].join([*tags, *words["closing tags"]])


def _amounts(facts: Facts, words: Mapping[str, Any]) -> str:
    """How much there is of each colour, from the most to the least; three at most."""
    (first, share), *others = list(facts.colours.items())[:3]
    main = words["main"][_amount(share)].format(words["colours"][first])
    rest = [words["rest"][_amount(share)].format(words["colours"][c]) for c, share in others]
    return words["with"].format(main, _listed(rest, words)) if rest else main


def _where(patches: Sequence[Patch], words: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """The sentence of `_WORDS` that says where a colour lies, and what to put into it."""
    first, form = words["places"][patches[0].place], words["forms"][patches[0].form]
    if len(patches) == 1:
        return "one patch", {"form": form, "place": first}
    if patches[1].area < 0.25 * patches[0].area:
        return "largest patch", {"form": form, "place": first}
    if len(patches) > 2:
        return "many patches", {
            "count": _counted("patches", len(patches), words),
            "place": first,
        }
    second = words["places"][patches[1].place]
    if second == first:
        return "two patches together", {"place": first}
    return "two patches", {"place": first, "other": second}


def _listed(parts: Sequence[str], words: Mapping[str, Any]) -> str:
    *most, last = parts
    return words["and"].format(words["list"].join(most), last) if most else last


def _counted(things: str, number: int, words: Mapping[str, Any]) -> str:
    """Such as "five pieces"; more than there are numerals are "many"."""
    one, more = words[things]
    numerals = words["numerals"]
    return one if number == 1 else more.format(numerals[min(number, len(numerals)) - 1])


def _amount(share: float) -> str:
    return _step(share, {"little": 0.12, "some": 0.4, "half": 0.6, "most": np.inf})


def _shape(facts: Facts) -> str:
    bounds = {"very tall": 0.45, "tall": 0.87, "square": 1.15, "wide": 2.2, "very wide": np.inf}
    return _step(facts.ratio, bounds)


def _filled(facts: Facts) -> str:
    bounds = {"little": 0.25, "third": 0.42, "half": 0.58, "most": 0.9, "all": np.inf}
    return _step(facts.filled, bounds)


def _outline(facts: Facts) -> str:
    bounds = {"not outlined": 0.2, "partly outlined": 0.7, "outlined": np.inf}
    return _step(facts.outlined, bounds)


def _symmetry(facts: Facts) -> str:
    bounds = {"not mirrored": 0.65, "": 0.88, "nearly mirrored": 0.98, "mirrored": np.inf}
    return _step(facts.mirrored, bounds)


def _step(value: float, bounds: Mapping[str, float]) -> str:
    """The first name whose upper bound is above the value."""
    return next(name for name, bound in bounds.items() if value < bound)


_ENGLISH = {
    "colours": {name: name for name in COLOURS},
    "opening": (
        "A flat drawing of the emoji “{name}” on white, {shape}.",
        "“{name}”, drawn as an emoji on a white ground, {shape}.",
        "This simple picture on white shows the emoji “{name}”; it is {shape}.",
        "The emoji “{name}” in flat colours on white. The drawing is {shape}.",
    ),
    "shapes": {
        "very tall": "much taller than wide", "tall": "taller than wide",
        "square": "about as wide as tall",
        "wide": "wider than tall", "very wide": "much wider than tall",
    },
    "colours are": (
        "It is {colours}.", "The drawing is {colours}.", "By area it is {colours}.",
    ),
    "only lines": ("It is made of black lines alone.", "It has black lines and no filled colour."),
    "main": {"most": "mostly {}", "half": "about half {}", "some": "above all {}",
             "little": "above all {}"},
    "rest": {"half": "nearly half {}", "some": "some {}", "little": "a little {}"},
    "with": "{}, with {}",
    "one patch": (
        "The {colour} is {form} {place}.", "The {colour} forms {form} {place}.",
    ),
    "largest patch": (
        "The largest part of the {colour} is {form} {place}.",
        "Most of the {colour} is {form} {place}.",
    ),
    "two patches": (
        "The {colour} is in two patches, {place} and {other}.",
        "There are two patches of {colour}, {place} and {other}.",
    ),
    "two patches together": ("There are two patches of {colour}, both {place}.",),
    "many patches": (
        "The {colour} is in {count}, the largest {place}.",
        "There are {count} of {colour}; the largest is {place}.",
    ),
    "places": {
        "all over": "over nearly all of the drawing",
        "across top": "across the top", "across middle": "across the middle",
        "across bottom": "across the bottom", "down left": "down the left side",
        "down middle": "down the middle", "down right": "down the right side",
        "top left": "in the upper left", "top": "at the top", "top right": "in the upper right",
        "left": "at the left", "middle": "in the middle", "right": "at the right",
        "bottom left": "in the lower left", "bottom": "at the bottom",
        "bottom right": "in the lower right",
    },
    "forms": {
        "round": "a round patch", "oval": "an oval patch", "square": "a square",
        "rectangle": "a rectangle", "line": "a line", "spot": "a spot", "wide": "a wide patch",
        "tall": "a tall patch", "patch": "a patch",
    },
    "outlined": (
        "Black lines run around it.", "It is outlined in black.", "It has black outlines.",
    ),
    "partly outlined": ("A part of its edge is a black line.", "It is partly outlined in black."),
    "not outlined": ("It has no black outline.", "No black line runs around it."),
    "mirrored": ("The left half mirrors the right half.", "It is symmetric, left and right."),
    "nearly mirrored": ("Left and right are nearly mirror images.", "It is nearly symmetric."),
    "not mirrored": ("The left half differs from the right half.", "It is not symmetric."),
    "downwards": ("From top to bottom the main colours are {colours}.",),
    "rightwards": ("From left to right the main colours are {colours}.",),
    "extent": (
        "The drawing is in {pieces} and fills {filled} the rectangle around it.",
        "It fills {filled} the rectangle around it, in {pieces}.",
    ),
    "pieces": ("one piece", "{} pieces"),
    "patches": ("one patch", "{} patches"),
    "filled": {
        "little": "a small part of", "third": "about a third of", "half": "about half of",
        "most": "most of", "all": "nearly all of",
    },
    "numerals": ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "many"),
    "medium": "The emoji “{name}”: {parts}.",
    "marks": {
        "only lines": "black lines", "outlined": "black outlines",
        "partly outlined": "partly outlined in black", "not outlined": "no outlines",
        "mirrored": "symmetric", "very tall": "very tall", "tall": "tall", "square": "square",
        "wide": "wide", "very wide": "very wide",
    },
    "closing tags": ("emoji", "flat drawing", "white background"),
    "and": "{} and {}", "list": ", ", "comma": ", ", "space": " ",
}  # fmt: skip

_CHINESE = {
    "colours": {name: chinese for name, (chinese, _) in COLOURS.items()},
    "opening": (
        "白色背景上的表情符号“{name}”，扁平画风，{shape}。",
        "一幅简单的图画，白底上画着表情符号“{name}”，{shape}。",
        "用平涂色彩画成的表情符号“{name}”，背景为白色，整体{shape}。",
    ),
    "shapes": {
        "very tall": "高度远大于宽度", "tall": "高度大于宽度", "square": "宽高大致相等",
        "wide": "宽度大于高度", "very wide": "宽度远大于高度",
    },
    "colours are": ("颜色{colours}。", "画面颜色{colours}。", "按面积看，颜色{colours}。"),
    "only lines": ("全图只用黑色线条画成。", "只有黑色线条，没有填充颜色。"),
    "main": {"most": "以{}为主", "half": "约一半是{}", "some": "最多的是{}",
             "little": "最多的是{}"},
    "rest": {"half": "将近一半{}", "some": "一些{}", "little": "少量{}"},
    "with": "{}，还有{}",
    "one patch": ("{colour}是{place}的{form}。", "{place}有{form}是{colour}的。"),
    "largest patch": ("最大的一处{colour}是{place}的{form}。", "{colour}大部分是{place}的{form}。"),
    "two patches": (
        "{colour}分成两块，分别在{place}和{other}。", "{place}和{other}各有一块{colour}。",
    ),
    "two patches together": ("{place}有两块{colour}。",),
    "many patches": (
        "{colour}分成{count}，最大的在{place}。", "有{count}{colour}，最大的在{place}。",
    ),
    "places": {
        "all over": "几乎整个画面", "across top": "横贯上部", "across middle": "横贯中部",
        "across bottom": "横贯下部", "down left": "贯穿左侧", "down middle": "纵贯中间",
        "down right": "贯穿右侧", "top left": "左上方", "top": "上方", "top right": "右上方",
        "left": "左边", "middle": "中间", "right": "右边", "bottom left": "左下方",
        "bottom": "下方", "bottom right": "右下方",
    },
    "forms": {
        "round": "一块圆形", "oval": "一块椭圆形", "square": "一块正方形",
        "rectangle": "一块长方形",
        "line": "一条线", "spot": "一个小点", "wide": "一块扁长的区域", "tall": "一块细高的区域",
        "patch": "一块区域",
    },
    "outlined": ("四周有黑色轮廓线。", "用黑色线条勾边。"),
    "partly outlined": ("一部分边缘有黑色轮廓线。", "部分边缘用黑色勾边。"),
    "not outlined": ("没有黑色轮廓线。", "四周没有用黑色勾边。"),
    "mirrored": ("左右对称。", "左半边与右半边互为镜像。"),
    "nearly mirrored": ("左右基本对称。", "左右两半几乎一样。"),
    "not mirrored": ("左右不对称。", "左半边与右半边不同。"),
    "downwards": ("从上到下，主要颜色依次是{colours}。",),
    "rightwards": ("从左到右，主要颜色依次是{colours}。",),
    "extent": ("图形{pieces}，占外接矩形的{filled}。", "它占外接矩形的{filled}，{pieces}。"),
    "pieces": ("连成一体", "由{}个部分组成"),
    "patches": ("一块", "{}块"),
    "filled": {
        "little": "一小部分", "third": "约三分之一", "half": "约一半", "most": "大部分",
        "all": "几乎全部",
    },
    "numerals": ("一", "两", "三", "四", "五", "六", "七", "八", "九", "许多"),
    "medium": "表情符号“{name}”：{parts}。",
    "marks": {
        "only lines": "黑色线条", "outlined": "黑色轮廓线", "partly outlined": "部分黑色轮廓线",
        "not outlined": "无轮廓线", "mirrored": "左右对称", "very tall": "细高", "tall": "竖长",
        "square": "方形构图", "wide": "横宽", "very wide": "扁长",
    },
    "closing tags": ("表情符号", "扁平画风", "白色背景"),
    "and": "{}和{}", "list": "、", "comma": "，", "space": "",
}  # fmt: skip

# The same keys in each language.
_WORDS: Mapping[str, Mapping[str, Any]] = {"en": _ENGLISH, "zh": _CHINESE}
