"""Unified Next-DiT, the backbone of Lumina-Image 2.0 (arXiv 2503.21758, section 3.1).

Caption and image are refined apart, then joined in one sequence of fixed layout,
[caption slots | image slots], through which every later block attends freely. Attention knows
order only by position and padding only by mask, so this equals the reference's ragged packing and
lets pictures of any shape share a batch and a compiled program.

Axes: B batch, S caption slots, N image slots, T = S + N, D model width, P numbers in a patch,
F text features, A width of the condition, L layers, M numbers that modulate a layer.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lumina_jax import sharding, untrusted
from lumina_jax.errors import InputError
from lumina_jax.models import quantized, rope
from lumina_jax.models.attention import IMPLEMENTATIONS, choose, reorder, tokens_first
from lumina_jax.models.blocks import FinalLayer, TransformerBlock, modulate
from lumina_jax.models.embed import CaptionEmbedder, TimestepEmbedder
from lumina_jax.models.merging import find_groups, merge, restore, take
from lumina_jax.models.stack import REMAT_POLICIES, scan_blocks, stack_blocks
from lumina_jax.types import ImageTokens

_COUNTS = ("num_layers", "num_refiner_layers", "num_heads", "num_kv_heads", "patch_size")
_WIDTHS = ("dim", "hidden_dim", "in_channels", "cap_feat_dim")


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
        object.__setattr__(self, "axes_dims", _tuple(self.axes_dims))
        # Before anything is computed with them, or made of their size.
        faults = untrusted.number_faults(vars(self), _COUNTS, 1, untrusted.MAX_LAYERS)
        faults += untrusted.number_faults(vars(self), _WIDTHS, 1, untrusted.MAX_WIDTH)
        for name in ("norm_eps", "rope_theta"):
            if not untrusted.is_positive(getattr(self, name)):
                faults.append(f"{name}={getattr(self, name)!r} must be a positive number")
        if len(self.axes_dims) != 3 or any(
            not untrusted.is_whole(dim, 0, untrusted.MAX_WIDTH) or dim % 2 for dim in self.axes_dims
        ):
            faults.append(f"axes_dims={self.axes_dims} must be three even numbers")
        if faults:
            raise InputError("config.model: " + "; ".join(faults) + ".")
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


def _tuple(value: Any) -> tuple:
    """Of what should be a sequence; anything else is refused where it is looked at."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


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
    ) -> tuple[Float[Array, "B _ P"], ...]:
        """The velocity of each token of each picture, float32; at padding it means nothing.

        A caption may have several pictures, each with a time of its own: of high and of low
        resolution in training. They do not see each other, but their caption is refined once, and
        layer by layer they meet the same weights (`stack.scan_blocks`).
        """
        caption = self.refine_caption(cap_feats, cap_mask)
        joined = self.join(images, times, caption, cap_mask)
        return self.predict(self.attend(joined), joined.conds, num_slots=cap_mask.shape[1])

    def refine_caption(
        self, cap_feats: Float[Array, "B S F"], cap_mask: Bool[Array, "B S"]
    ) -> Float[Array, "B S D"]:
        """The caption as the layers take it: it knows neither picture nor time."""
        cfg = self.cfg
        freqs = rope.frequencies(rope.caption_ids(cap_mask), cfg.axes_dims, cfg.rope_theta)
        args = (cap_mask.astype(jnp.int32), freqs)
        x = self.cap_embedder(cap_feats)
        (caption,) = scan_blocks(
            self.context_refiner, (x,), (args,), remat=cfg.refiner_remat, dtype=cfg.dtype
        )
        return caption

    def join(
        self,
        images: tuple[ImageTokens, ...],
        times: tuple[Float[Array, " B"], ...],
        caption: Float[Array, "B S D"],
        cap_mask: Bool[Array, "B S"],
        stretch: rope.Stretch | None = None,
    ) -> "Joined":
        """Refines the pictures and sets each behind its caption.

        Args:
          images: Pictures of a caption.
          times: Of each picture.
          caption: From `refine_caption`.
          cap_mask: Its mask.
          stretch: For pictures larger than those trained on.
        """
        cfg = self.cfg

        def frequencies(ids, t):
            return rope.frequencies(ids, cfg.axes_dims, cfg.rope_theta, stretch, t)

        def join(image, caption):
            return jnp.concatenate([caption, image], axis=1)

        cap_segments = cap_mask.astype(jnp.int32)
        image_segments = [image.mask.astype(jnp.int32) for image in images]
        image_freqs = [
            frequencies(rope.image_ids(cap_mask, image.rows, image.columns), t)
            for image, t in zip(images, times, strict=True)
        ]
        conds = tuple(self.t_embedder(t) for t in times)
        xs = tuple(self.x_embedder(image.tokens) for image in images)
        xs = scan_blocks(
            self.noise_refiner,
            xs,
            tuple(zip(image_segments, image_freqs, strict=True)),
            tuple(modulate(self.noise_refiner.modulation, cond) for cond in conds),
            remat=cfg.refiner_remat,
            dtype=cfg.dtype,
        )
        cap_freqs = [frequencies(rope.caption_ids(cap_mask), t) for t in times]
        return Joined(
            xs=tuple(join(x, caption) for x in xs),
            segment_ids=tuple(join(segments, cap_segments) for segments in image_segments),
            freqs=tuple(
                jax.tree.map(join, *pair) for pair in zip(image_freqs, cap_freqs, strict=True)
            ),
            modulations=tuple(modulate(self.layers.modulation, cond) for cond in conds),
            conds=conds,
        )

    def attend(
        self, joined: "Joined", span: tuple[int, int] | None = None
    ) -> tuple[Float[Array, "B _ D"], ...]:
        """The sequences after the layers, or after those of `span`."""
        cfg, xs = self.cfg, joined.xs
        args = tuple(zip(joined.segment_ids, joined.freqs, strict=True))
        # Caption and picture each end in padding; cuDNN wants it behind both.
        implementation = choose(cfg.attention, jnp.dtype(cfg.dtype), cfg.head_dim)
        orders = [tokens_first(ids) for ids in joined.segment_ids if implementation == "cudnn"]
        if orders:
            xs, args = _reorder(orders, xs), _reorder(orders, args)
        xs = scan_blocks(
            self.layers,
            xs,
            args,
            joined.modulations,
            remat=cfg.remat,
            dtype=cfg.dtype,
            span=span,
        )
        return _reorder([order.reverse for order in orders], xs) if orders else xs

    def predict(
        self,
        xs: tuple[Float[Array, "B _ D"], ...],
        conds: tuple[Float[Array, "B A"], ...],
        *,
        num_slots: int,
    ) -> tuple[Float[Array, "B _ P"], ...]:
        """The velocity that the sequences say, behind the `num_slots` slots of the caption."""
        return tuple(
            self.final_layer(x[:, num_slots:], cond).astype(jnp.float32)
            for x, cond in zip(xs, conds, strict=True)
        )

    def first_input(self, joined: "Joined") -> tuple[Float[Array, "B _ D"], ...]:
        """What the first layer attends with: it tells how far the picture has moved."""
        norm = jax.tree.map(lambda scale: scale[0], self.layers.attention_norm1)
        return tuple(
            norm(x) * (1 + modulation[0, :, None, : x.shape[-1]])
            for x, modulation in zip(joined.xs, joined.modulations, strict=True)
        )


