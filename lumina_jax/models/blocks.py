"""The transformer block of the Unified Next-DiT (paper section 3.1).

    x = x + tanh(gate) * norm2(sublayer(norm1(x) * (1 + scale)))

for attention, then for the feed-forward network. Both sides of each sublayer are normalised, the
residual stream never is. Scale and gate come from the time and start at zero, so a fresh modulated
block is the identity. The blocks that refine the caption know no time: scale 0 and gate 1.

Axes: B batch, T tokens, n = B * T, D model width, A width of the condition, F width inside the
feed-forward, L layers, M = 4 D numbers that modulate a block.
"""

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from lumina_jax import sharding
from lumina_jax.models import rope
from lumina_jax.models.attention import JointAttention
from lumina_jax.models.layers import Projection, RMSNorm


class FeedForward(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, cfg, *, rngs: nnx.Rngs):
        kind = {"dtype": cfg.dtype, "quantization": cfg.quantization, "rngs": rngs}
        kind["fans"] = (cfg.dim, cfg.hidden_dim)
        self.gate = Projection("nD,DF->nF", (cfg.dim, cfg.hidden_dim), **kind)
        self.up = Projection("nD,DF->nF", (cfg.dim, cfg.hidden_dim), **kind)
        self.down = Projection("nF,FD->nD", (cfg.hidden_dim, cfg.dim), **kind)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        # Tokens in one dim: over two, the gradient of a kernel costs a CPU twice the time.
        tokens = sharding.gather_tokens(x).reshape(-1, x.shape[-1])
        gate = checkpoint_name(self.gate(tokens), "gate")
        up = checkpoint_name(self.up(tokens), "up")
        hidden = nnx.silu(gate) * up
        hidden = sharding.constrain(hidden, ("act_batch", "act_mlp"))
        out = sharding.split_tokens(self.down(hidden).reshape(x.shape))
        return checkpoint_name(out, "ffn_out")


class TransformerBlock(nnx.Module):
    """Attention then feed-forward; modulated by the time unless `modulated` is False."""

    def __init__(self, cfg, *, modulated: bool = True, rngs: nnx.Rngs):
        self.attention_norm1 = RMSNorm(cfg.dim, eps=cfg.norm_eps)
        self.attention = JointAttention(cfg, rngs=rngs)
        self.attention_norm2 = RMSNorm(cfg.dim, eps=cfg.norm_eps)
        self.ffn_norm1 = RMSNorm(cfg.dim, eps=cfg.norm_eps)
        self.feed_forward = FeedForward(cfg, rngs=rngs)
        self.ffn_norm2 = RMSNorm(cfg.dim, eps=cfg.norm_eps)
        self.modulation = modulation(cfg, 4, rngs=rngs) if modulated else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"],
        freqs: rope.Freqs,
        modulation: Float[Array, "B M"] | None = None,
    ) -> Float[Array, "B T D"]:
        """`modulation` is what `modulate` made of the time for this block."""
        if self.modulation is None:
            x = x + self.attention_norm2(
                self.attention(self.attention_norm1(x), segment_ids, freqs)
            )
            x = x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x)))
        else:
            scale_attention, gate_attention, scale_ffn, gate_ffn = jnp.split(
                modulation[:, None, :], 4, axis=-1
            )

            h = self.attention_norm1(x) * (1 + scale_attention)
            h = self.attention(h, segment_ids, freqs)
            x = x + jnp.tanh(gate_attention) * self.attention_norm2(h)

            h = self.ffn_norm1(x) * (1 + scale_ffn)
            h = self.feed_forward(h)
            x = x + jnp.tanh(gate_ffn) * self.ffn_norm2(h)
        return x


class FinalLayer(nnx.Module):
    """Scaled LayerNorm, then a projection to the patch; starts at zero."""

    def __init__(self, cfg, *, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(
            cfg.dim, epsilon=1e-6, use_bias=False, use_scale=False, dtype=cfg.dtype, rngs=rngs
        )
        self.modulation = modulation(cfg, 1, rngs=rngs)
        zeros = nnx.initializers.zeros_init()
        self.linear = nnx.Linear(
            cfg.dim, cfg.patch_dim, kernel_init=zeros, dtype=cfg.dtype, rngs=rngs
        )

    def __call__(
        self, x: Float[Array, "B T D"], cond: Float[Array, "B A"]
    ) -> Float[Array, "B T P"]:
        scale = self.modulation(nnx.silu(cond))[:, None, :]
        return self.linear(self.norm(x) * (1 + scale))


def modulate(modulation: nnx.Linear, cond: Float[Array, "B A"]) -> Float[Array, "L B M"]:
    """What each of L stacked maps makes of the condition, all layers at once.

    Their kernels are a ninth of a layer and stay where they lie: the conditions of all pictures,
    which are a few kilobytes, come to them, and what the devices make of their own rows is summed:
    on each device, 4 L M bytes for each picture of its replica before the sum, 1 MB for 2b.
    """
    cond = sharding.constrain(nnx.silu(cond), ("act_replica", "cond"))
    kernel, bias = modulation.kernel[...], modulation.bias[...]
    out = jnp.einsum(
        "BA,LAM->BLM",
        cond.astype(modulation.dtype),
        kernel.astype(modulation.dtype),
        preferred_element_type=jnp.float32,
    )
    # One exchange after the other: over `data` what is summed, then over `model` what is missing.
    out = sharding.constrain(out, ("act_batch", None, "modulation"))
    out = sharding.constrain(out, ("act_batch", None, None))
    return jnp.swapaxes((out + bias[None]).astype(modulation.dtype), 0, 1)


def modulation(cfg, count: int, *, rngs: nnx.Rngs) -> nnx.Linear:
    """The map from the condition to `count` vectors of model width; starts at zero (adaLN-zero)."""
    return nnx.Linear(
        cfg.cond_dim,
        count * cfg.dim,
        kernel_init=nnx.initializers.zeros_init(),
        dtype=cfg.dtype,
        rngs=rngs,
    )
