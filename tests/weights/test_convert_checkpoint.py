"""The command as a user runs it: from the root of the repository, as a file."""

import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from lumina_jax.models.next_dit import NextDiTConfig, abstract_params
from lumina_jax.weights import next_dit

ROOT = pathlib.Path(__file__).parents[2]
MODEL = NextDiTConfig(
    dim=48, num_layers=1, num_refiner_layers=1, num_heads=4, num_kv_heads=2, hidden_dim=64,
    axes_dims=(4, 4, 4), in_channels=4, cap_feat_dim=8,
)  # fmt: skip


def convert(*arguments):
    command = [sys.executable, "tools/convert_checkpoint.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_chain_of_commands_ends_with_the_first_file(tmp_path):
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: rng.standard_normal(x.shape, np.float32), abstract_params(MODEL)
    )
    next_dit.save(tmp_path / "a.safetensors", params, MODEL, format="comfyui")
    for source, target, format in (
        ("a.safetensors", "run", "lumina_jax"),
        ("run", "folder", "diffusers"),
        ("folder", "b.safetensors", "comfyui"),
    ):
        done = convert(
            f"--input={tmp_path / source}", f"--output={tmp_path / target}", f"--format={format}"
        )
        assert done.returncode == 0, done.stderr
        assert f"({format}) written in" in done.stdout
    first, last = (load_file(tmp_path / name) for name in ("a.safetensors", "b.safetensors"))
    assert first.keys() == last.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(last[name], value)


def test_bad_input_is_told_without_a_traceback(tmp_path):
    done = convert("--input=nowhere", f"--output={tmp_path}/x", "--format=official")
    assert done.returncode == 2
    assert "error: No file or folder at" in done.stderr
    assert "Traceback" not in done.stderr
