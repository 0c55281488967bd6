"""Captions and scores, from what is given beside a picture: a JSON object, a row, a text file.

Metadata is a mapping. Unless a source is told which, these of its keys hold captions:

    prompt, caption, text, captions, super_high_quality_caption
    long, medium, short, tags, and the same with a language: long_zh, tags_en, ...

A value is a text, a list of texts, or a list of {"text", "kind", "language"} of which the last two
may be missing. A list of tags is one caption. All numbers are scores.
"""

import dataclasses
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lumina_jax.data.captions import KINDS, Caption
from lumina_jax.data.images import Rejected
from lumina_jax.data.sources.base import Item
from lumina_jax.data.sources.reading import parse_object, safe_id, short, without_secrets
from lumina_jax.errors import InputError

CAPTION_KEYS = ("prompt", "caption", "text", "captions", "super_high_quality_caption")
# Also of formats that are not read: the decoder looks at the content and says what it is.
PICTURE_SUFFIXES = (
    *("avif", "bmp", "gif", "heic", "heif", "jfif", "jp2", "jpe", "jpeg", "jpg", "jxl", "png"),
    *("psd", "tga", "tif", "tiff", "webp"),
)
TEXT_SUFFIXES = ("txt", "caption")
_LANGUAGE = re.compile("[a-z]{2}")


@dataclasses.dataclass(frozen=True)
class CaptionedSource:
    """What all sources with captions beside their pictures have in common.

    Args:
        path: where it is, a local path or any URL that fsspec knows.
        captions: the keys that hold captions, instead of the known ones: "key", "key:kind" or
            "key:kind:language".
        kind: of the captions that do not say it.
        language: of the captions that do not say it.
        license: of the pictures, for the manifest.
        attribution: what has to be said with them, for the manifest.
        needs_captions: whether a picture without one is a fault. Without, it is an item that has
            none: that is how pictures are read to be captioned.
    """

    path: str
    captions: tuple[str, ...] = ()
    kind: str = "long"
    language: str = "en"
    license: str = ""
    attribution: str = ""
    needs_captions: bool = dataclasses.field(default=True, kw_only=True)

    def __post_init__(self):
        if not self.path:
            raise InputError("The source has no path; give the file or folder to read.")
        faults = list(_faults(self.kind, self.language))
        keys = [given.partition(":")[0] for given in self.captions]
        faults += [f"{key!r} is given twice" for key in dict.fromkeys(keys) if keys.count(key) > 1]
        for given in self.captions:
            key, kind, language, *rest = self._parse(given)
            faults += [f"{given!r}: {fault}" for fault in _faults(kind, language)]
            if not key or any(rest):
                faults.append(f"{given!r} is not key, key:kind or key:kind:language")
        if faults:
            raise InputError(
                f"captions={','.join(self.captions)} kind={self.kind} language={self.language}: "
                f"{'; '.join(faults)}."
            )

    def settings(self) -> dict[str, Any]:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("license", "attribution", "needs_captions"):
            del fields[name]  # they change no picture that is taken
        fields = {k: without_secrets(v) if isinstance(v, str) else v for k, v in fields.items()}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    def caption_keys(self, keys: Iterable[str]) -> dict[str, tuple[str, str]]:
        """Returns those of the keys that hold captions, with the kind and language of each."""
        if self.captions:
            known = {key: pair for key, *pair in map(self._parse, self.captions)}
        else:
            known = None
        found = {}
        for key in keys:
            pair = self._known_key(key) if known is None else known.get(key)
            if pair is not None:
                found[key] = (pair[0], pair[1])
        return found

    def captions_of(
        self, metadata: Mapping[str, Any], beside: Sequence[Caption] = ()
    ) -> tuple[Caption, ...]:
        """Returns the captions in metadata after those that are known already, each once.

        Raises Rejected when one is wrong, or when there is none and the source needs them.
        """
        found = list(beside)
        for key, (kind, language) in self.caption_keys(metadata).items():
            value = metadata[key]
            # A key that was not asked for may mean another thing: a longitude is called long.
            if self.captions or not isinstance(value, int | float):
                try:
                    found.extend(_captions(value, kind, language, key))
                except RecursionError:
                    raise Rejected("bad caption", f"{key}: lists in lists in lists") from None
        if not found and self.needs_captions:
            raise Rejected("no caption", f"keys given: {', '.join(metadata) or 'none'}"[:200])
        return tuple(dict.fromkeys(found))

    def text_file(self, suffix: str) -> tuple[str, str] | None:
        """Returns the kind and language of a text file, by what follows the picture's name.

        That is `txt`, `tags.txt`, `zh.txt` or `tags.zh.txt`. None for any other file.
        """
        *pieces, last = suffix.split(".")
        if last not in TEXT_SUFFIXES:
            return None
        if len(pieces) == 1 and pieces[0] not in KINDS:
            pieces = [self.kind, *pieces]
        pieces += (self.kind, self.language)[len(pieces) :]
        if len(pieces) != 2 or any(_faults(*pieces)):
            return None
        return pieces[0], pieces[1]

    def read_beside(
        self, files: Iterable[tuple[str, bytes]], split_lines: bool
    ) -> tuple[tuple[Caption, ...], dict[str, Any]]:
        """Returns the captions and the metadata in the files beside a picture.

        Args:
            files: what follows the picture's name (`txt`, `json`, ...) and the content of each.
            split_lines: each line of a text file is a caption; else the whole of it is one.
        """
        texts: list[Caption] = []
        metadata: dict[str, Any] = {}
        for suffix, content in files:
            if suffix == "json":
                metadata = parse_object(content)
            elif pair := self.text_file(suffix):
                try:
                    text = content.decode("utf-8-sig")  # some editors put a mark before the text
                except UnicodeDecodeError as error:
                    raise Rejected("bad caption", f".{suffix} is not UTF-8: {error}") from error
                for caption in text.splitlines() if split_lines else [text]:
                    texts.extend(_captions(caption, *pair, suffix))
        return self.captions_of(metadata, texts), metadata

    def _parse(self, given: str) -> list[str]:
        key, kind, language, *rest = [*given.split(":"), "", ""]
        return [key, kind or self.kind, language or self.language, *rest]

    def _known_key(self, key: str) -> tuple[str, str] | None:
        if key in CAPTION_KEYS:
            return self.kind, self.language
        kind, separator, language = key.partition("_")
        pair = kind, language if separator else self.language
        return None if any(_faults(*pair)) else pair


