"""Validation loss is of the weights alone: not of the mesh, the batch, the seed or the moment."""

import json

import jax
import numpy as np
import pytest

from lumina_jax import validation
from lumina_jax.errors import InputError
from lumina_jax.train import Trainer, train
from tests.small_data import make_dataset, picture


@pytest.fixture
def config(config):
    config.validation.update(every=3, num_records=10, batch_size=8)
    return config


def validated(config, workdir, state=None):
    trainer = Trainer(config, str(workdir))
    if state is None:
        state, _ = trainer.init_state()
    else:
        state = jax.device_put(jax.device_get(state), trainer.program.shardings)
    with jax.set_mesh(trainer.mesh):
        scalars = trainer.validator(state.ema, state.params)
        again = trainer.validator(state.ema, state.params)
    assert again == scalars  # to the last bit
    assert trainer.validator._losses._cache_size() == 1
    trainer.checkpointer.close()
    return scalars, state


def test_validation_loss_depends_on_neither_mesh_nor_batch_nor_seed(config, tmp_path):
    expected, state = validated(config, tmp_path / "a")
    assert {"validation_loss", "validation_loss_raw", "validation_loss/t0"} <= expected.keys()
    assert expected["validation_loss"] == pytest.approx(
        np.mean([expected[f"validation_loss/t{k}"] for k in range(8)])
    )
    assert expected["validation_loss_raw"] == expected["validation_loss"]  # nothing learned yet
    config.seed = 7
    config.mesh.update(replica=2, data=2, model=2)
    config.validation.batch_size = 4
    found, _ = validated(config, tmp_path / "b", state)
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_run_validates_with_both_weights_and_goes_on_with_the_same_held_out(config, tmp_path):
    train(config, str(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line for line in lines if "validation_loss" in line}
    assert found.keys() == {3, 6}
    assert found[6]["validation_loss"] < found[3]["validation_loss"]
    assert found[6]["validation_loss"] != found[6]["validation_loss_raw"]
    assert lines[-1]["step"] == 6
    config.validation.num_records = 12
    config.train.num_steps = 8
    with pytest.raises(InputError, match="held_out: 10 there, 12 in this run"):
        train(config, str(tmp_path))


@pytest.mark.slow
def test_records_of_a_data_set_of_their_own_with_the_pooled_loss(config, tmp_path):
    make_dataset(tmp_path / "other", [picture(f"{n}") for n in range(8)], keep_duplicates=True)
    config.data.buckets = ("32x32",)
    config.model.patch_size = 2
    config.flow.auxiliary_weight = 1.0
    config.validation.update(directory=str(tmp_path / "other"), num_records=8)
    trainer = Trainer(config, str(tmp_path / "run"))
    assert trainer.loader.num_held_out == 0
    with jax.set_mesh(trainer.mesh):
        state, _ = trainer.init_state()
        scalars = trainer.validator(state.ema, state.params)
    trainer.checkpointer.close()
    assert {f"validation_auxiliary_loss/t{k}" for k in range(8)} <= scalars.keys()
    assert all(np.isfinite(value) for value in scalars.values())


def test_the_mean_is_over_times_of_means_over_records():
    index = np.array([2, -1, 0, 1, 4], np.int32)
    losses = np.array([3.0, 99.0, 1.0, 5.0, 2.0], np.float32)
    found = validation.mean_over_times("x", index, losses, 2)
    assert found == {"x": 3.5, "x/t0": 2.0, "x/t1": 5.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"every": -1}, "validation.every=-1 must be at least 0"),
        ({"num_records": 7}, "validation.num_records=7 must be at least validation.num_times=8"),
        ({"batch_size": 12}, "validation.batch_size=12 does not split over 8.*nearest: 8 and 16"),
        ({"num_records": 24}, "24 records cannot be held out of 24"),
        ({"directory": "/nowhere"}, "/nowhere is not a finished dataset"),
    ],
)
def test_a_validation_that_cannot_work_is_refused(config, tmp_path, changes, message):
    config.validation.update(changes)
    with pytest.raises(InputError, match=message):
        Trainer(config, str(tmp_path))
