"""launch/stages.sh: three stages, one after another, stopped and gone on with."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import optax
import pytest

from configs.rehearsal import NUM_STEPS
from lumina_jax import checkpoint, sharding
from lumina_jax.data.buckets import Bucket
from lumina_jax.models.next_dit import NextDiTConfig, abstract_params
from tests.conftest import EMOJIS
from tests.small_data import make_emojis

ROOT = pathlib.Path(__file__).parents[2]


def start(*arguments, **environment):
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "STAGES": " ".join(f"configs/rehearsal.py:{stage}" for stage in NUM_STEPS),
        "JAX_COMPILATION_CACHE_DIR": os.environ["LUMINA_JAX_TEST_CACHE"],
        **environment,
    }
    return subprocess.Popen(
        ["launch/stages.sh", *map(str, arguments)], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(process, status):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == status, output
    return output


def steps(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def norm_of_average(workdir):
    directory = checkpoint.find(workdir)
    saved = checkpoint.load_meta(directory)["model"]
    model = NextDiTConfig(**{**saved, "axes_dims": tuple(saved["axes_dims"])})
    mesh = sharding.make_mesh(replica=1, data=1, model=1, devices=jax.devices()[:1])
    params = abstract_params(model)
    shardings = sharding.tree_shardings(params, mesh)
    params = checkpoint.load_params(directory, params, shardings, weights="ema")
    return float(jax.jit(optax.tree.norm)(params))


@pytest.mark.slow
def test_three_stages_follow_one_another_and_go_on_where_they_were_stopped(dataset, tmp_path):
    small, best = tmp_path / "small", tmp_path / "best"
    make_emojis(small, EMOJIS, (Bucket(16, 16),))
    make_emojis(best, EMOJIS[:6], (Bucket(32, 32),))
    arguments = [tmp_path, small, dataset, best, "--config.train.keep_checkpoints=1"]
    stage1, stage2, stage3 = (tmp_path / f"stage{number}" for number in (1, 2, 3))

    process = start(*arguments)
    while process.poll() is None and not (stage2 / "metrics.jsonl").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output = finish(process, 75)
    assert steps(stage1) == [1, 2]
    assert f"Hand-over from {stage1}/checkpoints/2, step 2 of 2:" in output
    assert f"norm {norm_of_average(stage1):.6g}\n" in output
    for line in (
        "fresh: moments of zero",
        "from its beginning: learning rate 0.001 at step 0",
        "from batch 0; the step is 0",
        "data.resolution: 16 there, 32 here",
        "flow.auxiliary_weight: 0.0 there, 1.0 here",
    ):
        assert line in output
    assert checkpoint.load_meta(checkpoint.find(stage2))["config"]["train"]["keep_checkpoints"] == 1
    assert not stage3.exists()

    output = finish(start(*arguments), 0)
    assert f"Nothing to do: {stage1} has all 2 steps" in output
    assert f"Hand-over from {stage1}" not in output
    last = NUM_STEPS["2"]
    assert f"Hand-over from {stage2}/checkpoints/{last}, step {last} of {last}:" in output
    assert f"norm {norm_of_average(stage2):.6g}\n" in output
    assert steps(stage2) == [*range(1, last + 1)]  # as if it had not been stopped
    assert steps(stage3) == [*range(1, NUM_STEPS["3"] + 1)]


@pytest.mark.slow
def test_a_stage_that_fails_ends_the_chain(dataset, tmp_path):
    output = finish(start(tmp_path, "/nowhere", dataset, dataset), 2)
    assert "/nowhere is not a finished dataset" in output
    assert not (tmp_path / "stage2").exists()


def test_a_wrong_call_is_told_how_to_call():
    assert "launch/stages.sh WORKDIR DATA1 DATA2 DATA3" in finish(start("runs"), 2)
    assert "first stage whose exit status is not 0" in finish(start("--help"), 0)
    assert "needed: three configs" in finish(start("w", "a", "b", "c", STAGES="one.py"), 2)
    assert "PYTHON=/no/python is not a program" in finish(
        start("w", "a", "b", "c", PYTHON="/no/python"), 2
    )
