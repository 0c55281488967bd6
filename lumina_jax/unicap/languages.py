"""Languages: their names, and which one a text is in.

First by script, which tells Chinese from English in one word. Then, of languages in one script, by
lingua, which needs no download and some twenty letters.
"""

import functools
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from lumina_jax.errors import InputError

# Those that are written most, for a text to be told from; each takes memory.
_COMMON = ("en", "zh", "es", "fr", "de", "ru", "pt", "it", "ja", "ko", "ar", "hi", "tr", "vi")
# Too alike to be told apart for sure: one of a row is not held against another.
_ALIKE = (
    {"nb", "nn", "da"}, {"id", "ms"}, {"hr", "bs", "sr"}, {"cs", "sk"}, {"es", "ca", "pt"},
    {"xh", "zu"}, {"st", "tn"},
)  # fmt: skip
# Sure enough to throw a caption away: the other language is this likely, and this one not.
_LIKELY, _UNLIKELY = 0.8, 0.05
_MIN_LETTERS = 20  # fewer say little, except in a script of their own
_MIN_KANJI = 12  # Japanese without kana, which is short or it has some
_SENTENCE_END = re.compile(r"(?<=[.!?。！？؟।])\s*")
_ALIASES = {"no": "nb"}
# Scripts by the first word of the names that Unicode gives to their letters; of others it is Latin.
_SCRIPTS = {
    "zh": ("CJK",), "ja": ("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"),
    "ko": ("HANGUL", "CJK"), "el": ("GREEK",), "he": ("HEBREW",), "hy": ("ARMENIAN",),
    "ka": ("GEORGIAN",), "th": ("THAI",), "hi": ("DEVANAGARI",), "mr": ("DEVANAGARI",),
    "bn": ("BENGALI",), "gu": ("GUJARATI",), "pa": ("GURMUKHI",), "ta": ("TAMIL",),
    "te": ("TELUGU",), "sr": ("CYRILLIC", "LATIN"), "bs": ("CYRILLIC", "LATIN"),
    **dict.fromkeys(("ru", "uk", "be", "bg", "mk", "kk", "mn"), ("CYRILLIC",)),
    **dict.fromkeys(("ar", "fa", "ur"), ("ARABIC",)),
}  # fmt: skip
# Latin letters that one of a script is worth.
_WEIGHTS = {"CJK": 3, "HANGUL": 3, "HIRAGANA": 2, "KATAKANA": 2, "KATAKANA-HIRAGANA": 2}
_MIN_WEIGHT = 6  # DVD is written so everywhere
_FOREIGN_WORDS = 4  # in a row; a name or two of another script are no fault
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")


def name(language: str) -> str:
    """Returns the English name of a two-letter code: zh -> Chinese."""
    return _known()[language].name.capitalize()


def is_known(language: str) -> bool:
    return language in _known()


def check(wanted: Sequence[str]) -> None:
    """Raises InputError unless each of these can be told from others."""
    if unknown := [language for language in wanted if not is_known(language)]:
        raise InputError(
            f"Languages {', '.join(unknown)} are not known; the languages are "
            f"{', '.join(sorted(_known()))}."
        )


def load(wanted: Sequence[str]) -> None:
    """Reads what is known of the languages, which takes seconds and would else be done later."""
    _detector(frozenset(wanted)).compute_language_confidence_values("A sentence of any language.")


def other_language(
    text: str, language: str, wanted: Sequence[str], *, is_list: bool = False
) -> str | None:
    """Returns the language or script that a text, or a part of it, is surely in, if another one.

    Args:
        text: without what it quotes.
        language: that it should be in.
        wanted: all languages of the run, among which a model may confuse them.
        is_list: the text has words and no sentences: names of dishes make no other language of it,
            but one of those that are wanted.
    """
    language = _ALIASES.get(language, language)
    if found := _other_script(text, language, is_list):
        return found
    if is_list and language == "ja":
        return None  # written with ideographs alone, as good as Chinese
    for piece in {text, *(() if is_list else _SENTENCE_END.split(text))}:
        letters = sum(map(str.isalpha, piece))
        # Ideographs and the like: a few are as good as twenty Latin letters.
        dense = sum(ord(letter) >= 0x0E00 for letter in piece if letter.isalpha())
        if letters + 4 * dense < _MIN_LETTERS:
            continue
        found = {
            value.language.iso_code_639_1.name.lower(): value.value
            for value in _detector(frozenset(wanted)).compute_language_confidence_values(piece)
        }
        likeliest = max(found, key=found.__getitem__)
        alike = any({language, likeliest} <= group for group in _ALIKE)
        sure = found[likeliest] >= _LIKELY and found.get(language, 0) <= _UNLIKELY
        alike |= (language, likeliest) == ("ja", "zh") and dense < _MIN_KANJI
        alike |= is_list and likeliest not in wanted
        if likeliest != language and sure and not alike:
            return likeliest
    return None


def _other_script(text: str, language: str, is_list: bool) -> str | None:
    """Returns the script of most of the text, or of a part that is more than a name."""
    ours = _SCRIPTS.get(language, ("LATIN",))
    weights: dict[str, int] = {}
    run, last = 0, ""
    for word in _WORD.findall(text):
        scripts = [_script(letter) for letter in word if letter.isalpha()]
        for script in scripts:
            weights[script] = weights.get(script, 0) + _WEIGHTS.get(script, 1)
        foreign = [script for script in scripts if script not in ours]
        if len(foreign) == len(scripts) and foreign[0] == "LATIN":
            run = run + 1 if last == "LATIN" else 1
            last = "LATIN"
            if run >= _FOREIGN_WORDS and word.islower():
                return "Latin"
            continue
        run, last = 0, ""
        if len([script for script in foreign if script != "LATIN"]) >= 2:  # AB型 is no fault
            return _name_of_script(foreign[0])
    if (
        language == "ja"
        and not is_list
        and (ideographs := weights.get("CJK", 0) // _WEIGHTS["CJK"]) > 20
    ):
        kana = sum(weights.get(script, 0) for script in _SCRIPTS["ja"][1:]) // 2
        if 8 * kana < ideographs:
            return "zh"
    mine, every = sum(weights.get(script, 0) for script in ours), sum(weights.values())
    if every >= _MIN_WEIGHT and 2 * mine < every:
        return _name_of_script(max(weights, key=weights.__getitem__))
    return None


def _name_of_script(script: str) -> str:
    return "Chinese characters" if script == "CJK" else script.capitalize()


@functools.lru_cache(2**14)
def _script(letter: str) -> str:
    return unicodedata.name(letter, "?").split()[0]


@functools.cache
def _known() -> dict[str, Any]:
    every = _lingua().Language.all()
    known = {language.iso_code_639_1.name.lower(): language for language in every}
    return known | {alias: known[code] for alias, code in _ALIASES.items()}


@functools.lru_cache(4)
def _detector(wanted: frozenset[str]) -> Any:
    lingua = _lingua()
    codes = {*_COMMON, *(_ALIASES.get(language, language) for language in wanted)}
    candidates = [_known()[code] for code in sorted(codes)]
    return lingua.LanguageDetectorBuilder.from_languages(*candidates).build()


def _lingua() -> Any:
    try:
        import lingua
    except ImportError as error:
        raise InputError(
            f"Languages are told apart by the package 'lingua-language-detector' ({error}). "
            "Install it: pip install 'lumina-jax[servers]'"
        ) from error
    return lingua
