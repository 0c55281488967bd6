"""Learning rate, decay and average by hand; optimizers against torch, optax and an SVD."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lumina_jax import optim, sharding
from lumina_jax.errors import InputError
from lumina_jax.models.next_dit import STACKS, NextDiTConfig, abstract_params
from lumina_jax.train_step import init_state

CONFIG = optim.OptimConfig(
    name="adamw", learning_rate=1e-3, warmup_steps=10, schedule="cosine", b1=0.9, b2=0.95,
    eps=1e-15, muon_momentum=0.95, moment_dtype="float32", weight_decay=0.1, grad_clip=1.0,
    ema_decay=0.99,
)  # fmt: skip
MODEL = NextDiTConfig(
    dim=64, num_layers=3, num_refiner_layers=1, num_heads=8, num_kv_heads=4, hidden_dim=128,
    axes_dims=(4, 2, 2), in_channels=3, patch_size=4, cap_feat_dim=8, dtype="float32", remat="none",
)  # fmt: skip
EVERY_OPTIMIZER = pytest.mark.parametrize("name", optim.OPTIMIZERS)


def test_the_rate_rises_to_its_peak_then_falls_to_zero():
    rate = optim.learning_rate(CONFIG, num_steps=110)
    np.testing.assert_allclose([rate(0), rate(9), rate(10)], [1e-4, 1e-3, 1e-3], rtol=1e-5)
    assert float(rate(60)) == pytest.approx(5e-4)
    assert float(rate(110)) == pytest.approx(0, abs=1e-9)


def test_a_constant_rate_without_warmup_is_constant():
    config = dataclasses.replace(CONFIG, schedule="constant", warmup_steps=0)
    rate = optim.learning_rate(config, num_steps=100)
    assert [float(rate(step)) for step in (0, 50, 1000)] == pytest.approx([1e-3] * 3)


@EVERY_OPTIMIZER
def test_decay_shrinks_kernels_alone(name):
    params = {
        "linear": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
        "norm": {"scale": jnp.ones(2)},
    }
    config = dataclasses.replace(CONFIG, name=name, warmup_steps=0)
    optimizer = optim.make_optimizer(config, num_steps=100)
    zeros = {
        "linear": {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)},
        "norm": {"scale": jnp.zeros(2)},
    }
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_allclose(updates["linear"]["kernel"], -1e-3 * 0.1, rtol=1e-5)
    np.testing.assert_array_equal(updates["linear"]["bias"], 0)
    np.testing.assert_array_equal(updates["norm"]["scale"], 0)


def test_a_large_gradient_is_clipped_and_a_small_one_is_not():
    config = dataclasses.replace(CONFIG, weight_decay=0.0)
    optimizer = optim.make_optimizer(config, num_steps=100)
    params = {"linear": {"kernel": jnp.zeros((2,))}}

    def first_moment(gradient):
        grads = {"linear": {"kernel": jnp.array(gradient)}}
        _, state = optimizer.update(grads, optimizer.init(params), params)
        return np.asarray(state[1][0].mu["linear"]["kernel"]) / 0.1

    np.testing.assert_allclose(first_moment([30.0, 40.0]), [0.6, 0.8], rtol=1e-5)
    np.testing.assert_allclose(first_moment([0.3, 0.4]), [0.3, 0.4], rtol=1e-5)


@EVERY_OPTIMIZER
def test_clipping_bounds_what_every_optimizer_sees(name):
    """A gradient ten times as long as the limit is the same step as one at the limit."""
    config = dataclasses.replace(CONFIG, name=name, weight_decay=0.0)
    optimizer = optim.make_optimizer(config, num_steps=100)
    params = some_tree(0)
    grads = some_tree(1)
    norm = optax.tree.norm(grads)
    at_limit, above = (jax.tree.map(lambda x, f=f: x * f / norm, grads) for f in (1.0, 10.0))
    # A second gradient, not clipped: a first step of these rules knows no length.
    small = jax.tree.map(lambda x: -0.3 * x[..., ::-1] / norm, grads)

    @jax.jit
    def second_update(first):
        _, state = optimizer.update(first, optimizer.init(params), params)
        return optimizer.update(small, state, params)[0]

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-8),
        second_update(above),
        second_update(at_limit),
    )


def some_tree(seed):
    """Numbers in the shapes of the model's parameters."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: rng.standard_normal(x.shape).astype(np.float32), abstract_params(MODEL)
    )


