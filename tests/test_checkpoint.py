"""What is saved comes back, on any mesh; what is not ours is refused by name."""

import dataclasses
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lumina_jax import checkpoint, optim, sharding
from lumina_jax.errors import DamagedError, InputError, RestartError
from lumina_jax.models.next_dit import NextDiTConfig, abstract_params, init_params
from lumina_jax.train_step import TrainState, init_state

# Orbax leaves coroutines behind when it cannot read a file, which may be found later.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

MODEL = NextDiTConfig(
    dim=64, num_layers=2, num_refiner_layers=1, num_heads=8, num_kv_heads=8, hidden_dim=64,
    axes_dims=(4, 2, 2), in_channels=3, patch_size=4, cap_feat_dim=8, dtype="float32",
)  # fmt: skip
META = {
    "model": {"dim": 64, "remat": "full"},
    "data": {"fingerprint": "a", "seed": 0},
    "config": {},
    "optimizer": {"name": "adamw"},
}
OPTIMIZER = optax.adam(1e-3)
OPTIM = optim.OptimConfig(
    name="adamw", learning_rate=1e-3, warmup_steps=0, schedule="constant", b1=0.9, b2=0.95,
    eps=1e-15, muon_momentum=0.95, moment_dtype="float32", weight_decay=0.1, grad_clip=1.0,
    ema_decay=0.99,
)  # fmt: skip


def make_state(mesh, optimizer=OPTIMIZER):
    def make(key):
        state = init_state(init_params(MODEL, key), optimizer)
        return state._replace(step=jnp.int32(7), ema=jax.tree.map(lambda x: x + 1, state.ema))

    shardings = sharding.tree_shardings(jax.eval_shape(make, jax.random.key(0)), mesh)
    return jax.jit(make, out_shardings=shardings)(jax.random.key(0)), shardings


def make_checkpointer(path, keep_latest=2, keep_every=0, **settings):
    return checkpoint.Checkpointer(
        str(path), keep_latest=keep_latest, keep_every=keep_every, **settings
    )


@pytest.fixture(scope="module")
def state():
    """A state on 2 x 2 x 2 devices."""
    return make_state(sharding.make_mesh(replica=2, data=2, model=2))[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory, state):
    """A run's folder with that state as its one checkpoint."""
    path = tmp_path_factory.mktemp("run")
    checkpointer = make_checkpointer(path)
    checkpointer.save(state, 7, META)
    checkpointer.close()
    return path


@pytest.mark.parametrize("mesh", [(2, 2, 2), (1, 8, 1), (1, 1, 8)])
def test_a_state_comes_back_on_any_mesh(saved, state, mesh):
    mesh = sharding.make_mesh(**dict(zip(sharding.MESH_AXES, mesh, strict=True)))
    shardings = sharding.tree_shardings(state, mesh)
    checkpointer = make_checkpointer(saved)
    restored, next_batch = checkpointer.restore(jax.eval_shape(lambda: state), shardings, META)
    checkpointer.close()
    assert next_batch == 7
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    jax.tree.map(lambda x, s: x.sharding == s or pytest.fail(f"{x.sharding}"), restored, shardings)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_moments_of_every_optimizer_come_back_on_another_mesh(tmp_path, name):
    config = dataclasses.replace(OPTIM, name=name, moment_dtype="bfloat16")
    optimizer = optim.make_optimizer(config, num_steps=10)
    first, _ = make_state(sharding.make_mesh(replica=2, data=2, model=2), optimizer)
    # Numbers that say where they belong.
    numbered = jax.tree.map(
        lambda x: jax.device_put(np.arange(x.size).reshape(x.shape).astype(x.dtype), x.sharding),
        first,
    )
    checkpointer = make_checkpointer(tmp_path)
    meta = {**META, "optimizer": {"name": name}}
    checkpointer.save(numbered, 7, meta)
    checkpointer.close()
    checkpointer = make_checkpointer(tmp_path)
    shardings = sharding.tree_shardings(first, sharding.make_mesh(replica=1, data=8, model=1))
    restored, _ = checkpointer.restore(jax.eval_shape(lambda: first), shardings, meta)
    checkpointer.close()
    jax.tree.map(np.testing.assert_array_equal, restored, numbered)


@pytest.mark.parametrize("weights", ["ema", "params"])
def test_one_set_of_weights_is_read_alone(saved, state, weights):
    mesh = sharding.make_mesh(replica=1, data=1, model=1, devices=jax.devices()[:1])
    shardings = sharding.tree_shardings(state.params, mesh)
    found = checkpoint.load_params(
        checkpoint.find(saved), abstract_params(MODEL), shardings, weights=weights
    )
    jax.tree.map(np.testing.assert_array_equal, found, getattr(state, weights))


