"""The benchmark of training steps, whole, on a processor."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parity
def test_both_sides_take_their_turns_in_any_order():
    pytest.importorskip("diffusers")
    done = subprocess.run(
        [
            sys.executable, "tools/benchmark_training.py", "--config=configs/stage1.py",
            "--config.model.preset=tiny", "--config.train.batch_size=1", "--rounds=1", "--steps=1",
            "--nocompile", "--side=torch", "--side=lumina_jax",
        ],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    theirs, ours, ratio = done.stdout.splitlines()[-3:]
    seconds = [
        float(re.match(rf"{side}: (\S+) s a step", line)[1])
        for side, line in (("torch", theirs), ("lumina_jax", ours))
    ]
    told = float(re.match(r"lumina_jax is (\S+) times as fast", ratio)[1])
    assert told == pytest.approx(seconds[0] / seconds[1], rel=0.05)
