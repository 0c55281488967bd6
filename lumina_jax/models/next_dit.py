"""Unified Next-DiT, the backbone of Lumina-Image 2.0 (arXiv 2503.21758, section 3.1).

Caption and image are refined apart, then joined in one sequence of fixed layout,
[caption slots | image slots], through which every later block attends freely. Attention knows
order only by position and padding only by mask, so this equals the reference's ragged packing and
lets pictures of any shape share a batch and a compiled program.

Axes: B batch, S caption slots, N image slots, T = S + N, D model width, P numbers in a patch,
F text features.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from lumina_jax import sharding
from lumina_jax.errors import InputError
from lumina_jax.models import quantized, rope
from lumina_jax.models.attention import IMPLEMENTATIONS
from lumina_jax.models.blocks import FinalLayer, TransformerBlock, modulate
from lumina_jax.models.embed import CaptionEmbedder, TimestepEmbedder
from lumina_jax.models.stack import REMAT_POLICIES, scan_blocks, stack_blocks
from lumina_jax.types import ImageTokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextDiTConfig:
    """Sizes of the network. Every field is a key of `config.model`; presets below."""

    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    hidden_dim: int
    axes_dims: Sequence[int]  # a tuple, once made
    num_refiner_layers: int = 2
    in_channels: int = 16
    patch_size: int = 2
    cap_feat_dim: int = 2304
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    dtype: str = "bfloat16"
    attention: str = "auto"
    remat: str = "names"
    quantization: str = "none"

    def __post_init__(self):
        object.__setattr__(self, "axes_dims", tuple(self.axes_dims))
        faults = []
        for name in ("num_layers", "num_refiner_layers"):
            if getattr(self, name) < 1:
                faults.append(f"{name}={getattr(self, name)} must be at least 1")
        if self.dim % self.num_heads:
            low = self.dim // self.num_heads * self.num_heads
            faults.append(
                f"dim={self.dim} is not a multiple of num_heads={self.num_heads}; the nearest "
                f"that are: {low} and {low + self.num_heads}"
            )
        elif sum(self.axes_dims) != self.head_dim:
            faults.append(
                f"axes_dims={self.axes_dims} sum to {sum(self.axes_dims)}, not to dim / num_heads "
                f"= {self.head_dim}"
            )
        if self.num_heads % self.num_kv_heads:
            faults.append(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if len(self.axes_dims) != 3 or any(dim % 2 for dim in self.axes_dims):
            faults.append(f"axes_dims={self.axes_dims} must be three even numbers")
        if self.attention not in IMPLEMENTATIONS:
            faults.append(
                f"attention={self.attention!r} is not one of {', '.join(IMPLEMENTATIONS)}"
            )
        if self.remat not in REMAT_POLICIES:
            faults.append(f"remat={self.remat!r} is not one of {', '.join(REMAT_POLICIES)}")
        if self.dtype not in ("float32", "bfloat16"):
            faults.append(f"dtype={self.dtype!r} is not one of float32, bfloat16")
        if fault := quantized.check(self.quantization):
            faults.append(fault)
        if faults:
            raise InputError("config.model: " + "; ".join(faults) + ".")

    @classmethod
    def preset(cls, name: str, **changes) -> "NextDiTConfig":
        """The sizes of a named model, with `changes` over them."""
        if name not in PRESETS:
            raise InputError(f"model.preset={name!r} is not one of {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **changes})

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def patch_dim(self) -> int:
        return self.patch_size**2 * self.in_channels

    @property
    def refiner_remat(self) -> str:
        """Of the refiners: few blocks, whose activations would come on top of all the others'."""
        return "attention" if self.remat in ("offload", "names", "dots") else self.remat

    @property
    def cond_dim(self) -> int:
        return min(self.dim, 1024)


# The official factories (their model.py); only 2b has released weights. `tiny` is ours: it learns
# a hundred pictures on a laptop.
PRESETS = {
    "tiny": dict(
        dim=128, num_layers=4, num_refiner_layers=1, num_heads=4, num_kv_heads=2, hidden_dim=384,
        axes_dims=(8, 12, 12),
    ),
    "2b": dict(
        dim=2304, num_layers=26, num_heads=24, num_kv_heads=8, hidden_dim=9216,
        axes_dims=(32, 32, 32),
    ),
    "3b": dict(
        dim=2592, num_layers=30, num_heads=24, num_kv_heads=8, hidden_dim=10496,
        axes_dims=(36, 36, 36),
    ),
    "4b": dict(
        dim=2880, num_layers=32, num_heads=24, num_kv_heads=8, hidden_dim=11520,
        axes_dims=(40, 40, 40),
    ),
    "7b": dict(
        dim=3840, num_layers=32, num_heads=32, num_kv_heads=8, hidden_dim=15360,
        axes_dims=(40, 40, 40),
    ),
}  # fmt: skip


# Parameters of these have a leading dim of layers.
STACKS = ("context_refiner", "noise_refiner", "layers")