def test_old_checkpoints_go_and_milestones_stay(tmp_path):
    state, _ = make_state(sharding.make_mesh(replica=1, data=8, model=1))
    checkpointer = make_checkpointer(tmp_path, keep_latest=2, keep_every=10)
    for step in (5, 10, 15, 20, 25):
        checkpointer.save(state, step, META)
    checkpointer.close()
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [10, 20, 25]


def test_a_checkpoint_of_another_model_is_refused_with_the_differences(saved):
    state, shardings = make_state(sharding.make_mesh(replica=1, data=8, model=1))
    checkpointer = make_checkpointer(saved)
    for other, message in (
        (
            {**META, "model": {"dim": 32, "remat": "none"}},
            "another model: dim: 64 there, 32 in this run",
        ),
        (
            {**META, "data": {"fingerprint": "b", "seed": 0}},
            "another data: fingerprint: 'a' there, 'b'",
        ),
        (
            {**META, "optimizer": {"name": "muon"}},
            "another optimizer: name: 'adamw' there, 'muon' in this run",
        ),
    ):
        with pytest.raises(InputError, match=message) as caught:
            checkpointer.restore(jax.eval_shape(lambda: state), shardings, other)
        assert "remat" not in str(caught.value)  # changes memory, not weights
    checkpointer.close()


