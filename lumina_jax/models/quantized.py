"""Matrix products in eight bits, by qwix (https://github.com/google/qwix).

Each operand is divided by its largest absolute value along the summed dims, and rounded: one scale
for a token, one for an output of the kernel. As in SwitchBack (arXiv 2304.13013) the product and
the gradient of its input are made so; the gradient of the kernel, a sum over all tokens of a batch,
stays in the type of the operands. Residuals are kept in that type too.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Types of (operands, incoming gradient). float8 of gradients has range instead of precision.
TYPES = {
    "int8": (jnp.int8, jnp.int8),
    "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2),
}
QUANTIZATIONS = ("none", *TYPES)


def check(quantization: str) -> str | None:
    """What is wrong with `model.quantization`; None if nothing."""
    if quantization not in QUANTIZATIONS:
        return f"quantization={quantization!r} is not one of {', '.join(QUANTIZATIONS)}"
    if quantization != "none" and importlib.util.find_spec("qwix") is None:
        return f"quantization={quantization!r} needs qwix: pip install 'lumina-jax[quantized]'"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def einsum(
    equation: str, x: Float[Array, "..."], kernel: Float[Array, "..."], quantization: str
) -> Float[Array, "..."]:
    """jnp.einsum(equation, x, kernel) with both operands in eight bits."""
    operands, _ = TYPES[quantization]
    return _product(equation, x, kernel, operands, operands)


def _forward(equation, x, kernel, quantization):
    return einsum(equation, x, kernel, quantization), (x, kernel)


def _backward(equation, quantization, residuals, gradient):
    x, kernel = residuals
    inputs, outputs = equation.split("->")
    x_dims, kernel_dims = inputs.split(",")
    operands, gradients = TYPES[quantization]
    return (
        _product(f"{outputs},{kernel_dims}->{x_dims}", gradient, kernel, gradients, operands),
        jnp.einsum(f"{x_dims},{outputs}->{kernel_dims}", x, gradient),
    )


einsum.defvjp(_forward, _backward)


def _product(equation, a, b, a_type, b_type):
    import qwix  # an extra: only who asks for it needs it

    inputs, outputs = equation.split("->")

    def quantize(x, dims, dtype):
        kept = [axis for axis, dim in enumerate(dims) if dim in outputs]
        return qwix.quantize(x, dtype, channelwise_axes=kept)

    a_dims, b_dims = inputs.split(",")
    return qwix.einsum(equation, quantize(a, a_dims, a_type), quantize(b, b_dims, b_type))