def test_adamw_is_that_of_torch():
    torch = pytest.importorskip("torch")
    config = dataclasses.replace(CONFIG, schedule="constant", warmup_steps=0, grad_clip=np.inf)
    optimizer = optim.make_optimizer(config, num_steps=100)
    rng = np.random.default_rng(0)
    start = rng.standard_normal((4, 5)).astype(np.float32)
    params = {"linear": {"kernel": jnp.asarray(start)}}
    theirs = torch.nn.Parameter(torch.tensor(start))
    reference = torch.optim.AdamW([theirs], lr=1e-3, betas=(0.9, 0.95), eps=1e-15, weight_decay=0.1)
    state = optimizer.init(params)
    for _ in range(20):
        grad = rng.standard_normal((4, 5)).astype(np.float32)
        updates, state = optimizer.update({"linear": {"kernel": jnp.asarray(grad)}}, state, params)
        params = optax.apply_updates(params, updates)
        theirs.grad = torch.tensor(grad)
        reference.step()
    np.testing.assert_allclose(
        params["linear"]["kernel"], theirs.detach().numpy(), rtol=2e-6, atol=1e-7
    )


def test_muon_makes_every_matrix_of_every_layer_nearly_orthogonal():
    x = jax.random.normal(jax.random.key(0), (3, 24, 40))
    found = np.asarray(optim.newton_schulz(x))
    for matrix, result in zip(np.asarray(x), found, strict=True):
        left, _, right = np.linalg.svd(matrix, full_matrices=False)
        nearest = left @ right
        assert np.linalg.norm(result - nearest) < 0.3 * np.linalg.norm(nearest)
        values = np.linalg.svd(result, compute_uv=False)
        assert 0.6 < values.min() <= values.max() < 1.25


def test_muon_is_that_of_optax_with_fused_heads():
    """Its direction, on the blocks' kernels; optax is told which dims are which."""
    config = dataclasses.replace(
        CONFIG, name="muon", weight_decay=0.0, grad_clip=np.inf, schedule="constant", warmup_steps=0
    )
    ours = optim.make_optimizer(config, num_steps=100)
    dims = optax.contrib.MuonDimensionNumbers
    numbers = {
        "q": dims(1, (2, 3)), "k": dims(1, (2, 3)), "v": dims(1, (2, 3)), "out": dims((1, 2), 3),
        "gate": dims(1, 2), "up": dims(1, 2), "down": dims(1, 2),
    }  # fmt: skip

    def blocks(tree):
        return {
            name: {part: tree[name][part] for part in ("attention", "feed_forward")}
            for name in STACKS
        }

    params, grads = some_tree(0), some_tree(1)
    theirs = optax.contrib.muon(
        1e-3, beta=0.95, consistent_rms=0.2,
        muon_weight_dimension_numbers=lambda tree: jax.tree_util.tree_map_with_path(
            lambda path, _: numbers.get(path[-2].key), tree
        ),
    )  # fmt: skip

    def update(optimizer, grads, params):
        return jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p)[0])(grads, params)

    found, expected = update(ours, grads, params), update(theirs, blocks(grads), blocks(params))
    found = blocks(found)
    for stack in STACKS:
        for part, kernels in expected[stack].items():
            for name in numbers.keys() & kernels.keys():
                ours_, theirs_ = (t[stack][part][name]["kernel"] for t in (found, expected))
                np.testing.assert_allclose(ours_, theirs_, atol=2e-6, err_msg=f"{stack} {name}")