def test_weights_from_elsewhere_start_a_run_and_are_none(tmp_path, state):
    mesh = sharding.make_mesh(replica=1, data=8, model=1)
    abstract = abstract_params(MODEL)
    shardings = sharding.tree_shardings(abstract, mesh)
    half = jax.tree.map(lambda x: x.astype("bfloat16"), state.ema)
    meta = checkpoint.weights_meta(MODEL, {"sampling": {}})
    assert not checkpoint.is_run(tmp_path)
    checkpoint.save_weights(tmp_path, half, meta)
    assert checkpoint.is_run(tmp_path)
    found = checkpoint.find(tmp_path)
    assert checkpoint.dtype_of(found, "ema") == "bfloat16"
    wide = checkpoint.load_params(found, abstract, shardings, weights="ema")
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y.astype("float32")), wide, half)
    with pytest.raises(InputError, match="has no weights 'params', only ema"):
        checkpoint.load_params(found, abstract, shardings, weights="params")
    checkpointer = make_checkpointer(tmp_path)
    with pytest.raises(InputError, match="weights alone, no run to go on with"):
        checkpointer.restore(state, sharding.tree_shardings(state, mesh), META)
    checkpointer.close()
    with pytest.raises(InputError, match=r"has a checkpoint \(0\) already"):
        checkpoint.save_weights(tmp_path, half, meta)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "No checkpoint at .*has no directory 'checkpoints'"),
        (lambda path: (path / "checkpoints").mkdir(), "No checkpoint in .* yet"),
        (
            lambda path: (path / "checkpoints" / "3" / "params").mkdir(parents=True),
            "not a checkpoint of",
        ),
    ],
)
def test_a_missing_or_foreign_checkpoint_is_refused(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(InputError, match=message):
        checkpoint.load_meta(checkpoint.find(str(tmp_path)))


def test_a_missing_step_is_refused_with_those_there_are(saved):
    with pytest.raises(InputError, match=r"No checkpoint of step 3 in .*there are \[7\]"):
        checkpoint.find(str(saved), step=3)


def test_unknown_weights_are_refused(saved):
    with pytest.raises(InputError, match="weights='raw' is not one of ema, params"):
        checkpoint.load_params(checkpoint.find(saved), {}, {}, weights="raw")


def files_of(checkpoint_directory):
    paths = [p for p in checkpoint_directory.rglob("*") if p.is_file()]
    return sorted(p.relative_to(checkpoint_directory) for p in paths)


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << place % 8
    path.write_bytes(content)


def damage(path, how, rng):
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        flip(path, int(rng.integers(path.stat().st_size)))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A state of a few arrays, of the types that there are, and a run's folder with it."""
    mesh, rng = sharding.make_mesh(replica=2, data=2, model=2), np.random.default_rng(0)

    def put(dtype, *spec):
        spec = jax.sharding.PartitionSpec(*spec)
        value = rng.standard_normal((16, 64)).astype(dtype)
        return jax.device_put(value, jax.sharding.NamedSharding(mesh, spec))

    params, moments = {"a": put("float32", "data", "model")}, {"a": put(jnp.bfloat16, "model")}
    state = TrainState(jnp.int32(7), params, {"a": put("float32")}, (moments, put("int32")))
    path = tmp_path_factory.mktemp("small")
    checkpointer = make_checkpointer(path)
    checkpointer.save(state, 7, META)
    checkpointer.close()
    return path, state


def restore(checkpointer, state):
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return checkpointer.restore(jax.eval_shape(lambda: state), shardings, META)


def fault_of(workdir, state):
    """What is said of a checkpoint that is not taken; None if it comes back to the last bit."""
    checkpointer = make_checkpointer(workdir)
    try:
        if checkpointer.latest_step() is None:
            return "not listed"
        restored, next_batch = restore(checkpointer, state)
    except DamagedError as error:
        return str(error)
    finally:
        checkpointer.close()
    assert next_batch == 7
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    return None


@pytest.mark.parametrize("how", ["missing", "truncated", "empty", "flipped"])
def test_any_damage_to_any_file_is_found_or_does_no_harm(small, tmp_path, how):
    """Each file of a checkpoint in turn: the state comes back to the last bit, or not at all."""
    whole, state = small
    rng, found = np.random.default_rng(0), []
    names = files_of(whole / "checkpoints" / "7")
    for number, name in enumerate(names):
        copy = tmp_path / str(number)
        shutil.copytree(whole, copy)
        damage(copy / "checkpoints" / "7" / name, how, rng)
        if fault := fault_of(copy, state):
            begins = f"The checkpoint {copy / 'checkpoints' / '7'} is damaged: "
            assert fault == "not listed" or fault.startswith(begins), name
            found.append(name)
    print(f"{how}: {len(found)} of {len(names)} found, the rest restored to the last bit")
    if how != "flipped":  # a flipped bit may be of a name that nobody asks for
        said = [pathlib.Path(item, "metadata") for item in ("data", "meta", "digest")]
        sizes = {name: (whole / "checkpoints" / "7" / name).stat().st_size for name in names}
        largest = max((n for n in names if n.parent.name == "d"), key=sizes.get)
        assert {*said, largest} <= set(found)


@pytest.fixture
def damaged(saved, state, tmp_path):
    """A run with a sound checkpoint of step 7 and one of step 9 that is not."""
    workdir = tmp_path / "run"
    shutil.copytree(saved, workdir)
    checkpointer = make_checkpointer(workdir)
    checkpointer.save(state._replace(step=jnp.int32(9)), 9, META)
    checkpointer.close()
    arrays = (workdir / "checkpoints" / "9" / "state").glob("ocdbt.process_0/d/*")
    largest = max(arrays, key=lambda path: path.stat().st_size)
    flip(largest, largest.stat().st_size // 2)
    return workdir


def test_the_checkpoint_before_a_damaged_one_is_taken_only_when_asked_for(damaged, state):
    checkpointer = make_checkpointer(damaged)
    with pytest.raises(DamagedError, match=r"9 is damaged: .* Others: 7\. .*--step=9"):
        restore(checkpointer, state)
    checkpointer.close()
    assert checkpoint.find_steps(damaged) == [7, 9]

    checkpointer = make_checkpointer(damaged, if_damaged="previous")
    restored, next_batch = restore(checkpointer, state)
    assert next_batch == 7
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    # The run comes to step 9 again.
    checkpointer.save(state._replace(step=jnp.int32(9)), 9, META)
    checkpointer.close()
    assert checkpoint.find_steps(damaged) == [7, 9]
    assert [path.name for path in (damaged / "damaged").iterdir()] == ["9"]


def test_the_only_checkpoint_is_never_passed_over(damaged, state):
    shutil.rmtree(damaged / "checkpoints" / "7")
    checkpointer = make_checkpointer(damaged, if_damaged="previous")
    with pytest.raises(DamagedError, match="Others: none"):
        restore(checkpointer, state)
    checkpointer.close()
    assert checkpoint.find_steps(damaged) == [9]


def test_damaged_weights_are_not_drawn_with(damaged, state):
    mesh = sharding.make_mesh(replica=1, data=8, model=1)
    shardings = sharding.tree_shardings(state.params, mesh)
    arrays = (damaged / "checkpoints" / "9" / "state").glob("ocdbt.process_0/d/*")
    for path in arrays:
        flip(path, path.stat().st_size // 3)
    with pytest.raises(DamagedError, match="9 is damaged"):
        checkpoint.load_params(
            checkpoint.find(damaged), abstract_params(MODEL), shardings, weights="ema"
        )


def test_the_best_checkpoints_stay_besides_the_newest(tmp_path):
    state, _ = make_state(sharding.make_mesh(replica=1, data=8, model=1))
    losses = {5: 0.5, 10: 0.2, 15: 0.4, 20: 0.3, 25: 0.6, 30: None}
    for steps in ([5, 10, 15], [20, 25, 30]):  # it is started again between them
        checkpointer = make_checkpointer(tmp_path, keep_latest=1, keep_best=2)
        for step in steps:
            checkpointer.save(state, step, META, validation_loss=losses[step])
        checkpointer.close()
    assert checkpoint.find_steps(tmp_path) == [10, 20, 30]


def test_what_a_killed_save_left_is_removed_and_saved_anew(tmp_path, state):
    checkpointer = make_checkpointer(tmp_path)
    checkpointer.save(state, 7, META)
    checkpointer.close()
    whole = tmp_path / "checkpoints" / "7"
    shutil.copytree(whole, whole.with_name("9.orbax-checkpoint-tmp"))
    shutil.copytree(whole, whole.with_name("9.orbax-checkpoint-tmp-1"))
    assert checkpoint.find_steps(tmp_path) == [7]
    checkpointer = make_checkpointer(tmp_path)
    assert checkpointer.latest_step() == 7
    checkpointer.save(state, 9, META)
    checkpointer.close()
    assert sorted(path.name for path in whole.parent.iterdir()) == ["7", "9"]


def test_storage_that_fails_is_no_damage(small, monkeypatch):
    """A bucket that does not answer says nothing of the checkpoint: nothing is set aside."""
    path, state = small

    def fail(*_, **__):
        raise ValueError("Error opening driver") from OSError("UNAVAILABLE: 503, try again")

    monkeypatch.setattr(checkpoint.ocp.PyTreeCheckpointHandler, "restore", fail)
    checkpointer = make_checkpointer(path, if_damaged="previous")
    with pytest.raises(RestartError, match=r"could not be read: storage: UNAVAILABLE.*may pass"):
        restore(checkpointer, state)
    checkpointer.close()
    assert checkpoint.find_steps(path) == [7]


def test_a_bucket_that_does_not_answer_is_no_damage(small, monkeypatch):
    retry = pytest.importorskip("gcsfs.retry")
    path, state = small

    def fail(*_, **__):
        raise retry.HttpError({"code": 503, "message": "Service Unavailable, 503"})

    monkeypatch.setattr(checkpoint, "_parse", fail)
    checkpointer = make_checkpointer(path, if_damaged="previous")
    with pytest.raises(RestartError, match="could not be read: storage: Service Unavailable"):
        restore(checkpointer, state)
    checkpointer.close()
    assert checkpoint.find_steps(path) == [7]


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (RuntimeError("out of memory"), RuntimeError),
        (OSError("No space left on device"), RestartError),
    ],
)
def test_nobody_waits_for_a_save_that_did_not_begin(error, raised, small, tmp_path, monkeypatch):
    _, state = small
    checkpointer = make_checkpointer(tmp_path)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(checkpoint.ocp.StandardCheckpointHandler, "async_save", fail)
    for attempt in (lambda: checkpointer.save(state, 9, META), checkpointer.close):
        with pytest.raises(raised):
            attempt()
    assert checkpoint.find_steps(tmp_path) == []


def test_an_old_one_that_cannot_be_removed_is_not_taken_for_a_failed_save(
    small, tmp_path, monkeypatch
):
    _, state = small
    checkpointer = make_checkpointer(tmp_path, keep_latest=1)
    checkpointer.save(state, 9, META)
    checkpointer.wait()

    def fail(path, *_, **__):
        raise PermissionError(f"not allowed: {path}")

    monkeypatch.setattr(shutil, "rmtree", fail)
    message = r"step 12 is whole, but an older one could not be removed: not allowed: .*/9.*: 12\."
    checkpointer.save(state, 12, META)
    with pytest.raises(RestartError, match=message):
        checkpointer.close()
    assert checkpoint.find_steps(tmp_path) == [9, 12]


def test_a_state_that_is_not_finite_is_not_saved(small, tmp_path):
    _, state = small
    checkpointer = make_checkpointer(tmp_path)
    broken = state._replace(ema={"a": state.ema["a"].at[0, 0].set(jnp.inf)})
    with pytest.raises(
        InputError, match="Step 9 is not saved: not all numbers are finite of ema/a"
    ):
        checkpointer.save(broken, 9, META)
    checkpointer.close()
    assert checkpoint.find_steps(tmp_path) == []


def test_settings_that_changed_are_said_by_what_they_change():
    saved = {
        "config": {"optim": {"learning_rate": 1.0}, "train": {"log_every": 1, "init_from": ""}}
    }
    meta = {
        "config": {"optim": {"learning_rate": 2.0}, "train": {"log_every": 5, "init_from": "a"}}
    }
    assert checkpoint.describe_changes(saved, saved) == ""
    learned, rest = checkpoint.describe_changes(saved, meta).split("learning does not depend on")
    assert "learned from here:\n  optim.learning_rate: 1.0 there, 2.0 here" in learned
    assert "for rounding:\n  train.log_every: 1 there, 5 here" in rest
    assert "init_from" not in learned + rest