def make_item(
    name: str, image: bytes, captions: tuple[Caption, ...], metadata: Mapping[str, Any]
) -> Item:
    return Item(safe_id(name), image, captions, scores_of(metadata))


def faulty(name: str, fault: Rejected) -> Item:
    return Item(safe_id(name), None, fault=Rejected(fault.reason, without_secrets(fault.detail)))


def scores_of(metadata: Mapping[str, Any]) -> dict[str, float]:
    """Returns the finite numbers in metadata; true and false are none."""
    return {
        key: float(value)
        for key, value in metadata.items()
        if isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max  # JSON's whole numbers have no limit
    }


def is_picture(name: str) -> bool:
    return name.rpartition(".")[2].lower() in PICTURE_SUFFIXES


def _captions(value: Any, kind: str, language: str, key: str) -> Iterator[Caption]:
    """Yields the captions that a value holds; an empty text is none."""
    if value is None:
        return
    if isinstance(value, list):
        if kind == "tags" and all(isinstance(tag, str) for tag in value):
            value = [", ".join(filter(None, map(str.strip, value)))]
        for one in value:
            yield from _captions(one, kind, language, key)
    elif isinstance(value, dict) and "text" in value:
        kind, language = value.get("kind") or kind, value.get("language") or language
        if faults := list(_faults(kind, language)):
            raise Rejected("bad caption", f"{key}: {'; '.join(faults)}")
        yield from _captions(value["text"], kind, language, key)
    elif not isinstance(value, str):
        raise Rejected("bad caption", f"{key}: needed text, got {short(value)}")
    elif text := value.strip():
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half a character, which JSON can spell
            raise Rejected("bad caption", f"{key}: {error}") from error
        yield Caption(text, kind, language)


def _faults(kind: Any, language: Any) -> Iterator[str]:
    if kind not in KINDS:
        yield f"kind {kind!r} is none of {', '.join(KINDS)}"
    if not isinstance(language, str) or not _LANGUAGE.fullmatch(language):
        yield f"language {language!r} is not two small letters, such as en"
