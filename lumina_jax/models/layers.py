"""The two smallest layers: a projection and a norm."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lumina_jax.models import quantized


class Projection(nnx.Module):
    """A linear map written as an einsum, its kernel kept in the shape that the einsum names.

    Heads stay a dim of their own, so that no reshape stands between a kernel and its sharding.
    Xavier-uniform over `fans`: (inputs, outputs) of the matrix that the reference initialises.
    """

    def __init__(
        self,
        equation: str,
        shape: tuple[int, ...],
        *,
        fans: tuple[int, int],
        dtype: str,
        quantization: str = "none",
        rngs: nnx.Rngs,
    ):
        self.equation = equation
        self.dtype = dtype
        self.quantization = quantization
        bound = (6 / sum(fans)) ** 0.5
        kernel = jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)
        self.kernel = nnx.Param(kernel)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        if self.quantization != "none":
            return quantized.einsum(self.equation, x, kernel, self.quantization)
        return jnp.einsum(self.equation, x, kernel)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last dim."""

    def __init__(self, dim: int, *, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(dim))

    def __call__(self, x: Float[Array, "*leading dim"]) -> Float[Array, "*leading dim"]:
        # As both reference codes: statistics in float32, back to x's type, then the scale. Scaling
        # in float32 drifts by up to 0.03 an element in bfloat16.
        square = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
        normed = (x * jax.lax.rsqrt(square + self.eps)).astype(x.dtype)
        scale = self.scale[...].astype(x.dtype)
        return normed * scale.reshape((1,) * (x.ndim - 1) + scale.shape)
