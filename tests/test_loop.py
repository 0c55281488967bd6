"""The loop says how long it waited for data."""

import json
import time

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from lumina_jax import loop, metrics
from lumina_jax.checkpoint import Checkpointer
from lumina_jax.goodput import Account
from lumina_jax.train_step import TrainState

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
            },
        }
    )

    pauses = ()

    def __init__(self, workdir: str):
        self.meta, self.workdir = {}, workdir
        self.checkpointer = Checkpointer(workdir, keep_latest=1, keep_every=10)

    def encode(self, host_batch, index):
        return host_batch

    def step(self, state, batch, key):
        return state, {"loss": np.float32(1), "grad_norm": np.float32(1)}

    def learning_rate(self, step):
        return 0.0

    def counts(self):
        return {}

    def flops(self, host_batch):
        return 1.0


def slow_batches():
    while True:
        time.sleep(NAP)
        yield {}


@pytest.fixture
def trainer(tmp_path):
    trainer = Still(str(tmp_path))
    yield trainer
    trainer.checkpointer.close()


@pytest.fixture
def report(trainer, tmp_path):
    writer = metrics.Writer(str(tmp_path))
    with Account(tmp_path / "goodput.json") as account:
        report = loop.Report(trainer, writer, account)
        yield report
        report.close()
    writer.close()


def test_taking_a_batch_is_time_waited_for_data(report):
    report.timed_next(slow_batches())
    report.meter.add({"loss": np.float32(1), "grad_norm": np.float32(1)}, 1.0)
    scalars = report.meter.flush()
    seconds = 1 / scalars["steps_per_second"]
    assert NAP <= scalars["input_wait"] * seconds <= seconds


def test_the_log_counts_the_wait_for_every_batch(report, trainer, tmp_path):
    state = TrainState(jnp.zeros((), jnp.int32), {}, {}, {})
    loop.loop(trainer, state, 0, slow_batches(), report)
    (line,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    seconds = 2 / line["steps_per_second"]
    assert line["input_wait"] * seconds >= 2 * NAP * 0.9999  # the log has six digits
