"""Gemma 2 as a text encoder: the hidden states that enter its last layer.

    x = sqrt(D) table[ids]
    x = x + norm2(sublayer(norm1(x)))     attention, then feed-forward, in every layer but the last
    norm(x) = x / rms(x) * (1 + scale)

Attention is causal, every second layer sees the last `sliding_window` tokens only, and a soft cap
c tanh(logit / c) bounds its logits. The features of Lumina-Image 2.0 are `hidden_states[-2]` of
transformers, so neither the last layer nor the final norm is part of this network.

Axes: B batch, S caption slots, D width, which is that of the features, H query heads, K key and
value heads, d features of a head, F width inside the feed-forward.

Gemma Team 2024, Gemma 2: Improving Open Language Models at a Practical Size (arXiv 2408.00118).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from lumina_jax import sharding, untrusted
from lumina_jax.errors import InputError
from lumina_jax.models.layers import Projection
from lumina_jax.models.stack import stack_blocks
from lumina_jax.sharding import GEMMA2_RULES

SLIDING, FULL = "sliding_attention", "full_attention"
_WIDTHS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
    "head_dim", "sliding_window",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma2Config:
    """Sizes under the names of transformers' config.json; the defaults are those of gemma-2-2b.

    Attributes:
      num_hidden_layers: Of the language model; one fewer is built and run.
      attn_logit_softcapping: None for no soft cap.
      layer_types: Of each layer, "sliding_attention" or "full_attention"; by turns if empty.
      dtype: Of the weights and of the computation.
    """

    vocab_size: int = 256_000
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    sliding_window: int = 4096
    attn_logit_softcapping: float | None = 50.0
    query_pre_attn_scalar: float = 256.0
    layer_types: tuple[str, ...] = ()
    dtype: str = "bfloat16"

    def __post_init__(self):
        # Before anything is computed with them, or made of their size.
        faults = untrusted.number_faults(
            vars(self), ("num_hidden_layers",), 2, untrusted.MAX_LAYERS
        )
        faults += untrusted.number_faults(vars(self), _WIDTHS, 1, untrusted.MAX_WIDTH)
        positive = ["rms_norm_eps", "rope_theta", "query_pre_attn_scalar"]
        if self.attn_logit_softcapping is not None:
            positive.append("attn_logit_softcapping")
        faults += [
            f"{name}={getattr(self, name)!r} must be a positive number"
            for name in positive
            if not untrusted.is_positive(getattr(self, name))
        ]
        if faults:
            raise InputError("Gemma 2: " + "; ".join(faults) + ".")
        if not self.layer_types:
            types = tuple((SLIDING, FULL)[i % 2] for i in range(self.num_hidden_layers))
            object.__setattr__(self, "layer_types", types)
        if self.num_attention_heads % self.num_key_value_heads:
            faults.append(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            faults.append(f"head_dim={self.head_dim} must be even")
        unknown = set(self.layer_types) - {SLIDING, FULL}
        if unknown or len(self.layer_types) != self.num_hidden_layers:
            faults.append(
                f"layer_types={self.layer_types} must be {self.num_hidden_layers} of {SLIDING} and "
                f"{FULL}"
            )
        if self.dtype not in ("float32", "bfloat16"):
            faults.append(f"dtype={self.dtype!r} is not one of float32, bfloat16")
        if faults:
            raise InputError("Gemma 2: " + "; ".join(faults) + ".")

    @classmethod
    def from_json(cls, config: Mapping[str, Any], **changes) -> "Gemma2Config":
        """The sizes in a config.json of transformers, of any of its versions, and `changes`."""
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(rope, Mapping):
            raise InputError(f"Its config.json gives rotations as {rope!r:.60}; needed: an object.")
        given = {
            "model_type": config.get("model_type"),
            "hidden_activation": config.get("hidden_activation") or "gelu_pytorch_tanh",
            "attention_bias": bool(config.get("attention_bias")),
            "use_bidirectional_attention": bool(config.get("use_bidirectional_attention")),
            "rope_type": rope.get("rope_type", rope.get("type", "default")),
        }
        needed = {
            "model_type": "gemma2",
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False,
            "use_bidirectional_attention": False,
            "rope_type": "default",
        }
        faults = [
            f"{name}={value!r} (needed: {needed[name]!r})"
            for name, value in given.items()
            if value != needed[name]
        ]
        sizes = {}
        for field in dataclasses.fields(cls):
            value = rope.get(field.name, config.get(field.name, field.default))
            if field.name == "dtype":
                continue  # that of the file, not of the computation
            if field.name == "layer_types":
                is_list = isinstance(value, list | tuple) and all(isinstance(t, str) for t in value)
                if value and not is_list:
                    faults.append(f"layer_types={value!r:.60} (needed: a list of names)")
                sizes[field.name] = tuple(value) if value and is_list else ()
            elif field.name == "attn_logit_softcapping" and value is None:
                sizes[field.name] = None
            elif not untrusted.is_finite(value):
                faults.append(f"{field.name}={value!r:.60} (needed: a number)")
            elif isinstance(field.default, int) and value != int(value):
                faults.append(f"{field.name}={value} (needed: a whole number)")
            else:
                sizes[field.name] = type(field.default)(value)
        if faults:
            raise InputError(
                f"Its config.json describes another network than Gemma 2: {', '.join(faults)}. "
                f"Give the text encoder of Lumina-Image 2.0, or google/gemma-2-2b."
            )
        return cls(**{**sizes, **changes})


class Freqs(NamedTuple):
    """Cosine and sine of each position's angles; the two halves of a head share them."""

    cos: Float[Array, "S half"]
    sin: Float[Array, "S half"]