def _reorder(orders, pictures):
    """Of each picture its arrays [B, T, ...] in its order."""
    return tuple(
        jax.tree.map(functools.partial(reorder, order), tree)
        for order, tree in zip(orders, pictures, strict=True)
    )


class Joined(NamedTuple):
    """What the layers take, each field with an entry for each picture of a caption.

    Attributes:
      xs: Caption and picture, refined apart.
      segment_ids: 1 at tokens, 0 at padding.
      freqs: Their rotation.
      modulations: Of each layer.
      conds: The embedded times.
    """

    xs: tuple[Float[Array, "B _ D"], ...]
    segment_ids: tuple[Int[Array, "B _"], ...]
    freqs: tuple[rope.Freqs, ...]
    modulations: tuple[Float[Array, "L B M"], ...]
    conds: tuple[Float[Array, "B A"], ...]


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
    build = _builder(cfg)

    def forward_many(params, images, times, cap_feats, cap_mask):
        return build(params)(images, times, cap_feats, cap_mask)

    return forward_many


class Merging(NamedTuple):
    """Which layers see fewer image tokens (`models/merging.py`).

    Attributes:
      ratio: Of the image tokens, how many are merged into others.
      start: The first layer that sees the rest alone.
      stop: The first one that sees all of them again.
    """

    ratio: float
    start: int
    stop: int


class Stages(NamedTuple):
    """The forward pass of one picture in pieces, for a sampler that does not need all of them.

    Attributes:
      refine: refine(params, cap_feats, cap_mask) -> caption [B, S, D], once for a whole path.
      join: join(params, image, t, caption, cap_mask) -> Joined.
      first_input: first_input(params, joined) -> [B, T, D], what the first layer attends with.
      attend: attend(params, joined, height, width, merging) -> [B, T, D], after the layers. Height
        and width are those of the picture in tokens; `merging` may be None.
      predict: predict(params, x, joined, num_slots) -> velocity [B, N, P].
    """

    refine: Callable
    join: Callable
    first_input: Callable
    attend: Callable
    predict: Callable


