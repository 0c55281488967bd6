"""Token merging: image tokens that say the same go through some layers as one.

The picture is cut into cells of 2 x 2 tokens. The first of each cell stays; of the other three
quarters those that resemble a staying token most are averaged into it (bipartite soft matching,
Bolya and Hoffman, arXiv 2303.17604). After the layers every token gets what its group has become
and what it had of its own:

    x_i  <-  x_i + (y_group - mean of x over the group)

so that a merged token keeps its detail. How many are merged is known before tracing: shapes are
static, and each picture of a batch chooses its own tokens.

Axes: B batch, T tokens, S caption slots in front, N image tokens, D model width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree


class Groups(NamedTuple):
    """Which tokens go on, and for whom.

    Attributes:
      kept: Places of the tokens that go on, those of the caption first.
      group: For each token, at which place of `kept` is the one that it goes with.
      size: Of each group, one where nothing was merged.
    """

    kept: Int[Array, "B K"]
    group: Int[Array, "B T"]
    size: Int[Array, "B K"]


def num_merged(height: int, width: int, ratio: float) -> int:
    """How many of height x width image tokens are merged into others; three quarters at most."""
    stay = -(-height // 2) * -(-width // 2)
    return min(round(ratio * height * width), height * width - stay)


def find_groups(x: Float[Array, "B T D"], *, height: int, width: int, ratio: float) -> Groups:
    """Matches image tokens, the last height * width of a sequence, by the cosine of their angle."""
    num_tokens = x.shape[1]
    slots = num_tokens - height * width
    rows, columns = np.indices((height, width)).reshape(2, -1)
    stays = (rows % 2 == 0) & (columns % 2 == 0)
    staying, leaving = (slots + np.flatnonzero(which) for which in (stays, ~stays))

    x = x / jnp.linalg.norm(x.astype(jnp.float32), axis=-1, keepdims=True).clip(1e-6).astype(
        x.dtype
    )
    scores = jnp.einsum(
        "bld,bsd->bls", x[:, leaving], x[:, staying], preferred_element_type=jnp.float32
    )
    best, partner = jnp.max(scores, axis=-1), jnp.argmax(scores, axis=-1)
    order = jnp.argsort(-best, axis=-1)
    merged = num_merged(height, width, ratio)

    # Those that go on: caption and staying tokens at fixed places, then the least alike others.
    batch = len(x)
    fixed = np.concatenate([np.arange(slots), staying])
    rest = jnp.asarray(leaving)[order[:, merged:]]
    kept = jnp.concatenate([jnp.broadcast_to(fixed, (batch, len(fixed))), rest], axis=1)

    picture = jnp.arange(batch)[:, None]
    group = jnp.zeros((batch, num_tokens), jnp.int32)
    group = group.at[picture, kept].set(jnp.arange(kept.shape[1])[None])
    gone = order[:, :merged]
    joins = slots + jnp.take_along_axis(partner, gone, axis=1)
    group = group.at[picture, jnp.asarray(leaving)[gone]].set(joins)
    size = jnp.zeros(kept.shape, jnp.int32).at[picture, group].add(1)
    return Groups(kept.astype(jnp.int32), group, size)


def take(groups: Groups, tree: PyTree) -> PyTree:
    """The arrays [B, T, ...] of a tree at the tokens that go on."""

    def one(x):
        index = groups.kept.reshape(groups.kept.shape + (1,) * (x.ndim - 2))
        return jnp.take_along_axis(x, index, axis=1)

    return jax.tree.map(one, tree)


def merge(groups: Groups, x: Float[Array, "B T D"]) -> Float[Array, "B K D"]:
    """The mean over each group."""
    picture = jnp.arange(len(x))[:, None]
    total = jnp.zeros((*groups.kept.shape, x.shape[-1]), jnp.float32)
    total = total.at[picture, groups.group].add(x.astype(jnp.float32))
    return (total / groups.size[..., None]).astype(x.dtype)


def restore(
    groups: Groups,
    x: Float[Array, "B T D"],
    merged: Float[Array, "B K D"],
    after: Float[Array, "B K D"],
) -> Float[Array, "B T D"]:
    """All tokens again: each with what the layers added to its group."""
    return x + jnp.take_along_axis(after - merged, groups.group[..., None], axis=1)
