"""The autoencoder of FLUX.1, whose latents Lumina-Image 2.0 draws: diffusers' AutoencoderKL.

    encoder   images -> conv -> levels, all but the last end at half the side -> mid -> mean, logvar
    decoder   latents -> conv -> mid -> levels, all but the last end at twice the side -> images

A level is a few residual blocks of one width; mid is a residual block, attention over all latents,
a residual block. There is one width for each level, `block_out_channels`, so n levels reduce the
sides by 2^(n - 1).

    encode: latents = ((mean, or a draw) - shift_factor) * scaling_factor
    decode: images = decoder(latents / scaling_factor + shift_factor)

Large pictures need care for memory, and every measure here is exact: attention takes a part of the
queries at a time, a batch goes through a few pictures at a time.

Axes: B batch, H W picture height and width, h w latent height and width, C latent channels,
D channels inside the network, E channels a layer makes, N = h * w.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx, traverse_util
from jaxtyping import Array, Float, PRNGKeyArray

from lumina_jax import sharding, untrusted
from lumina_jax.errors import InputError

# Pixels that go through the network at a time, on each part of the mesh: one picture of 1024 px.
PIXELS_AT_ONCE = 1024**2
# Scores of attention that exist at a time, for each picture: 256 MiB in float32.
SCORES_AT_ONCE = 2**26
MAX_LEVELS = 8  # each halves the sides; released autoencoders have 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Sizes of the network, by the names of diffusers' config.json; `dtype` is ours."""

    block_out_channels: Sequence[int]  # a tuple, once made; one for each level, the picture's first
    layers_per_block: int = 2
    latent_channels: int = 16
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    dtype: str = "bfloat16"  # of the computation; statistics of the norms are float32 always

    def __post_init__(self):
        widths = self.block_out_channels
        widths = tuple(widths) if isinstance(widths, list | tuple) else (widths,)
        object.__setattr__(self, "block_out_channels", widths)
        # Before anything is computed with them, or made of their size.
        faults = untrusted.number_faults(vars(self), ("layers_per_block",), 1, untrusted.MAX_LAYERS)
        counts = ("latent_channels", "norm_num_groups")
        faults += untrusted.number_faults(vars(self), counts, 1, untrusted.MAX_WIDTH)
        if not 0 < len(widths) <= MAX_LEVELS:
            faults.append(
                f"block_out_channels {f'names {len(widths)} widths' if widths else 'is empty'}; "
                f"name one for each level, of which there are 1 to {MAX_LEVELS}"
            )
        elif not faults and any(
            not untrusted.is_whole(width, 1, untrusted.MAX_WIDTH) or width % self.norm_num_groups
            for width in widths
        ):
            faults.append(
                f"block_out_channels={widths} must be multiples of "
                f"norm_num_groups={self.norm_num_groups}, up to {untrusted.MAX_WIDTH:,}"
            )
        if not untrusted.is_positive(self.scaling_factor):
            faults.append(f"scaling_factor={self.scaling_factor} must be positive")
        if not untrusted.is_finite(self.shift_factor):
            faults.append(f"shift_factor={self.shift_factor} must be a finite number")
        if self.dtype not in ("float32", "bfloat16"):
            faults.append(f"dtype={self.dtype!r} is not one of float32, bfloat16")
        if faults:
            raise InputError("The autoencoder cannot be made: " + "; ".join(faults) + ".")

    @classmethod
    def preset(cls, name: str, **changes) -> "VAEConfig":
        """The sizes of a named autoencoder, with `changes` over them."""
        if name not in PRESETS:
            raise InputError(f"The autoencoder {name!r} is not one of {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **changes})

    @classmethod
    def from_json(cls, config: Mapping[str, Any], **changes) -> "VAEConfig":
        """From diffusers' config.json; refuses what this network cannot be."""
        given = {**_DIFFUSERS_DEFAULTS, **config}
        lists = ("block_out_channels", "down_block_types", "up_block_types")
        faults = [
            f"{name} is {given[name]!r:.60}, needed a list"
            for name in lists
            if not isinstance(given[name], list | tuple)
        ]
        faults += [
            f"{name} is {given[name]!r:.60}, needed a number"
            for name in ("scaling_factor", "shift_factor")
            if not untrusted.is_finite(given[name] or 0)
        ]
        counts = ("layers_per_block", "latent_channels", "norm_num_groups")
        faults += untrusted.number_faults(given, counts, 1, untrusted.MAX_WIDTH)
        if not isinstance(given["mid_block_add_attention"], bool):
            faults.append("mid_block_add_attention is neither true nor false")
        if faults:
            raise InputError(f"This autoencoder's config.json is damaged: {'; '.join(faults)}.")
        levels = len(given["block_out_channels"])
        needed = {**_SUPPORTED}
        for name in ("down_block_types", "up_block_types"):
            given[name], needed[name] = list(given[name]), _SUPPORTED[name] * levels
        faults = [
            f"{name} is {given[name]!r}, needed {value!r}"
            for name, value in needed.items()
            if given[name] != value
        ]
        if faults:
            raise InputError(
                "This autoencoder is of a kind that is not supported: "
                + "; ".join(faults)
                + ". Use one like that of FLUX.1 or Lumina-Image 2.0."
            )
        names = {field.name for field in dataclasses.fields(cls)} & given.keys()
        sizes = {name: given[name] for name in names}
        sizes["scaling_factor"] = float(given["scaling_factor"] or 0)
        sizes["shift_factor"] = float(given["shift_factor"] or 0)
        return cls(**{**sizes, **changes})

    def to_json(self) -> dict[str, Any]:
        """What diffusers' config.json of this autoencoder says."""
        sizes = dataclasses.asdict(self)
        del sizes["dtype"]
        levels = len(self.block_out_channels)
        types = {name: _SUPPORTED[name] * levels for name in ("down_block_types", "up_block_types")}
        return {
            **_SUPPORTED, **types, **sizes, "block_out_channels": list(self.block_out_channels)
        }  # fmt: skip

    @property
    def downscale(self) -> int:
        """Pixels to a latent, along each side."""
        return 2 ** (len(self.block_out_channels) - 1)


# Of diffusers.AutoencoderKL, for keys that an older config.json lacks.
_DIFFUSERS_DEFAULTS = dict(
    _class_name="AutoencoderKL", in_channels=3, out_channels=3,
    down_block_types=["DownEncoderBlock2D"], up_block_types=["UpDecoderBlock2D"],
    block_out_channels=[64], layers_per_block=1, act_fn="silu", latent_channels=4,
    norm_num_groups=32, scaling_factor=0.18215, shift_factor=None, latents_mean=None,
    latents_std=None, use_quant_conv=True, use_post_quant_conv=True, mid_block_add_attention=True,
)  # fmt: skip
# What only one value of is built here; block types are said once for each level.
_SUPPORTED = dict(
    _class_name="AutoencoderKL", in_channels=3, out_channels=3,
    down_block_types=["DownEncoderBlock2D"], up_block_types=["UpDecoderBlock2D"], act_fn="silu",
    latents_mean=None, latents_std=None, use_quant_conv=False, use_post_quant_conv=False,
)  # fmt: skip

# `flux` has released weights (FLUX.1 and Lumina-Image 2.0 share them); `tiny` is ours: it learns
# small pictures on a laptop.
PRESETS = {
    "tiny": dict(block_out_channels=(32, 64, 64), latent_channels=4, norm_num_groups=8),
    "flux": dict(
        block_out_channels=(128, 256, 512, 512), scaling_factor=0.3611, shift_factor=0.1159
    ),
}


class Conv(nnx.Module):
    """A convolution over rows and columns; by default it keeps the size."""

    def __init__(self, cfg, inputs: int, outputs: int, *, size: int = 3):
        self.dtype = cfg.dtype
        self.kernel = nnx.Param(jnp.zeros((size, size, inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs))

    def __call__(
        self, x: Float[Array, "B H W D"], *, stride: int = 1, padding="SAME"
    ) -> Float[Array, "B K M E"]:
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            self.kernel[...].astype(self.dtype),
            (stride, stride),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + self.bias[...].astype(self.dtype)[None, None, None]


class Linear(nnx.Module):
    """x kernel + bias, as wide as it was."""

    def __init__(self, cfg, channels: int):
        self.dtype = cfg.dtype
        self.kernel = nnx.Param(jnp.zeros((channels, channels)))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        y = x.astype(self.dtype) @ self.kernel[...].astype(self.dtype)
        return y + self.bias[...].astype(self.dtype)[None, None]


class GroupNorm(nnx.Module):
    """(x - mean) / deviation * scale + bias; statistics are of a group of channels of a picture."""

    eps = 1e-6

    def __init__(self, cfg, channels: int):
        self.num_groups = cfg.norm_num_groups
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: Float[Array, "B *sides D"]) -> Float[Array, "B *sides D"]:
        """In float32, whatever comes in."""
        groups = rearrange(x.astype(jnp.float32), "B ... (G d) -> B (...) G d", G=self.num_groups)
        mean = jnp.mean(groups, axis=(1, 3))
        variance = jnp.mean(jnp.square(groups - mean[:, None, :, None]), axis=(1, 3))
        mean, inverse = (
            jnp.repeat(y, groups.shape[-1], axis=1)
            for y in (mean, jax.lax.rsqrt(variance + self.eps))
        )
        # One product and one sum for each number: statistics and parameters are joined first.
        factor = inverse * self.scale[...][None]
        offset = self.bias[...][None] - mean * factor
        wide = (len(x), *[1] * (x.ndim - 2), -1)
        return x.astype(jnp.float32) * factor.reshape(wide) + offset.reshape(wide)


class ResnetBlock(nnx.Module):
    """shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))))))."""

    def __init__(self, cfg, inputs: int, outputs: int):
        self.norm1 = GroupNorm(cfg, inputs)
        self.conv1 = Conv(cfg, inputs, outputs)
        self.norm2 = GroupNorm(cfg, outputs)
        self.conv2 = Conv(cfg, outputs, outputs)
        wider = inputs != outputs
        self.conv_shortcut = Conv(cfg, inputs, outputs, size=1) if wider else None

    def __call__(self, x: Float[Array, "B H W D"]) -> Float[Array, "B H W E"]:
        h = self.conv1(nnx.silu(self.norm1(x)))
        h = self.conv2(nnx.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nnx.Module):
    """One head over all latents of a picture, each a token."""

    def __init__(self, cfg, channels: int):
        self.norm = GroupNorm(cfg, channels)
        self.q, self.k, self.v, self.out = (Linear(cfg, channels) for _ in range(4))

    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
        tokens = self.norm(x).reshape(len(x), -1, x.shape[-1])
        y = attend(self.q(tokens), self.k(tokens), self.v(tokens))
        return x + self.out(y).reshape(x.shape)


def attend(
    q: Float[Array, "B N D"], k: Float[Array, "B N D"], v: Float[Array, "B N D"]
) -> Float[Array, "B N D"]:
    """softmax(q k^T / sqrt(D)) v, for as many queries at a time as SCORES_AT_ONCE allows."""

    def some(q):
        scores = jnp.einsum("bqd,bkd->bqk", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * q.shape[-1] ** -0.5, axis=-1)
        return jnp.einsum("bqk,bkd->bqd", weights.astype(v.dtype), v)

    num_tokens = q.shape[1]
    num_parts = math.ceil(num_tokens**2 / SCORES_AT_ONCE)
    if num_parts == 1:
        return some(q)
    # Equal parts need a few queries more, whose results are dropped.
    fill = -num_tokens % num_parts
    parts = rearrange(jnp.pad(q, ((0, 0), (0, fill), (0, 0))), "b (p q) d -> p b q d", p=num_parts)
    return rearrange(jax.lax.map(some, parts), "p b q d -> b (p q) d")[:, :num_tokens]


class MidBlock(nnx.Module):
    """Where every latent sees every other."""

    def __init__(self, cfg, channels: int):
        self.resnets = numbered(ResnetBlock(cfg, channels, channels) for _ in range(2))
        attention = cfg.mid_block_add_attention
        self.attention = Attention(cfg, channels) if attention else None

    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
        first, second = in_order(self.resnets)
        x = first(x)
        return second(x if self.attention is None else self.attention(x))


class DownBlock(nnx.Module):
    """A level of the encoder."""

    def __init__(self, cfg, inputs: int, outputs: int, *, last: bool):
        self.resnets = resnets(cfg, inputs, outputs, cfg.layers_per_block)
        self.downsample = None if last else Conv(cfg, outputs, outputs)

    def __call__(self, x: Float[Array, "B H W D"]) -> Float[Array, "B K M E"]:
        for resnet in in_order(self.resnets):
            x = resnet(x)
        # The reference pads below and on the right only.
        below = ((0, 1), (0, 1))
        return x if self.downsample is None else self.downsample(x, stride=2, padding=below)


class UpBlock(nnx.Module):
    """A level of the decoder."""

    def __init__(self, cfg, inputs: int, outputs: int, *, last: bool):
        self.resnets = resnets(cfg, inputs, outputs, cfg.layers_per_block + 1)
        self.upsample = None if last else Conv(cfg, outputs, outputs)

    def __call__(self, x: Float[Array, "B H W D"]) -> Float[Array, "B K M E"]:
        for resnet in in_order(self.resnets):
            x = resnet(x)
        return x if self.upsample is None else self.upsample(repeat_pixels(x))


class Encoder(nnx.Module):
    """Images in [-1, 1] to mean and log variance, side by side."""

    def __init__(self, cfg: VAEConfig):
        widths = cfg.block_out_channels
        self.conv_in = Conv(cfg, 3, widths[0])
        self.down_blocks = levels(DownBlock, cfg, widths)
        self.mid_block = MidBlock(cfg, widths[-1])
        self.conv_norm_out = GroupNorm(cfg, widths[-1])
        self.conv_out = Conv(cfg, widths[-1], 2 * cfg.latent_channels)

    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B h w E"]:
        x = self.conv_in(images)
        for block in in_order(self.down_blocks):
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))


