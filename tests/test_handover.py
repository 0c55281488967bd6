"""A stage begins with what the stage before learned, and with nothing else of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lumina_jax import checkpoint, handover, sharding
from lumina_jax.errors import InputError
from lumina_jax.models.next_dit import NextDiTConfig, abstract_params
from lumina_jax.train_step import init_state

MODEL = NextDiTConfig(
    dim=64, num_layers=2, num_refiner_layers=1, num_heads=8, num_kv_heads=8, hidden_dim=64,
    axes_dims=(4, 2, 2), in_channels=3, patch_size=4, cap_feat_dim=8, dtype="float32",
)  # fmt: skip
# Of one layer: nothing here asks what the parameters are of.
PARAMS = {"x_embedder": abstract_params(MODEL)["x_embedder"]}
CONFIG = {"optim": {"name": "adam"}, "train": {"num_steps": 5, "init_from": "", "old": 1}}
NUM_UPDATES = 5


def schedule(step):
    return jnp.where(step < 3, 1e-3, 5e-4)


def adam(params):
    """Adam in parts of its own, as an optimizer that treats some parameters in another way has."""
    labels = jax.tree.map_with_path(
        lambda path, _: "wide" if path[-1].key == "kernel" else "narrow", params
    )
    inner = {name: optax.scale_by_adam(b2=0.95) for name in ("wide", "narrow")}
    return optax.chain(optax.partition(inner, labels), optax.scale_by_learning_rate(schedule))


OPTIMIZER = adam(PARAMS)


def numbers(params):
    return jax.tree.map(
        lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params
    )


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(replica=1, data=8, model=1)


@pytest.fixture(scope="module")
def before(mesh):
    """The last state of the stage before."""

    def make():
        state = init_state(numbers(PARAMS), OPTIMIZER)
        for _ in range(NUM_UPDATES):
            updates, opt_state = OPTIMIZER.update(numbers(state.params), state.opt_state)
            params = optax.apply_updates(state.params, updates)
            state = state._replace(step=state.step + 1, params=params, opt_state=opt_state)
        return state._replace(ema=jax.tree.map(lambda x: x + 1, state.params))

    shardings = sharding.tree_shardings(jax.eval_shape(make), mesh)
    return jax.jit(make, out_shardings=shardings)()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, before):
    path = tmp_path_factory.mktemp("stage1")
    checkpointer = checkpoint.Checkpointer(str(path), keep_latest=1, keep_every=0)
    meta = {**checkpoint.weights_meta(MODEL, CONFIG), "data": {"seed": 0}}
    checkpointer.save(before, NUM_UPDATES, meta)
    checkpointer.close()
    return path


def take_over(source, mesh, optimizer=OPTIMIZER, model=MODEL, weights="ema", **changes):
    abstract = jax.eval_shape(lambda params: init_state(params, optimizer), PARAMS)
    arguments = {
        "optimizer": optimizer,
        "learning_rate": schedule,
        "model": model,
        "config": CONFIG,
        "init_weights": weights,
        "init_optimizer": "fresh",
    }
    shardings = sharding.tree_shardings(abstract, mesh)
    state, report = handover.take_over(source, abstract, shardings, **arguments | changes)
    jax.tree.map(lambda x, s: x.sharding == s or pytest.fail(f"{x.sharding}"), state, shardings)
    return state, report


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("weights", ["ema", "params"])
def test_weights_are_taken_over_and_all_else_is_new(workdir, before, mesh, weights):
    state, report = take_over(workdir, mesh, weights=weights)
    expected = getattr(before, weights)
    assert_equal(state, init_state(expected, OPTIMIZER))
    assert_equal(state.ema, expected)
    norm = float(optax.tree.norm(expected))
    assert f"step {NUM_UPDATES} of 5" in report
    assert f"{weights}: {len(jax.tree.leaves(expected))} arrays" in report
    assert f"norm {norm:.6g}" in report
    assert "fresh: moments of zero" in report
    assert "learning rate 0.001 at step 0" in report
    assert "from batch 0" in report


def test_kept_moments_step_as_before_at_the_learning_rate_of_the_first_step(workdir, before, mesh):
    """Adam's count goes on, or its bias would be corrected twice; the schedule's begins anew."""
    state, report = take_over(workdir, mesh, weights="params", init_optimizer="kept")
    assert_equal((state.params, state.ema), (before.params, before.params))
    assert int(state.step) == 0
    found, after = OPTIMIZER.update(numbers(state.params), state.opt_state)
    expected, _ = OPTIMIZER.update(numbers(before.params), before.opt_state)
    ratio = float(schedule(0) / schedule(NUM_UPDATES))
    assert ratio == pytest.approx(2)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, ratio * y, rtol=1e-5), found, expected)
    for name in ("wide", "narrow"):
        assert int(after[0].inner_states[name].inner_state.count) == NUM_UPDATES + 1
    assert int(after[1].count) == 1
    moments = jax.tree.leaves(before.opt_state)
    assert f"kept: {len(moments) - 3} arrays" in report
    assert f"of {NUM_UPDATES} updates" in report


def test_the_report_names_what_differs_between_the_configs(workdir, mesh):
    train = {"num_steps": 7, "init_from": "x", "new": (1, 2)}
    config = {"optim": {"name": "adam"}, "train": train, "sampling": {"height": 8}}
    _, report = take_over(workdir, mesh, config=config)
    differing = report.split("config")[1]
    assert [line.strip() for line in differing.splitlines()] == [
        "train.new: 'absent' there, [1, 2] here",
        "train.num_steps: 5 there, 7 here",
        "train.old: 1 there, 'absent' here",
    ]
    assert "the same" in take_over(workdir, mesh)[1]


def test_an_optimizer_that_counts_its_steps_elsewhere_is_not_resumed():
    state = optax.adam(1e-3).init(PARAMS)
    with pytest.raises(ValueError, match=r"No optax\.ScaleByScheduleState"):
        handover.resume(state, state)


def test_moments_of_another_optimizer_are_refused(workdir, mesh):
    other = optax.chain(optax.trace(0.9), optax.scale_by_learning_rate(schedule))
    config = {**CONFIG, "optim": {"name": "momentum"}}
    message = (
        r"kept, but the moments in .* another kind of optimizer: 0/inner_states/.*: .* there, "
        r"absent in .* more. Settings that differ: optim.name: 'adam' there, 'momentum' here"
    )
    with pytest.raises(InputError, match=message):
        take_over(workdir, mesh, other, init_optimizer="kept", config=config)
    state, _ = take_over(workdir, mesh, other, config=config)  # fresh, it may be another
    assert_equal(state.opt_state, other.init(state.params))


def test_another_model_is_refused_with_the_differences(workdir, mesh):
    other = NextDiTConfig(**{**vars(MODEL), "num_layers": 3})
    with pytest.raises(InputError, match="num_layers: 2 there, 3 in this run"):
        take_over(workdir, mesh, model=other)


def test_weights_alone_are_taken_over_but_have_no_moments(tmp_path, before, mesh):
    half = jax.tree.map(lambda x: x.astype("bfloat16"), before.ema)
    meta = checkpoint.weights_meta(MODEL, {"sampling": {}})
    checkpoint.save_weights(tmp_path, half, meta)
    state, report = take_over(tmp_path, mesh)
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x, y.astype("float32")), state.ema, half
    )
    assert "weights alone" in report
    for source in (tmp_path, "somebody/published-weights"):
        with pytest.raises(InputError, match=r"holds weights alone, no moments.*=fresh"):
            take_over(source, mesh, init_optimizer="kept")