def make_stages(
    cfg: NextDiTConfig, *, stretch: rope.Stretch | None = None, attention_gain: float = 1.0
) -> Stages:
    """The pure functions whose composition is `make_forward`.

    Args:
      cfg: Sizes.
      stretch: For pictures larger than those trained on.
      attention_gain: Of the scores wherever image tokens attend: sqrt(log N / log N_trained) keeps
        the entropy of attention what it was (arXiv 2306.08645; "proportional attention" of
        Lumina-Next).
    """
    build = _builder(cfg, attention_gain)

    def refine(params, cap_feats, cap_mask):
        return build(params).refine_caption(cap_feats, cap_mask)

    def join(params, image, t, caption, cap_mask):
        return build(params).join((image,), (t,), caption, cap_mask, stretch)

    def first_input(params, joined):
        (x,) = build(params).first_input(joined)
        return x

    def attend(params, joined, height, width, merging):
        model = build(params)
        if merging is None:
            (x,) = model.attend(joined)
            return x
        (x,) = model.attend(joined, (0, merging.start))
        groups = find_groups(x, height=height, width=width, ratio=merging.ratio)
        fewer = merge(groups, x)
        part = joined._replace(
            xs=(fewer,),
            segment_ids=take(groups, joined.segment_ids),
            freqs=take(groups, joined.freqs),
        )
        (after,) = model.attend(part, (merging.start, merging.stop))
        x = restore(groups, x, fewer, after)
        (x,) = model.attend(joined._replace(xs=(x,)), (merging.stop, cfg.num_layers))
        return x

    def predict(params, x, joined, num_slots):
        (velocity,) = build(params).predict((x,), joined.conds, num_slots=num_slots)
        return velocity

    return Stages(refine, join, first_input, attend, predict)


def _builder(cfg: NextDiTConfig, attention_gain: float = 1.0):
    """From parameters to the module."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: NextDiT(cfg, rngs=nnx.Rngs(0))))

    def gained(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return leaf * attention_gain if name in _IMAGE_QUERIES else leaf

    def build(params):
        # The stacks gather one layer at a time as they go.
        outer = {name: tree for name, tree in params.items() if name not in STACKS}
        params = {**params, **sharding.gather(outer)}
        if attention_gain != 1:
            params = jax.tree_util.tree_map_with_path(gained, params)
        return nnx.merge(graphdef, params)

    return build


# A score is linear in the scale of the query's norm.
_IMAGE_QUERIES = tuple(f"{stack}/attention/q_norm/scale" for stack in ("noise_refiner", "layers"))


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
    pictures = (picture_flops(cfg, tokens, num_caption_tokens) for tokens in num_image_tokens)
    return caption_flops(cfg, num_caption_tokens) + sum(pictures)


def caption_flops(cfg: NextDiTConfig, num_tokens: int) -> int:
    """Of refining a caption, which a sampler does once for a whole path."""
    refined = cfg.num_refiner_layers * _block_flops(cfg, num_tokens)
    return refined + 2 * num_tokens * cfg.cap_feat_dim * cfg.dim


def picture_flops(
    cfg: NextDiTConfig,
    num_image_tokens: int,
    num_caption_tokens: int,
    *,
    skipped: bool = False,
    num_merged: int = 0,
    num_merging: int = 0,
) -> int:
    """Of a picture whose caption is refined already.

    Args:
      cfg: Sizes.
      num_image_tokens: Of the picture.
      num_caption_tokens: Of its caption.
      skipped: The layers do not run.
      num_merged: Of the image tokens, how many go with others...
      num_merging: ... in how many layers.
    """
    tokens = num_image_tokens + num_caption_tokens
    layers = (cfg.num_layers - num_merging) * _block_flops(cfg, tokens)
    layers += num_merging * _block_flops(cfg, tokens - num_merged)
    modulations = 4 * (cfg.num_layers + cfg.num_refiner_layers) + 1
    return (
        (0 if skipped else layers)
        + cfg.num_refiner_layers * _block_flops(cfg, num_image_tokens)
        + 2 * num_image_tokens * cfg.patch_dim * cfg.dim * 2
        + 2 * cfg.cond_dim * cfg.dim * modulations
        + 2 * cfg.cond_dim * (2 * TimestepEmbedder.num_frequencies + cfg.cond_dim)
    )


def _block_flops(cfg: NextDiTConfig, num_tokens: int) -> int:
    kv_dim = cfg.num_kv_heads * cfg.head_dim
    per_token = 2 * (2 * cfg.dim * cfg.dim + 2 * cfg.dim * kv_dim + 3 * cfg.dim * cfg.hidden_dim)
    return num_tokens * per_token + 4 * num_tokens * num_tokens * cfg.dim
