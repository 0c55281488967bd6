"""Batches that give no finite loss: they are not learned from, and a run goes on around them."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lumina_jax.loop import Report
from lumina_jax.train import Trainer, train
from tests import small_run

POISONED = 2  # the index of a batch: that of step 3


@pytest.fixture
def config(dataset):
    config = small_run.get_config()
    config.data.directory = str(dataset)
    config.train.num_steps = 5
    return config


@pytest.fixture(params=[np.nan, np.inf])
def poison(request, monkeypatch):
    """One number of one picture, as a damaged cache of latents would bring it."""
    init = Trainer.__init__

    def init_and_poison(trainer, *args):
        init(trainer, *args)
        sound = trainer.encode

        def encode(host_batch, index):
            batch = sound(host_batch, index)
            if index != POISONED:
                return batch
            put = jax.jit(
                lambda x: x.at[1, 0, 0].set(request.param),
                out_shardings=batch.image.tokens.sharding,
            )
            return batch._replace(image=batch.image._replace(tokens=put(batch.image.tokens)))

        trainer.encode = encode

    monkeypatch.setattr(Trainer, "__init__", init_and_poison)


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_poisoned_batch_is_passed_over_and_its_record_named(poison, config, tmp_path, caplog):
    trainer = Trainer(config, str(tmp_path / "ids"))
    record = trainer.loader.batch_at(POISONED)["ids"][1]
    state = train(config, str(tmp_path / "run"))
    assert f"Step 3 is not applied: loss nan, gradient's norm nan. Of these records: {record}." in (
        caplog.text
    )
    assert [("loss" in line, line["skipped_steps"]) for line in lines(tmp_path / "run")] == [
        (True, 0), (True, 0), (False, 1), (True, 1), (True, 1)
    ]  # fmt: skip
    assert int(state.step) == 5
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(state.params))


@pytest.mark.slow
def test_a_run_stopped_at_a_poisoned_batch_goes_on_bit_for_bit(
    poison, config, tmp_path, monkeypatch
):
    whole = train(config, str(tmp_path / "whole"))
    read = Report.catch_up

    def read_and_terminate(report):
        if report._pending and report._pending[0] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        read(report)

    with monkeypatch.context() as patch:
        patch.setattr(Report, "catch_up", read_and_terminate)
        with pytest.raises(SystemExit):
            train(config, str(tmp_path / "parts"))
    jax.tree.map(np.testing.assert_array_equal, train(config, str(tmp_path / "parts")), whole)
