"""Captions of a picture, and the policy that chooses the one to train on.

A picture has captions of several kinds (long, medium, short, tags) and languages. Each time it is
seen, the policy draws a kind by weight among the kinds the picture has, then one of its captions of
that kind, and puts the system prompt before it. With the dropout probability the text is ""
instead, without a system prompt: that is what the unconditional branch of classifier-free guidance
learns from.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from lumina_jax.errors import InputError
from lumina_jax.system_prompts import prefixed

KINDS = ("long", "medium", "short", "tags")


@dataclasses.dataclass(frozen=True)
class Caption:
    text: str
    kind: str
    language: str  # the two-letter code: en, zh, ...


@dataclasses.dataclass(frozen=True)
class CaptionPolicy:
    """How to choose among the captions of a picture.

    Args:
        kinds: weight of each kind; a kind that is not named is never chosen.
        languages: the languages allowed; () allows all.
        dropout: probability of the empty text.
        system_prompt: name of the text before every caption; see lumina_jax/system_prompts.py.
    """

    kinds: Mapping[str, float] = dataclasses.field(
        default_factory=lambda: dict.fromkeys(KINDS, 1.0)
    )
    languages: Sequence[str] = ()
    dropout: float = 0.1
    system_prompt: str = "empty"

    def __post_init__(self):
        if unknown := sorted(set(self.kinds) - set(KINDS)):
            raise InputError(
                f"Unknown caption kinds {', '.join(unknown)}; the kinds are {', '.join(KINDS)}."
            )
        weights = self.kinds.values()
        if not all(math.isfinite(w) and w >= 0 for w in weights) or not sum(weights) > 0:
            raise InputError(
                f"Caption kind weights {dict(self.kinds)} must be zero or more, and one must be "
                "above zero."
            )
        if isinstance(self.languages, str):
            raise InputError(
                f"Caption languages {self.languages!r} is one string; give a tuple of codes, such "
                "as ('en', 'zh')."
            )
        if not 0 <= self.dropout <= 1:
            raise InputError(f"Caption dropout {self.dropout} is not a probability; give 0 to 1.")
        prefixed("", self.system_prompt)  # refuses a name that does not exist

    def allows(self, kind: str, language: str) -> bool:
        return self.kinds.get(kind, 0) > 0 and (not self.languages or language in self.languages)

    def choose(self, captions: Sequence[Caption], rng: np.random.Generator) -> int | None:
        """Returns the index of the caption to train on this time, None for the empty text.

        The same generator state makes the same choice.
        """
        allowed = [i for i, c in enumerate(captions) if self.allows(c.kind, c.language)]
        if not allowed:
            has = describe_pairs((c.kind, c.language) for c in captions)
            raise InputError(f"A picture has {has}; {self} allows none of them.")
        if rng.random() < self.dropout:
            return None
        kinds = [kind for kind in KINDS if any(captions[i].kind == kind for i in allowed)]
        weights = np.array([self.kinds[kind] for kind in kinds], np.float64)
        kind = kinds[rng.choice(len(kinds), p=weights / weights.sum())]
        of_kind = [i for i in allowed if captions[i].kind == kind]
        return of_kind[rng.integers(len(of_kind))]

    def text(self, captions: Sequence[Caption], chosen: int | None) -> str:
        """Returns what the text encoder reads when `choose` has chosen."""
        return "" if chosen is None else prefixed(captions[chosen].text, self.system_prompt)

    def __str__(self) -> str:
        kinds = ", ".join(kind for kind, weight in self.kinds.items() if weight > 0)
        return (
            f"the caption policy (kinds: {kinds}; languages: {', '.join(self.languages) or 'all'})"
        )


def describe_pairs(pairs: Iterable[tuple[str, str]]) -> str:
    """Returns the kinds and languages of captions for a message: "short captions in de, en"."""
    languages: dict[str, list[str]] = {}
    for kind, language in sorted(set(pairs)):
        languages.setdefault(kind, []).append(language)
    return (
        " and ".join(f"{kind} captions in {', '.join(found)}" for kind, found in languages.items())
        or "no caption"
    )