class NextDiT(nnx.Module):
    """Predicts the velocity of noisy latents, given their time and a caption."""

    def __init__(self, cfg: NextDiTConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.x_embedder = nnx.Linear(
            cfg.patch_dim,
            cfg.dim,
            kernel_init=nnx.initializers.xavier_uniform(),
            dtype=cfg.dtype,
            rngs=rngs,
        )
        self.t_embedder = TimestepEmbedder(cfg, rngs=rngs)
        self.cap_embedder = CaptionEmbedder(cfg, rngs=rngs)

        def block(rngs):
            return TransformerBlock(cfg, rngs=rngs)

        def caption_block(rngs):
            return TransformerBlock(cfg, modulated=False, rngs=rngs)

        self.context_refiner = stack_blocks(caption_block, cfg.num_refiner_layers, rngs=rngs)
        self.noise_refiner = stack_blocks(block, cfg.num_refiner_layers, rngs=rngs)
        self.layers = stack_blocks(block, cfg.num_layers, rngs=rngs)
        self.final_layer = FinalLayer(cfg, rngs=rngs)

    def __call__(
        self,
        images: tuple[ImageTokens, ...],
        times: tuple[Float[Array, " B"], ...],
        cap_feats: Float[Array, "B S F"],
        cap_mask: Bool[Array, "B S"],
    ) -> tuple[Float[Array, "B N P"], ...]:
        """The velocity of each token of each picture, float32; at padding it means nothing.

        A caption may have several pictures, each with a time of its own: of high and of low
        resolution in training. They do not see each other, but their caption is refined once, and
        layer by layer they meet the same weights (`stack.scan_blocks`).
        """
        cfg = self.cfg
        run = functools.partial(scan_blocks, remat=cfg.remat, dtype=cfg.dtype)
        refine = functools.partial(scan_blocks, remat=cfg.refiner_remat, dtype=cfg.dtype)
        frequencies = functools.partial(
            rope.frequencies, axes_dims=cfg.axes_dims, theta=cfg.rope_theta
        )
        positions = [rope.position_ids(cap_mask, image.rows, image.columns) for image in images]
        cap_freqs = frequencies(positions[0][0])  # a caption's own positions know no picture
        image_freqs = [frequencies(ids) for _, ids in positions]
        cap_segments = cap_mask.astype(jnp.int32)
        image_segments = [image.mask.astype(jnp.int32) for image in images]

        conds = [self.t_embedder(t) for t in times]
        x = self.cap_embedder(cap_feats)
        (caption,) = refine(self.context_refiner, (x,), ((cap_segments, cap_freqs),))
        xs = tuple(self.x_embedder(image.tokens) for image in images)
        xs = refine(
            self.noise_refiner,
            xs,
            tuple(zip(image_segments, image_freqs, strict=True)),
            tuple(modulate(self.noise_refiner.modulation, cond) for cond in conds),
        )

        def join(image, caption):
            return jnp.concatenate([caption, image], axis=1)

        args = tuple(
            (join(segments, cap_segments), jax.tree.map(join, freqs, cap_freqs))
            for segments, freqs in zip(image_segments, image_freqs, strict=True)
        )
        modulations = tuple(modulate(self.layers.modulation, cond) for cond in conds)
        xs = run(self.layers, tuple(join(x, caption) for x in xs), args, modulations)
        return tuple(
            self.final_layer(x[:, caption.shape[1] :], cond).astype(jnp.float32)
            for x, cond in zip(xs, conds, strict=True)
        )


def init_params(cfg: NextDiTConfig, key: jax.Array) -> dict:
    """Fresh parameters as nested dicts; jitted with shardings, no device holds them whole."""
    return nnx.to_pure_dict(nnx.state(NextDiT(cfg, rngs=nnx.Rngs(key)), nnx.Param))


def abstract_params(cfg: NextDiTConfig) -> dict:
    """Shapes and types of the parameters; no memory is taken."""
    return jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))


def make_forward(cfg: NextDiTConfig):
    """Returns `forward(params, image, t, cap_feats, cap_mask) -> velocity`, a pure function."""
    forward_many = make_forward_many(cfg)

    def forward(params, image, t, cap_feats, cap_mask):
        (velocity,) = forward_many(params, (image,), (t,), cap_feats, cap_mask)
        return velocity

    return forward


def make_forward_many(cfg: NextDiTConfig):
    """The same for several pictures of each caption: `image`, `t` and the result are tuples."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: NextDiT(cfg, rngs=nnx.Rngs(0))))

    def forward_many(params, images, times, cap_feats, cap_mask):
        # The stacks gather one layer at a time as they go.
        outer = {name: tree for name, tree in params.items() if name not in STACKS}
        params = {**params, **sharding.gather(outer)}
        return nnx.merge(graphdef, params)(images, times, cap_feats, cap_mask)

    return forward_many


def forward_flops(
    cfg: NextDiTConfig, num_image_tokens: int | Sequence[int], num_caption_tokens: int
) -> int:
    """Floating-point operations of a forward pass for one caption (a multiply-add is two).

    Counts the matrix products that the model asks for: no recomputation, no padding of kernels.
    A training step asks for three times as many.

    Args:
      cfg: Sizes.
      num_image_tokens: Of its picture; or of each of its pictures, whose caption is refined once.
      num_caption_tokens: Of the caption.
    """
    if isinstance(num_image_tokens, int):
        num_image_tokens = [num_image_tokens]
    kv_dim = cfg.num_kv_heads * cfg.head_dim
    per_token = 2 * (2 * cfg.dim * cfg.dim + 2 * cfg.dim * kv_dim + 3 * cfg.dim * cfg.hidden_dim)

    def block(tokens):
        return tokens * per_token + 4 * tokens * tokens * cfg.dim

    def picture(tokens):
        return (
            cfg.num_layers * block(tokens + num_caption_tokens)
            + cfg.num_refiner_layers * block(tokens)
            + 2 * tokens * cfg.patch_dim * cfg.dim * 2
            + 2 * cfg.cond_dim * cfg.dim * (4 * (cfg.num_layers + cfg.num_refiner_layers) + 1)
            + 2 * cfg.cond_dim * (2 * TimestepEmbedder.num_frequencies + cfg.cond_dim)
        )

    caption = cfg.num_refiner_layers * block(num_caption_tokens)
    caption += 2 * num_caption_tokens * cfg.cap_feat_dim * cfg.dim
    return caption + sum(map(picture, num_image_tokens))