class Decoder(nnx.Module):
    """Latents to images in [-1, 1], not clipped."""

    def __init__(self, cfg: VAEConfig):
        widths = cfg.block_out_channels[::-1]
        self.conv_in = Conv(cfg, cfg.latent_channels, widths[0])
        self.mid_block = MidBlock(cfg, widths[0])
        self.up_blocks = levels(UpBlock, cfg, widths)
        self.conv_norm_out = GroupNorm(cfg, widths[-1])
        self.conv_out = Conv(cfg, widths[-1], 3)

    def __call__(self, latents: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
        x = self.conv_in(latents)
        x = self.mid_block(x)
        for block in in_order(self.up_blocks):
            x = block(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))


def repeat_pixels(x: Float[Array, "B H W D"]) -> Float[Array, "B K M D"]:
    """Twice the side: each pixel becomes four."""
    x = jnp.broadcast_to(x[:, :, None, :, None], (*x.shape[:2], 2, x.shape[2], 2, x.shape[3]))
    return rearrange(x, "B H a W b D -> B (H a) (W b) D")


def levels(block: type, cfg, widths: Sequence[int]) -> nnx.Module:
    """A block for each width; the first takes its own width, each other that of the one before."""
    return numbered(
        block(cfg, widths[max(i - 1, 0)], width, last=i == len(widths) - 1)
        for i, width in enumerate(widths)
    )


