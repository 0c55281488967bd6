"""What captioning models are asked: files that a person can read and edit.

A folder is a version of them, with a file for each language and `other.toml` for those without one.
`prompt_files/1` is the built-in version; its `en.toml` says what the parts of a file are.
"""

import dataclasses
import functools
import hashlib
import pathlib
import re
import tomllib
from collections.abc import Mapping
from typing import Any

from etils import epath

from lumina_jax.data.captions import KINDS
from lumina_jax.errors import InputError, listed
from lumina_jax.unicap import languages

BUILT_IN = pathlib.Path(__file__).parent / "prompt_files" / "1"
OTHER = "other"
DERIVED = KINDS[1:]  # what can be made of a long caption
_PARTS = {
    "look": KINDS,
    "condense": DERIVED,
    "translate": ("text", "tags"),
    "length": KINDS,
    "answers": ("refusals", "chatter_begins", "chatter_ends"),
}
_FIELD = re.compile(r"\{(\w+)\}")
_FIELDS = {"look": set(), "condense": {"caption"}, "translate": {"caption", "from"}}


@dataclasses.dataclass(frozen=True)
class LanguagePrompts:
    """The content of a file, with the name of the language filled in.

    Attributes:
        look: by kind, asked with the picture.
        condense: by kind, asked about a long caption.
        translate: "text" and "tags", asked about a caption of another language.
        length: by kind, the least and the most characters; of tags, how many.
    """

    look: Mapping[str, str]
    condense: Mapping[str, str]
    translate: Mapping[str, str]
    length: Mapping[str, tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Prompts:
    """A version of the prompts.

    Attributes:
        version: the name of the folder and a checksum of its files.
        files: the content of each, by language.
    """

    version: str
    files: Mapping[str, Mapping[str, Any]]

    def of(self, language: str) -> LanguagePrompts:
        """Returns the prompts of a language, of `other` where it has none of its own."""
        return _fill(self, language)

    def look(self, kind: str, language: str) -> str:
        return self.of(language).look[kind]

    def condense(self, kind: str, language: str, caption: str) -> str:
        return self.of(language).condense[kind].replace("{caption}", caption)

    def translate(self, kind: str, language: str, caption: str, source: str) -> str:
        """Returns what asks for a caption of the language `source` in `language`."""
        prompt = self.of(language).translate["tags" if kind == "tags" else "text"]
        prompt = prompt.replace("{from}", languages.name(source))
        return prompt.replace("{caption}", caption)  # last: braces in a caption are no fields

    def answers(self, name: str) -> re.Pattern | None:
        """Returns what finds answers that are no captions, in small letters.

        A model may refuse in any language, whatever it is asked for.

        Args:
            name: "refusals", "chatter_begins" or "chatter_ends".
        """
        every = [text for content in self.files.values() for text in content["answers"][name]]
        joined = "|".join(f"(?:{text})" for text in dict.fromkeys(every))
        return re.compile(joined) if joined else None

    # A dataclass of mappings is not hashable, and its version stands for it.
    def __hash__(self) -> int:
        return hash(self.version)


def load_prompts(folder: epath.PathLike | None = None) -> Prompts:
    """Reads a version of the prompts, and checks all of it.

    Args:
        folder: where its files are; by default the built-in version.
    """
    folder = epath.Path(folder or BUILT_IN)
    if not folder.is_dir():
        raise InputError(
            f"Prompts {folder} are not there: a folder with a file for each language, such as "
            f"en.toml, and {OTHER}.toml. Copy {BUILT_IN} and change it."
        )
    found = {path.stem: path for path in sorted(folder.glob("*.toml"))}
    faults = [] if OTHER in found else [f"there is no {OTHER}.toml"]
    digest, contents = hashlib.sha256(), {}
    for language, path in found.items():
        content = path.read_bytes()
        digest.update(f"{language} {len(content)} ".encode() + content)
        if language != OTHER and not languages.is_known(language):
            faults.append(f"{path.name} is of no language that is known: name it as ISO 639-1 does")
        try:
            contents[language] = tomllib.loads(content.decode())
        except ValueError as error:  # also of text that is no UTF-8
            faults.append(f"{path.name}: {error}")
        else:
            faults += [f"{path.name}: {fault}" for fault in _faults(contents[language])]
    if faults:
        raise InputError(
            f"Prompts {folder} cannot be used: {listed(faults, 8)}. {BUILT_IN / 'en.toml'} is an "
            "example."
        )
    return Prompts(f"{folder.name}-{digest.hexdigest()[:8]}", contents)


def _faults(content: Mapping[str, Any]) -> list[str]:
    faults = [f"[{part}] is unknown" for part in content.keys() - _PARTS.keys()]
    for part, names in _PARTS.items():
        given = content.get(part)
        if not isinstance(given, dict):
            faults.append(f"[{part}] is missing")
            continue
        faults += [f"{part}.{name} is missing" for name in names if name not in given]
        faults += [f"{part}.{name} is unknown" for name in given.keys() - set(names)]
        for name in given.keys() & set(names):
            if fault := _value_fault(part, given[name]):
                faults.append(f"{part}.{name} {fault}")
    return faults


def _value_fault(part: str, value: Any) -> str | None:
    if part == "length":
        whole = isinstance(value, list) and len(value) == 2 and all(type(n) is int for n in value)
        return None if whole and 0 < value[0] <= value[1] else "is not [least, most]"
    if part == "answers":
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            return "is no list of texts"
        for text in value:
            try:
                if re.compile(f"(?:{text})").search(""):
                    return f"has {text!r}, which finds something in every answer"
            except re.error as error:
                return f"has {text!r}, which is no regular expression: {error}"
        return None
    if not isinstance(value, str) or not value.strip():
        return "is no text"
    fields = set(_FIELD.findall(value))
    if missing := _FIELDS[part] - fields - {"from"}:
        return f"does not say {{{missing.pop()}}}"
    if unknown := fields - _FIELDS[part] - {"language"}:
        return f"has {{{unknown.pop()}}}, which nothing stands for there"
    return None


@functools.lru_cache(128)
def _fill(prompts: Prompts, language: str) -> LanguagePrompts:
    content = prompts.files.get(language) or prompts.files[OTHER]
    name = languages.name(language)

    def fill(part: str) -> dict[str, str]:
        return {
            kind: text.strip().replace("{language}", name) for kind, text in content[part].items()
        }

    return LanguagePrompts(
        look=fill("look"),
        condense=fill("condense"),
        translate=fill("translate"),
        length={kind: tuple(bounds) for kind, bounds in content["length"].items()},
    )