def test_moments_in_bfloat16_halve_and_hardly_change_the_step():
    config = dataclasses.replace(CONFIG, schedule="constant", warmup_steps=0, weight_decay=0.0)
    params = {"linear": {"kernel": jnp.zeros(4000)}}
    runs = {}
    for dtype in optim.MOMENT_DTYPES:
        optimizer = optim.make_optimizer(dataclasses.replace(config, moment_dtype=dtype), 100)
        state = optimizer.init(params)
        assert {x.dtype.name for x in jax.tree.leaves(state) if x.ndim} == {dtype}
        update = jax.jit(optimizer.update)
        for step in range(300):
            # From step 200 on a tenth: the second moment has to fall.
            size = 1e-6 if step < 200 else 1e-7
            noise = size * jax.random.normal(jax.random.key(step), (4000,))
            updates, state = update({"linear": {"kernel": noise}}, state, params)
        runs[dtype] = updates["linear"]["kernel"]
    error = jnp.linalg.norm(runs["bfloat16"] - runs["float32"])
    assert float(error / jnp.linalg.norm(runs["float32"])) < 0.02


@pytest.mark.parametrize(
    "name", ["adamw", *(pytest.param(n, marks=pytest.mark.slow) for n in ("muon", "adafactor"))]
)
def test_an_optimizer_takes_the_same_steps_on_every_mesh(name):
    optimizer = optim.make_optimizer(dataclasses.replace(CONFIG, name=name), num_steps=100)
    params, grads = some_tree(0), some_tree(1)
    results = []
    for sizes, devices in (((1, 1, 1), jax.devices()[:1]), ((2, 2, 2), None)):
        mesh = sharding.make_mesh(
            **dict(zip(sharding.MESH_AXES, sizes, strict=True)), devices=devices
        )
        state = jax.eval_shape(lambda p: init_state(p, optimizer), params)
        shardings = sharding.tree_shardings(state, mesh)
        with jax.set_mesh(mesh):
            placed = jax.device_put((params, grads), (shardings.params,) * 2)
            opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(placed[0])
            update = jax.jit(
                optimizer.update, out_shardings=(shardings.params, shardings.opt_state)
            )
            for _ in range(2):
                updates, opt_state = update(placed[1], opt_state, placed[0])
        results.append(jax.device_get(updates))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-7), *results)


def test_the_average_forgets_its_start_then_follows_slowly():
    one, two = {"w": jnp.zeros(1)}, {"w": jnp.ones(1)}
    early = optim.update_ema(one, two, jnp.int32(0), 0.99)
    late = optim.update_ema(one, two, jnp.int32(10_000), 0.99)
    assert [float(early["w"][0]), float(late["w"][0])] == pytest.approx([0.9, 0.01])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "linear"}, "schedule='linear' is not one of constant, cosine"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 and grad_clip=1.0 must be positive"),
        ({"ema_decay": 1.0}, r"ema_decay=1.0 must be in \[0, 1\)"),
        ({"name": "sgd"}, "name='sgd' is not one of adamw, muon, adafactor"),
        ({"moment_dtype": "int8"}, "moment_dtype='int8' is not one of float32, bfloat16"),
        ({"muon_momentum": 1.5}, r"muon_momentum=1.5 must be in \[0, 1\)"),
        ({"moment_dtype": "bfloat16", "b2": 0.999}, "lower the decay or take float32"),
        ({"warmup_steps": -1}, "warmup_steps=-1 must not be negative"),
        ({"warmup_steps": 2**31}, "warmup_steps=2147483648 must .* below 2147483647"),
        ({"learning_rate": math.nan}, "learning_rate=nan .* must be positive"),
        ({"learning_rate": 1e269}, "learning_rate=1e[+]269 .* must be positive"),  # by fuzzing
        ({"learning_rate": math.inf}, "learning_rate=inf .* must be positive"),
        ({"grad_clip": math.nan}, "grad_clip=nan must be positive"),
        ({"eps": math.nan}, "eps=nan must be zero or more"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 must be zero or more"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CONFIG, **changes)