def resnets(cfg, inputs: int, outputs: int, num: int) -> nnx.Module:
    """Residual blocks, the first of which changes the width."""
    return numbered(ResnetBlock(cfg, outputs if i else inputs, outputs) for i in range(num))


def numbered(modules: Iterable[nnx.Module]) -> nnx.Module:
    """Modules by "0", "1" and so on, so that a path of a parameter is all strings."""
    return nnx.Dict({str(i): module for i, module in enumerate(modules)})


def in_order(modules: nnx.Module) -> list[nnx.Module]:
    return [modules[str(i)] for i in range(len(modules))]  # its own order is that of the alphabet


def init_params(cfg: VAEConfig, key: PRNGKeyArray) -> dict:
    """Fresh parameters as nested dicts, those of the encoder and of the decoder.

    Kernels are uniform, of variance 1 / inputs. All are cut from one draw: a draw for each of so
    many small kernels takes ten seconds to compile.
    """
    networks = {"encoder": Encoder(cfg), "decoder": Decoder(cfg)}
    params = {name: nnx.to_pure_dict(nnx.state(x, nnx.Param)) for name, x in networks.items()}
    flat = traverse_util.flatten_dict(params)
    kernels = {path: x for path, x in flat.items() if path[-1] == "kernel"}
    ends = np.cumsum([x.size for x in kernels.values()])
    numbers = jax.random.uniform(key, (ends[-1],), minval=-1.0, maxval=1.0)
    for (path, x), part in zip(kernels.items(), jnp.split(numbers, ends[:-1]), strict=True):
        flat[path] = (3 / math.prod(x.shape[:-1])) ** 0.5 * part.reshape(x.shape)
    return traverse_util.unflatten_dict(flat)


