"""How many tokens a caption has for the text encoder of training, which reads only so many."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from lumina_jax.errors import InputError
from lumina_jax.frozen.text_encoder import TextEncoder, make_text_encoder
from lumina_jax.system_prompts import prefixed

_LONGEST = 4096  # tokens; a longer caption counts as one of this length


@dataclasses.dataclass(frozen=True)
class TokenCounter:
    """Counts the tokens of captions behind a system prompt; it can be sent to workers.

    Args:
        encoder: the settings of `make_text_encoder`, as pairs.
        system_prompt: name of the text before every caption.
    """

    encoder: tuple[tuple[str, Any], ...]
    system_prompt: str

    @classmethod
    def of(cls, encoder: Mapping[str, Any], system_prompt: str) -> "TokenCounter":
        return cls(tuple(sorted(encoder.items())), system_prompt)

    @classmethod
    def small(cls) -> tuple["TokenCounter | None", str]:
        """Returns the counter of the small text encoder, or why there is none: it is an extra."""
        counter = cls.of({"kind": "use", "max_tokens": 256}, "empty")
        try:
            counter([""])
        except InputError as error:
            return None, f"Tokens are not counted. {error}"
        return counter, ""

    @property
    def max_tokens(self) -> int:
        return _open(self.encoder).max_tokens

    def __call__(self, texts: Sequence[str]) -> Int[np.ndarray, " n"]:
        behind = [prefixed(text, self.system_prompt) for text in texts]
        return _open(self.encoder).tokenize(behind, _LONGEST)[1].sum(axis=1)


@functools.lru_cache(1)
def _open(encoder: tuple[tuple[str, Any], ...]) -> TextEncoder:
    return make_text_encoder(**dict(encoder))
