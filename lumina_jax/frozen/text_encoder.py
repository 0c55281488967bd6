"""What every frozen text encoder looks like, and the table of those there are.

The encoder turns captions into `cap_feats` in two halves, because they run in different places:

    tokenize   strings -> ids, on the host, in the threads of the loader
    encode     ids -> features, on the accelerator, in a jitted program of its own

The weights are an argument of `encode`. Closed over instead, they would be copied into the compiled
program as constants and could be neither sharded nor shared:

    encode = jax.jit(encoder.encode)
    params = encoder.load_params(mesh)
    cap_feats = encode(params, *encoder.tokenize(captions))

Axes: n captions, B batch, S = max_tokens caption slots, F = feature_dim.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, PyTree

from lumina_jax.errors import InputError
from lumina_jax.frozen.gemma2 import Gemma2TextEncoder
from lumina_jax.frozen.use import UniversalSentenceEncoder


@runtime_checkable
class TextEncoder(Protocol):
    """A frozen encoder of captions.

    Attributes:
      feature_dim: F, the width of the features, which is the model's `cap_feat_dim`.
      max_tokens: The caption slots of a batch, unless it asks for fewer; longer captions are cut.
      num_truncated: captions cut so far by this object in this process.
    """

    feature_dim: int
    max_tokens: int
    num_truncated: int

    def load_params(self, mesh: jax.sharding.Mesh) -> PyTree:
        """The weights, read and placed on the mesh."""
        ...

    def placed_params(self, mesh: jax.sharding.Mesh) -> PyTree:
        """Shapes and types of the weights, and where they lie on the mesh."""
        ...

    def check_weights(self) -> None:
        """Refuses files that do not hold the weights, by names, shapes and types; reads none."""
        ...

    def fingerprint(self) -> str:
        """Changes with anything that changes the features: weights, tokens, precision."""
        ...

    def tokenize(
        self, captions: Sequence[str], num_slots: int | None = None
    ) -> tuple[Int32[np.ndarray, "n S"], Bool[np.ndarray, "n S"]]:
        """Ids and their mask, padded on the right to S slots; safe to call from many threads.

        S is `max_tokens` where `num_slots` gives no other number.

        Every caption has a valid token, the empty one too: "" is the unconditional input.
        """
        ...

    def encode(
        self, params: PyTree, token_ids: Int32[Array, "B S"], token_mask: Bool[Array, "B S"]
    ) -> Float[Array, "B S F"]:
        """The features of each slot, zero where the mask is false. Pure, made to be jitted."""
        ...


KINDS = ("gemma2", "use")


def make_text_encoder(
    kind: str, *, path: str = "", max_tokens: int, dtype: str = "bfloat16", soft_cap: bool = True
) -> TextEncoder:
    """The encoder that a config names.

    Args:
      kind: One of KINDS.
      path: Of gemma2: where its files are.
      max_tokens: See `TextEncoder`.
      dtype: Of gemma2: "bfloat16" or "float32". The other one is small, and float32 always.
      soft_cap: Of gemma2: whether attention bounds its logits.
    """
    if kind == "gemma2":
        return Gemma2TextEncoder(path, max_tokens=max_tokens, dtype=dtype, soft_cap=soft_cap)
    if kind == "use":
        if path:
            raise InputError(
                f"text_encoder.path={path!r} is given, but the text encoder 'use' comes with its "
                f"weights. Leave the path empty, or set text_encoder.kind to gemma2."
            )
        return UniversalSentenceEncoder(max_tokens=max_tokens)
    raise InputError(f"No text encoder is called {kind!r}; choose one of: {', '.join(KINDS)}.")
