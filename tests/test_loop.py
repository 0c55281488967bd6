"""The loop says how long it waited for data, and leaves out steps without a finite loss."""

import itertools
import json
import math
import time

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from lumina_jax import loop, metrics
from lumina_jax.checkpoint import Checkpointer
from lumina_jax.errors import InputError
from lumina_jax.goodput import Account
from lumina_jax.train_step import TrainState
from lumina_jax.watchdog import Watchdog

NAP = 0.05  # seconds, that each batch takes


class Still(loop.Trainer):
    """Trains nothing, for two steps."""

    config = ConfigDict(
        {
            "seed": 0,
            "train": {
                "profile_steps": (),
                "batch_size": 1,
                "num_steps": 2,
                "log_every": 2,
                "checkpoint_every": 2,
                "max_skipped_steps": 2,
            },
        }
    )

    pauses = ()

    def __init__(self, workdir: str):
        self.meta, self.workdir = {}, workdir
        self.losses = itertools.repeat(1.0)
        self.checkpointer = Checkpointer(workdir, keep_latest=1, keep_every=10)

    def encode(self, host_batch, index):
        return host_batch

    def step(self, state, batch, key):
        loss = np.float32(next(self.losses))
        applied = np.isfinite(loss)
        metrics = {"loss": loss, "grad_norm": np.float32(1), "applied": applied}
        return state, {**metrics, "finite": np.array([applied])}

    def learning_rate(self, step):
        return 0.0

    def counts(self):
        return {}

    def flops(self, host_batch):
        return 1.0


def slow_batches():
    while True:
        time.sleep(NAP)
        yield {"ids": ["a"]}


@pytest.fixture
def trainer(tmp_path):
    trainer = Still(str(tmp_path))
    yield trainer
    trainer.checkpointer.close()


@pytest.fixture
def report(trainer, tmp_path):
    writer = metrics.Writer(str(tmp_path))
    with Account(tmp_path / "goodput.json") as account:
        report = loop.Report(trainer, writer, account, Watchdog(tmp_path, 0.0), None)
        yield report
        report.close()
    writer.close()


def test_taking_a_batch_is_time_waited_for_data(report):
    report.timed_next(slow_batches())
    report.meter.add({"loss": np.float32(1), "applied": np.True_}, 1.0)
    scalars = report.meter.flush()
    seconds = 1 / scalars["steps_per_second"]
    assert NAP <= scalars["input_wait"] * seconds <= seconds


def test_the_log_counts_the_wait_for_every_batch(report, trainer, tmp_path):
    state = TrainState(jnp.zeros((), jnp.int32), {}, {}, {})
    loop.loop(trainer, state, 0, slow_batches(), report, loop.Stopper(trainer.checkpointer))
    (line,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    seconds = 2 / line["steps_per_second"]
    assert line["input_wait"] * seconds >= 2 * NAP * 0.9999  # the log has six digits


def run(trainer, report, *losses):
    trainer.losses = iter(losses)
    state = TrainState(jnp.zeros((), jnp.int32), {}, {}, {})
    with trainer.config.unlocked():
        trainer.config.train.num_steps = len(losses)
    batches = itertools.repeat({"ids": ["record a"]})
    return loop.loop(trainer, state, 0, batches, report, loop.Stopper(trainer.checkpointer))


def test_skipped_steps_are_counted_named_and_in_no_mean(report, trainer, tmp_path, caplog):
    run(trainer, report, 1.0, math.nan, 3.0, 5.0)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [1.0, 4.0]
    assert [line["skipped_steps"] for line in lines] == [1, 1]
    assert (
        "Step 2 is not applied: loss nan, gradient's norm 1.0. Of these records: record a."
        in caplog.text
    )


def test_too_many_skipped_steps_in_a_row_end_the_run_without_a_save(report, trainer):
    with pytest.raises(InputError, match=r"2 steps up to step 6 were not applied, .*step 4, in"):
        run(trainer, report, 1.0, 1.0, math.inf, 1.0, math.inf, math.inf, 1.0)


def test_a_save_waits_for_a_step_that_is_applied(report, trainer):
    run(trainer, report, 1.0, math.nan, 1.0, 1.0, 1.0)
    trainer.checkpointer.wait()
    steps = [int(p.name) for p in trainer.checkpointer.directory.iterdir()]
    assert sorted(steps) == [5]  # 3 and 4 were there, of which the newest is kept
