"""Captions of a picture, and the policy that chooses the one to train on.

A picture has captions of several kinds (long, medium, short, tags) and languages. Each time it is
seen, the policy draws a kind by weight among the kinds the picture has, a language by weight among
those of that kind, then one of these captions, and puts the system prompt before it. With the
dropout probability the text is "" instead: that is what the unconditional branch of classifier-free
guidance learns from.

It runs for every picture of training, under Python's lock: no numpy here, whose calls on five
numbers would cost more than all the rest.
"""

import dataclasses
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, NamedTuple

from lumina_jax.errors import InputError
from lumina_jax.system_prompts import prefixed
from lumina_jax.untrusted import is_finite

KINDS = ("long", "medium", "short", "tags")
_TAG = re.compile(r"[^\s,，、](?:[^,，、]*[^\s,，、])?")


class Caption(NamedTuple):
    text: str
    kind: str
    language: str  # the two-letter code: en, zh, ...


@dataclasses.dataclass(frozen=True)
class CaptionPolicy:
    """How to choose among the captions of a picture.

    Args:
        kinds: weight of each kind; a kind that is not named is never chosen.
        languages: weight of each language; one that is not named is never chosen. Empty: all are
            allowed, and each caption of the kind is as likely as the others.
        dropout: probability that there is no caption.
        dropout_keeps_system_prompt: without a caption the text is the system prompt alone, not "".
        system_prompt: name of the text before every caption; see lumina_jax/system_prompts.py.
        shuffle_tags: the tags of a caption of that kind come in a new order each time.
    """

    NUM_DRAWS: ClassVar[int] = 5  # uniforms that one choice consumes

    kinds: Mapping[str, float] = dataclasses.field(
        default_factory=lambda: dict.fromkeys(KINDS, 1.0)
    )
    # A sequence is what was given before there were weights; it is refused with what to write now.
    languages: Mapping[str, float] | Sequence[str] = dataclasses.field(default_factory=dict)
    dropout: float = 0.1
    dropout_keeps_system_prompt: bool = False
    system_prompt: str = "empty"
    shuffle_tags: bool = False

    def __post_init__(self):
        if unknown := sorted(set(self.kinds) - set(KINDS)):
            raise InputError(
                f"Unknown caption kinds {', '.join(unknown)}; the kinds are {', '.join(KINDS)}."
            )
        if not isinstance(self.languages, Mapping):
            raise InputError(
                f"Caption languages {self.languages!r} have no weights; give one to each, such as "
                "{'en': 1.0, 'zh': 1.0}, or {} for all."
            )
        for name, weights in (("kind", self.kinds), ("language", self.languages)):
            values = weights.values()
            sound = all(is_finite(weight) and weight >= 0 for weight in values)
            if not sound or (not any(values) and (weights or name == "kind")):
                raise InputError(
                    f"Caption {name} weights {dict(weights)} must be zero or more, and one must be "
                    "above zero."
                )
        if not 0 <= self.dropout <= 1:
            raise InputError(f"Caption dropout {self.dropout} is not a probability; give 0 to 1.")
        prefixed("", self.system_prompt)  # refuses a name that does not exist

    def allows(self, kind: str, language: str) -> bool:
        return self.kinds.get(kind, 0) > 0 and (
            not self.languages or self.languages.get(language, 0) > 0
        )

    def among(self, pairs: Iterable[tuple[str, str]]) -> "CaptionPolicy":
        """Returns the policy for data with captions of these kinds and languages and no others.

        It chooses the same captions; `draw_kind` draws no kind that nothing has.
        """
        pairs = list(pairs)
        found = {kind for kind, language in pairs if self.allows(kind, language)}
        if not found:
            raise InputError(f"The data has {describe_pairs(pairs)}; {self} allows none of them.")
        kinds = {kind: weight for kind, weight in self.kinds.items() if kind in found}
        return dataclasses.replace(self, kinds=kinds)

    def draw_kind(self, draw: float) -> str:
        """Returns a kind by weight, for all pictures of a batch; `draw` is a uniform in [0, 1)."""
        return _pick({kind: self.kinds[kind] for kind in KINDS if self.kinds.get(kind)}, draw)

    def choose(
        self, captions: Sequence[Caption], draws: Sequence[float], kind: str | None = None
    ) -> int | None:
        """Returns the index of the caption to train on this time, None when it is dropped.

        Args:
            captions: of one picture.
            draws: its `NUM_DRAWS` uniforms in [0, 1); equal ones make the same choice.
            kind: what `draw_kind` gave to the whole batch; a picture that lacks it draws its own.
        """
        dropout_draw, kind_draw, language_draw, caption_draw, _ = draws
        of_kind: dict[str, list[int]] = {}
        for index, caption in enumerate(captions):
            if self.allows(caption.kind, caption.language):
                of_kind.setdefault(caption.kind, []).append(index)
        if not of_kind:
            has = describe_pairs((c.kind, c.language) for c in captions)
            raise InputError(f"A picture has {has}; {self} allows none of them.")
        if dropout_draw < self.dropout:
            return None
        if kind not in of_kind:
            kind = _pick({kind: self.kinds[kind] for kind in of_kind}, kind_draw)
        allowed = of_kind[kind]
        if self.languages:
            languages = [captions[index].language for index in allowed]
            weights = {language: self.languages[language] for language in languages}
            language = _pick(weights, language_draw)
            allowed = [index for index in allowed if captions[index].language == language]
        return allowed[int(caption_draw * len(allowed))]

    def text(self, captions: Sequence[Caption], chosen: int | None, draws: Sequence[float]) -> str:
        """Returns what the text encoder reads when `choose` has chosen with the same draws."""
        if chosen is None:
            return prefixed("", self.system_prompt) if self.dropout_keeps_system_prompt else ""
        caption = captions[chosen]
        text = caption.text
        if self.shuffle_tags and caption.kind == "tags":
            text = _shuffle_tags(text, draws[-1])
        return prefixed(text, self.system_prompt)

    def __str__(self) -> str:
        kinds, languages = (
            ", ".join(name for name, weight in weights.items() if weight > 0)
            for weights in (self.kinds, self.languages)
        )
        return f"the caption policy (kinds: {kinds}; languages: {languages or 'all'})"


def _pick(weights: Mapping[str, float], draw: float) -> str:
    """One of the names, by weight; the weights are positive."""
    rest = draw * sum(weights.values())
    for name, weight in weights.items():  # noqa: B007, the last one takes what rounding leaves
        rest -= weight
        if rest < 0:
            break
    return name


def _shuffle_tags(text: str, draw: float) -> str:
    """The tags in another order; what stands between them, of any style, stays where it is."""
    tags = _TAG.findall(text)
    random.Random(int(draw * 2**53)).shuffle(tags)
    return _TAG.sub(lambda _: tags.pop(), text)


def describe_pairs(pairs: Iterable[tuple[str, str]]) -> str:
    """Returns the kinds and languages of captions for a message: "short captions in de, en"."""
    languages: dict[str, list[str]] = {}
    for kind, language in sorted(set(pairs)):
        languages.setdefault(kind, []).append(language)
    return (
        " and ".join(f"{kind} captions in {', '.join(found)}" for kind, found in languages.items())
        or "no caption"
    )
