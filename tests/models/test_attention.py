"""Every kernel behind the door gives what plain attention gives, forward and backward."""

import functools
import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lumina_jax import sharding
from lumina_jax.errors import InputError
from lumina_jax.models import attention as door
from lumina_jax.models import flash, rope
from lumina_jax.models.layers import RMSNorm

ROOT = pathlib.Path(__file__).parents[2]
EPS = 1e-5


def norms(head_dim=96):
    """Of queries and keys, with scales that differ."""
    made = []
    for seed in (5, 6):
        norm = RMSNorm(head_dim, eps=EPS)
        noise = jax.random.normal(jax.random.key(seed), (head_dim,))
        norm.scale[...] = 1 + 0.3 * noise
        made.append(norm)
    return made


def rotation(batch, num_tokens, head_dim=96):
    ids = jax.random.randint(jax.random.key(8), (batch, num_tokens, 3), 0, 60)
    return rope.frequencies(ids, (head_dim // 3,) * 3, 10000.0)


def plain(q, k, v, ids):
    """Norms and rotation of their own, then attention as it is written down."""
    (q_norm, k_norm), freqs = norms(), rotation(len(q), q.shape[2])
    return door._xla(rope.rotate(q_norm(q), freqs), rope.rotate(k_norm(k), freqs), v, ids)


def fused(q, k, v, ids):
    freqs = rotation(len(q), q.shape[2])
    return door.flash_attention(q, k, v, ids, *norms(), freqs, interpret=True)


# Each with what it has to equal.
KERNELS = {
    "flash": (fused, plain),
    "splash": (functools.partial(door._splash, interpret=True), door._xla),
}


def inputs(num_tokens, *, batch=2, heads=6, kv_heads=2, head_dim=96, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(batch, n, num_tokens, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    q, k, v, weight = (
        jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)
    )
    # A hole where captions end, padding at the end of one sample only.
    place = jnp.arange(num_tokens)
    ids = jnp.stack([(place < 20) | (place >= 50), (place >= 5) & (place < num_tokens - 70)])
    return (q, k, v), weight, jnp.resize(ids, (batch, num_tokens)).astype(jnp.int32)


def forward_and_gradients(attend, qkv, weight, ids):
    def loss(*qkv):
        out = attend(*qkv, ids)
        return jnp.sum(out * weight), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*qkv)
    return out, *gradients


def assert_close(found, expected, tolerance):
    for name, a, b in zip(("out", "dq", "dk", "dv")[-len(found) :], found, expected, strict=True):
        assert a.dtype == b.dtype
        assert np.abs(a - b).max() < tolerance * np.abs(b).max(), name


@pytest.mark.parametrize("num_tokens", [256, 300])
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_equals_plain_attention(name, num_tokens):
    qkv, weight, ids = inputs(num_tokens)
    kernel, reference = KERNELS[name]
    expected = forward_and_gradients(reference, qkv, weight, ids)
    assert_close(forward_and_gradients(kernel, qkv, weight, ids), expected, 3e-6)


def test_the_scales_of_the_norms_inside_have_their_gradients():
    qkv, weight, ids = inputs(256)
    freqs = rotation(2, 256)

    def loss(scales, inside):
        made = norms()
        for norm, scale in zip(made, scales, strict=True):
            norm.scale[...] = scale
        if inside:
            out = door.flash_attention(*qkv, ids, *made, freqs, interpret=True)
        else:
            q, k = (rope.rotate(n(x), freqs) for n, x in zip(made, qkv, strict=False))
            out = door._xla(q, k, qkv[2], ids)
        return jnp.sum(out * weight)

    scales = [norm.scale[...] for norm in norms()]
    found, expected = (jax.grad(loss)(scales, inside) for inside in (True, False))
    for a, b in zip(found, expected, strict=True):
        assert np.abs(a - b).max() < 3e-6 * np.abs(b).max()


def test_flash_goes_through_keys_in_several_parts():
    qkv, weight, ids = inputs(1280, batch=1, heads=1, kv_heads=1)
    assert len(flash._blocks(1280)[1]) > 1
    expected = forward_and_gradients(plain, qkv, weight, ids)
    assert_close(forward_and_gradients(fused, qkv, weight, ids), expected, 3e-6)


def test_flash_in_bfloat16_is_as_exact_as_plain_attention_in_bfloat16():
    qkv, weight, ids = inputs(256, dtype=jnp.bfloat16)
    exact = [x.astype(jnp.float32) for x in qkv]
    expected = forward_and_gradients(plain, exact, weight.astype(jnp.float32), ids)

    def error(attend):
        found = forward_and_gradients(attend, qkv, weight, ids)
        return [float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True)]

    ours, theirs = error(fused), error(plain)
    assert all(a < 2 * b for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


def test_keys_without_any_real_token_give_no_nan():
    qkv, weight, ids = inputs(128, batch=1)
    found = forward_and_gradients(fused, qkv, weight, jnp.zeros_like(ids))
    assert all(bool(jnp.isfinite(x).all()) for x in found)


@pytest.mark.parametrize("name", KERNELS)
def test_on_a_mesh_each_device_attends_for_its_own_part(name):
    qkv, weight, ids = inputs(128, batch=4, heads=4, kv_heads=2)
    kernel, reference = KERNELS[name]
    expected = forward_and_gradients(reference, qkv, weight, ids)
    with jax.set_mesh(sharding.make_mesh(replica=2, data=2, model=2)):
        found = forward_and_gradients(kernel, qkv, weight, ids)
    assert_close(jax.device_get(found), jax.device_get(expected), 3e-6)


def test_another_order_and_back_and_its_gradient():
    _, _, ids = inputs(128)
    x = jax.random.normal(jax.random.key(3), (2, 128, 5))
    order = door.tokens_first(ids)
    first = door.reorder(order, x)
    for row, mask, found in zip(x, ids == 1, first, strict=True):
        np.testing.assert_array_equal(found, jnp.concatenate([row[mask], row[~mask]]))
    np.testing.assert_array_equal(door.reorder(order.reverse, first), x)
    gradient = jax.grad(lambda x: jnp.sum(door.reorder(order, x) * first))(x)
    np.testing.assert_array_equal(gradient, x)


@pytest.mark.accelerator
@pytest.mark.parametrize("num_tokens", [128, 321, 4224])
def test_cudnn_errs_by_no_more_than_bfloat16(num_tokens):
    """Run by: JAX_PLATFORMS=cuda,cpu pytest -m accelerator."""
    if jax.default_backend() != "gpu":
        pytest.skip("needs a GPU")
    qkv, weight, ids = inputs(num_tokens, dtype=jnp.bfloat16)
    ids = -jnp.sort(-ids, axis=1)  # padding last
    weight = weight * ids[:, None, :, None]
    found = forward_and_gradients(door._cudnn, qkv, weight, ids)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (qkv, weight))
    with jax.default_matmul_precision("highest"):
        expected = forward_and_gradients(door._xla, *wide, ids)
    real = ids[:, None, :, None]
    found, expected = (jax.tree.map(lambda x: x * real, each) for each in (found, expected))
    for one, other in zip(found, expected, strict=True):
        error = np.asarray(one, np.float32) - np.asarray(other)
        assert np.linalg.norm(error) < 1e-2 * np.linalg.norm(other)


def test_auto_is_plain_attention_on_a_processor():
    assert door.choose("auto", jnp.bfloat16, 96) == "xla"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flash", "cannot run on cpu: it is a TPU kernel. Use auto"),
        ("splash", "cannot run on cpu: it is a TPU kernel. Use auto"),
        ("cudnn", "cannot run on cpu: it is a GPU kernel. Use auto"),
    ],
)
def test_a_kernel_of_another_machine_is_refused(name, message):
    qkv, _, _ = inputs(128)
    with pytest.raises(InputError, match=message):
        door.choose(name, qkv[0].dtype, 96)


@pytest.mark.parametrize("num_tokens", [128, 512, 4096, 4352, 4992])
def test_blocks_of_splash_divide_what_they_cut(num_tokens):
    blocks = door.splash_blocks(num_tokens)
    assert num_tokens % blocks.block_q == num_tokens % blocks.block_kv == 0
    assert blocks.block_kv % blocks.block_kv_compute == 0
    assert blocks.block_kv_dkv % blocks.block_kv_dkv_compute == 0


@pytest.fixture(scope="module")
def compiled():
    """Programs for TPUs; by a process of its own, since libtpu once loaded disturbs profiles."""
    script = pathlib.Path(__file__).with_name("compile_attention.py")
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize("model", [1, 2])
@pytest.mark.parametrize("name", ["flash", "splash"])
@pytest.mark.parametrize("topology", ["v5e:2x4", "v6e:2x4", "v5p:2x2x2"])
def test_the_released_heads_compile_for_tpus(topology, name, model, compiled):
    """24 query and 8 key heads of 96, over data and model axes, forward and backward."""
    found = compiled[f"{topology} {name} {model}"]
    assert found["auto"] == "flash"
    assert found["kernels"] == 2  # forward and backward
    assert found["named"]
    assert not found["scores"]  # in memory
