"""Products in eight bits: how near they are, and that they are in eight bits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lumina_jax.errors import InputError
from lumina_jax.models import quantized
from lumina_jax.models.next_dit import NextDiTConfig

EQUATIONS = {
    "btD,Dhd->bhtd": ((2, 8, 32), (32, 4, 16)),
    "bhtd,hdD->btD": ((2, 4, 8, 16), (4, 16, 32)),
    "nD,DF->nF": ((16, 32), (32, 48)),
}


def operands(equation):
    keys = jax.random.split(jax.random.key(0), 2)
    return [jax.random.normal(k, s) for k, s in zip(keys, EQUATIONS[equation], strict=True)]


def relative(found, expected):
    return float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))


@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize(("quantization", "bound"), [("int8", 0.015), ("fp8", 0.06)])
def test_product_and_gradients_are_near_the_exact_ones(equation, quantization, bound):
    pytest.importorskip("qwix")
    x, kernel = operands(equation)
    exact, pull = jax.vjp(lambda x, k: jnp.einsum(equation, x, k), x, kernel)
    found, pull_found = jax.vjp(
        lambda x, k: quantized.einsum(equation, x, k, quantization), x, kernel
    )
    cotangent = jax.random.normal(jax.random.key(1), exact.shape)
    (dx, dk), (dx_found, dk_found) = pull(cotangent), pull_found(cotangent)
    assert 0 < relative(found, exact) < bound
    assert 0 < relative(dx_found, dx) < 1.5 * bound
    np.testing.assert_allclose(dk_found, dk, rtol=1e-5, atol=1e-5)  # is not quantized


def test_the_compiled_product_has_operands_of_eight_bits():
    pytest.importorskip("qwix")
    x, kernel = operands("nD,DF->nF")
    lowered = jax.jit(lambda x, k: quantized.einsum("nD,DF->nF", x, k, "int8")).lower(x, kernel)
    (product,) = (line for line in lowered.as_text().splitlines() if "dot_general" in line)
    assert product.count("xi8>") == 2
    assert "xi32>" in product


def test_an_unknown_quantization_is_refused():
    with pytest.raises(InputError, match="quantization='int3' is not one of none, int8, fp8"):
        dataclasses.replace(NextDiTConfig.preset("tiny"), quantization="int3")


def test_without_qwix_a_quantized_model_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs qwix: pip install 'lumina-jax\[quantized\]'"):
        NextDiTConfig.preset("tiny", quantization="int8")
