"""The few shapes that travel between rooms.

Axes: B batch, S caption slots, N image slots, P numbers in a patch (p * p * C), F text features.
"""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int


class ImageTokens(NamedTuple):
    """Pictures of any shape as padded token sequences, so that all of them share one program.

    A token is a patch of p x p latents; `rows` and `columns` say where it was, in patches.
    Padding has mask False and must not change any result.
    """

    tokens: Float[Array, "B N P"]
    rows: Int[Array, "B N"]
    columns: Int[Array, "B N"]
    mask: Bool[Array, "B N"]


class Batch(NamedTuple):
    """What one training step takes: the outputs of the frozen programs.

    `pooled` holds the same pictures averaged over 4 x 4 latents, for the auxiliary loss of the
    high-resolution stage; it is None in a run without that loss.
    """

    image: ImageTokens
    pooled: ImageTokens | None
    cap_feats: Float[Array, "B S F"]
    cap_mask: Bool[Array, "B S"]