def abstract_params(cfg: VAEConfig) -> dict:
    """Shapes and types of the parameters; no memory is taken."""
    return jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))


@functools.cache
def _graphdef(network: type, cfg: VAEConfig) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: network(cfg)))


def encode_moments(
    cfg: VAEConfig, params: dict, images: Float[Array, "B H W 3"]
) -> tuple[Float[Array, "B h w C"], Float[Array, "B h w C"]]:
    """Mean and log variance of the latents of images in [-1, 1], before shift and scale."""
    network = nnx.merge(_graphdef(Encoder, cfg), params["encoder"])
    moments = a_few_at_a_time(network, images, math.prod(images.shape[1:3]))
    mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return mean, jnp.clip(logvar, -30.0, 20.0)


def draw(
    mean: Float[Array, "B h w C"], logvar: Float[Array, "B h w C"], key: PRNGKeyArray
) -> Float[Array, "B h w C"]:
    """One latent from each Gaussian."""
    noise = sharding.constrain(jax.random.normal(key, mean.shape), ("act_batch",))
    return mean + jnp.exp(0.5 * logvar) * noise


def encode(
    cfg: VAEConfig, params: dict, images: Float[Array, "B H W 3"], key: PRNGKeyArray | None = None
) -> Float[Array, "B h w C"]:
    """Latents of about unit scale: the likeliest, or a draw where a key is given."""
    mean, logvar = encode_moments(cfg, params, images)
    latents = mean if key is None else draw(mean, logvar, key)
    return (latents - cfg.shift_factor) * cfg.scaling_factor


