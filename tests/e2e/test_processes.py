"""Two real processes, joined by jax.distributed on this machine, learn what one process learns."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]


def start(dataset, workdir, devices, **environment):
    command = [
        sys.executable, "-m", "lumina_jax.train", "--config=configs/tiny.py",
        f"--workdir={workdir}", f"--config.data.directory={dataset}",
        "--config.train.num_steps=4", "--config.train.log_every=1",
        "--config.train.checkpoint_every=2", "--config.preview.every=4",
    ]  # fmt: skip
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), **environment}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(processes):
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output.decode()


def losses(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(dataset, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    together = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    finish(
        [
            start(dataset, tmp_path / "two", 2, **together, JAX_PROCESS_ID=str(index))
            for index in range(2)
        ]
    )
    finish([start(dataset, tmp_path / "one", 4)])
    assert len(losses(tmp_path / "two")) == 4
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4)
    assert (tmp_path / "two" / "checkpoints" / "4").is_dir()
    assert (tmp_path / "two" / "previews" / "0000004.png").is_file()