def frequencies(num_slots: int, head_dim: int, theta: float) -> Freqs:
    """Those of the positions 0, 1, 2, ...: captions are padded on the right."""
    rates = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    angles = (np.arange(num_slots)[:, None] * rates).astype(np.float32)
    return Freqs(jnp.cos(angles), jnp.sin(angles))


def rotate(x: Float[Array, "B H S d"], freqs: Freqs) -> Float[Array, "B H S d"]:
    """Turns feature i of a head together with feature i + d / 2, in float32."""
    cos, sin = (angle[None, None] for angle in freqs)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Norm(nnx.Module):
    """x / rms(x) * (1 + scale) over the last dim, rounded once, at its end."""

    def __init__(self, dim: int, *, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.zeros(dim))

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        wide = x.astype(jnp.float32)
        square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        scale = 1 + self.scale[...].astype(jnp.float32)
        return (wide * jax.lax.rsqrt(square + self.eps) * scale[None, None]).astype(x.dtype)


class Embedder(nnx.Module):
    """The table of the vocabulary, its rows times sqrt(D)."""

    def __init__(self, cfg: Gemma2Config, *, rngs: nnx.Rngs):
        self.table = nnx.Param(
            jax.random.normal(rngs.params(), (cfg.vocab_size, cfg.hidden_size), jnp.float32)
            / cfg.hidden_size**0.5
        )

    def __call__(self, token_ids: Int32[Array, "B S"]) -> Float[Array, "B S D"]:
        # The table of the released model is 1.2 GB and split by features. So each device looks up
        # its own features for the whole batch, and the features travel, not the table.
        token_ids = sharding.constrain(token_ids, ("act_replica", None))
        x = sharding.constrain(self.table[...][token_ids], ("act_replica", None, "embed"))
        x = sharding.constrain(x, ("act_batch", None, None))
        return x * jnp.asarray(x.shape[-1] ** 0.5, x.dtype)


class Attention(nnx.Module):
    """Grouped queries, rotated by position, with a soft cap on the logits."""

    def __init__(self, cfg: Gemma2Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        D, d = cfg.hidden_size, cfg.head_dim
        H, K = cfg.num_attention_heads, cfg.num_key_value_heads
        kwargs = {"dtype": cfg.dtype, "rngs": rngs}
        self.q = Projection("bsD,Dhd->bhsd", (D, H, d), fans=(D, H * d), **kwargs)
        self.k = Projection("bsD,Dhd->bhsd", (D, K, d), fans=(D, K * d), **kwargs)
        self.v = Projection("bsD,Dhd->bhsd", (D, K, d), fans=(D, K * d), **kwargs)
        self.out = Projection("bhsd,hdD->bsD", (H, d, D), fans=(H * d, D), **kwargs)

    def __call__(
        self, x: Float[Array, "B S D"], mask: Bool[Array, "B 1 S S"], freqs: Freqs
    ) -> Float[Array, "B S D"]:
        cfg = self.cfg
        q, k, v = rotate(self.q(x), freqs), rotate(self.k(x), freqs), self.v(x)
        groups = cfg.num_attention_heads // cfg.num_key_value_heads
        k, v = (jnp.repeat(y, groups, axis=1) for y in (k, v))
        q, k, v = (sharding.constrain(y, ("act_batch", "act_heads", None, None)) for y in (q, k, v))

        logits = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)
        logits = logits * cfg.query_pre_attn_scalar**-0.5
        if (cap := cfg.attn_logit_softcapping) is not None:
            logits = cap * jnp.tanh(logits / cap)
        # Not -inf: a slot of padding may see no token at all, and must not become NaN.
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        return self.out(jnp.einsum("bhqk,bhkd->bhqd", weights, v))


