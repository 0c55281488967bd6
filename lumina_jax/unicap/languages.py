"""Languages: their names, and which one a text is in (lingua, which needs no download)."""

import functools
import re
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
_SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s*")
_ALIASES = {"no": "nb"}


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


def other_language(text: str, language: str, wanted: Sequence[str]) -> str | None:
    """Returns the language that a text, or a sentence of it, is surely in, if not this one.

    Args:
        text: of prose, without what it quotes.
        language: that it should be in.
        wanted: all languages of the run, among which a model may confuse them.
    """
    language = _ALIASES.get(language, language)
    for piece in (text, *_SENTENCE_END.split(text)):
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
        if likeliest != language and sure and not alike:
            return likeliest
    return None


@functools.cache
def _known() -> dict[str, Any]:
    known = {
        language.iso_code_639_1.name.lower(): language for language in _lingua().Language.all()
    }
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
            "Install it: pip install 'lumina-jax[caption]'"
        ) from error
    return lingua