def decode(
    cfg: VAEConfig, params: dict, latents: Float[Array, "B h w C"]
) -> Float[Array, "B H W 3"]:
    """Images in [-1, 1], not clipped."""
    network = nnx.merge(_graphdef(Decoder, cfg), params["decoder"])
    latents = latents / cfg.scaling_factor + cfg.shift_factor
    pixels = math.prod(latents.shape[1:3]) * cfg.downscale**2
    return a_few_at_a_time(network, latents, pixels).astype(jnp.float32)


def a_few_at_a_time(
    network: Callable[[Array], Array], batch: Float[Array, "B ..."], pixels: int
) -> Float[Array, "B ..."]:
    """network(batch) of pictures of `pixels`, no more than PIXELS_AT_ONCE on a part of the mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else sharding.batch_shards(mesh)
    if len(batch) % shards:  # it cannot lie split
        shards = 1
    each, most = len(batch) // shards, max(PIXELS_AT_ONCE // pixels, 1)
    num_parts = next(n for n in range(1, each + 1) if each % n == 0 and each // n <= most)
    if num_parts == 1:
        return network(batch)

    def pin(x, axes):
        return sharding.constrain(x, axes) if shards > 1 else x

    # Every num_parts-th picture in one part, so that each part is split over the mesh as the whole.
    parts = rearrange(batch, "(b p) ... -> p b ...", p=num_parts)
    done = jax.lax.map(network, pin(parts, (None, "act_batch")))
    return pin(rearrange(done, "p b ... -> (b p) ..."), ("act_batch",))


def forward_flops(cfg: VAEConfig, height: int, width: int) -> tuple[int, int]:
    """Floating-point operations of the convolutions and of attention for a picture.

    A multiply-add is two. Those of the encoder and those of the decoder.
    """
    widths = cfg.block_out_channels
    places = [height * width // 4**level for level in range(len(widths))]
    top, bottom, latents = widths[0], widths[-1], places[-1]

    def blocks(inputs, outputs, num):
        first = 9 * inputs * outputs + (inputs * outputs if inputs != outputs else 0)
        return first + 9 * (2 * num - 1) * outputs**2

    mid = latents * blocks(bottom, bottom, 2)
    if cfg.mid_block_add_attention:
        mid += latents * (4 * bottom**2 + 2 * latents * bottom)
    encoder = places[0] * 9 * 3 * top + mid + latents * 9 * bottom * 2 * cfg.latent_channels
    decoder = places[0] * 9 * 3 * top + mid + latents * 9 * bottom * cfg.latent_channels
    for level, size in enumerate(widths):
        above, below = widths[max(level - 1, 0)], widths[min(level + 1, len(widths) - 1)]
        encoder += places[level] * blocks(above, size, cfg.layers_per_block)
        decoder += places[level] * blocks(below, size, cfg.layers_per_block + 1)
        if level:  # between two levels: halving ends below, doubling above
            encoder += places[level] * 9 * above**2
            decoder += places[level - 1] * 9 * size**2
    return 2 * encoder, 2 * decoder