class FeedForward(nnx.Module):
    """down(gelu(gate(x)) * up(x))."""

    def __init__(self, cfg: Gemma2Config, *, rngs: nnx.Rngs):
        D, F = cfg.hidden_size, cfg.intermediate_size
        kwargs = {"fans": (D, F), "dtype": cfg.dtype, "rngs": rngs}
        self.gate = Projection("bsD,DF->bsF", (D, F), **kwargs)
        self.up = Projection("bsD,DF->bsF", (D, F), **kwargs)
        self.down = Projection("bsF,FD->bsD", (F, D), **kwargs)

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        # float32 inside, as in PyTorch: the cube of a bfloat16 has lost its last digits.
        gate = jax.nn.gelu(self.gate(x).astype(jnp.float32), approximate=True).astype(x.dtype)
        return self.down(sharding.constrain(gate * self.up(x), ("act_batch", None, "act_mlp")))


class Block(nnx.Module):
    """Attention, then feed-forward, each between two norms."""

    def __init__(self, cfg: Gemma2Config, *, rngs: nnx.Rngs):
        norm = {"eps": cfg.rms_norm_eps}
        self.attention_norm1 = Norm(cfg.hidden_size, **norm)
        self.attention = Attention(cfg, rngs=rngs)
        self.attention_norm2 = Norm(cfg.hidden_size, **norm)
        self.ffn_norm1 = Norm(cfg.hidden_size, **norm)
        self.feed_forward = FeedForward(cfg, rngs=rngs)
        self.ffn_norm2 = Norm(cfg.hidden_size, **norm)

    def __call__(
        self, x: Float[Array, "B S D"], mask: Bool[Array, "B 1 S S"], freqs: Freqs
    ) -> Float[Array, "B S D"]:
        x = x + self.attention_norm2(self.attention(self.attention_norm1(x), mask, freqs))
        return x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x)))


class Gemma2(nnx.Module):
    """From token ids to the hidden states before the last layer."""

    def __init__(self, cfg: Gemma2Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.embedder = Embedder(cfg, rngs=rngs)
        self.layers = stack_blocks(
            lambda rngs: Block(cfg, rngs=rngs), cfg.num_hidden_layers - 1, rngs=rngs
        )

    def __call__(
        self, token_ids: Int32[Array, "B S"], token_mask: Bool[Array, "B S"]
    ) -> Float[Array, "B S D"]:
        cfg = self.cfg
        num_slots = token_ids.shape[1]
        freqs = frequencies(num_slots, cfg.head_dim, cfg.rope_theta)
        distance = np.arange(num_slots)[:, None] - np.arange(num_slots)
        causal, near = distance >= 0, distance < cfg.sliding_window
        full = token_mask[:, None, None, :] & causal[None, None]
        local = full & near[None, None]

        def body(x, layer):
            block, is_sliding = layer
            # One layer at a time is whole, in the type it is stored in.
            block = sharding.gather(block, rules=GEMMA2_RULES)
            x = block(x, jnp.where(is_sliding, local, full), freqs)
            return sharding.constrain(x, ("act_batch", None, None)), None

        is_sliding = np.asarray(cfg.layer_types[:-1]) == SLIDING
        x, _ = jax.lax.scan(body, self.embedder(token_ids), (self.layers, is_sliding))
        return jnp.where(token_mask[..., None], x, 0)


def abstract_params(cfg: Gemma2Config) -> dict:
    """Shapes and types of the parameters; no memory is taken."""
    params = jax.eval_shape(
        lambda: nnx.to_pure_dict(nnx.state(Gemma2(cfg, rngs=nnx.Rngs(0)), nnx.Param))
    )
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, cfg.dtype), params)


def make_encode(cfg: Gemma2Config):
    """Returns `encode(params, token_ids, token_mask) -> cap_feats`, a pure function.

    The features are zero where the mask is false.
    """
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Gemma2(cfg, rngs=nnx.Rngs(0))))
    # Asked for float32, an accelerator would still multiply in less.
    precision = "float32" if cfg.dtype == "float32" else None

    def encode(params, token_ids, token_mask):
        with jax.default_matmul_precision(precision):
            return nnx.merge(graphdef, params)(token_ids, token_mask)

    return encode


def forward_flops(cfg: Gemma2Config, num_tokens: int) -> int:
    """Floating-point operations of a caption of so many slots (a multiply-add is two)."""
    heads = 2 * cfg.num_attention_heads + 2 * cfg.num_key_value_heads
    per_token = cfg.hidden_size * (heads * cfg.head_dim + 3 * cfg.intermediate_size)
    scores = 2 * num_tokens * cfg.num_attention_heads * cfg.head_dim
    return 2 * (cfg.num_hidden_layers - 1) * num_tokens * (per_token + scores)
