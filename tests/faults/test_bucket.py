"""A workdir in a bucket: no renames, no locks, no folders, and three clients that must agree."""

import signal
import subprocess
import sys
import time

import pytest
from etils import epath

from lumina_jax import checkpoint
from lumina_jax.errors import RESTART
from tests.faults.cluster import ROOT
from tests.faults.test_stops import assert_equals_undisturbed


@pytest.fixture
def remote(cluster, bucket, tmp_path):
    cluster.workdir, cluster.logs = epath.Path(bucket) / tmp_path.name, tmp_path
    return cluster


def tool(*arguments: str) -> str:
    command = [sys.executable, "tools/checkpoints.py", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_stops_in_a_bucket_lose_nothing(remote, bucket_server, undisturbed):
    """A kill inside a save, a termination, and a bucket that does not answer for a while."""
    remote.start().trains()
    remote.until(remote.is_saving, 120, "save")
    remote.kill()
    assert remote.is_saving()
    remote.start().trains()
    bucket_server.send_signal(signal.SIGSTOP)
    time.sleep(10)
    bucket_server.send_signal(signal.SIGCONT)
    remote.signal(1, signal.SIGTERM)
    assert remote.wait(120) == [RESTART, RESTART]
    remote.start("--config.train.num_steps=20").finish()
    assert any((remote.workdir / "tensorboard").iterdir())
    assert "lacks what could not be written" not in remote.log()
    assert_equals_undisturbed(remote, undisturbed, 20)


@pytest.mark.slow
def test_a_damaged_checkpoint_in_a_bucket_is_named_and_set_aside(remote, undisturbed):
    remote.start("--config.train.num_steps=15").finish()
    state = checkpoint.find(remote.workdir) / "state"
    largest = max(state.glob("ocdbt.process_1/d/*"), key=lambda path: path.stat().length)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    assert remote.start("--config.train.num_steps=20").wait() == [2, 2]
    assert f"The checkpoint {remote.workdir}/checkpoints/15 is damaged" in remote.log()

    where = f"--workdir={remote.workdir}"
    assert [line.split()[0] for line in tool("list", where).splitlines()[1:]] == ["10", "15"]
    tool("verify", where, "--step=10")
    with pytest.raises(subprocess.CalledProcessError):
        tool("verify", where, "--step=15")
    remote.start("--config.train.num_steps=20", "--config.train.if_damaged=previous").finish()
    assert (remote.workdir / "damaged" / "15" / "state").is_dir()
    assert remote.steps() == [15, 20]
    tool("set_aside", where, "--step=15")
    assert (remote.workdir / "damaged" / "15_2" / "state").is_dir()
    assert remote.steps() == [20]
    assert_equals_undisturbed(remote, undisturbed, 20)
