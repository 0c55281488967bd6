"""What the tests of faults share: fault libraries, and runs that nothing happened to."""

import pytest

from tests.faults.cluster import SECRET, Cluster, build_shim, running

NUM_STEPS = 160


@pytest.fixture(scope="session")
def flags(tmp_path_factory):
    """Of every run here. With a constant schedule a shorter run is part of a longer one."""
    cache = tmp_path_factory.mktemp("compiled")
    return [
        f"--config.compile.cache_directory={cache}",
        "--config.optim.schedule=constant",
        "--config.train.checkpoint_every=5",
        "--config.train.keep_checkpoint_every=20",
        f"--config.train.num_steps={NUM_STEPS}",
    ]


@pytest.fixture
def cluster(tmp_path, dataset, flags):
    """Two processes with four devices each; whatever happens to them, they tell no secret."""
    with running(Cluster(tmp_path / "run", dataset, flags=flags)) as cluster:
        yield cluster
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    assert cluster.log_path(0) in files


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, dataset, flags):
    """The same run with nothing but its end."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    with running(Cluster(workdir, dataset, flags=flags)) as cluster:
        yield cluster.start().finish(timeout=900)


@pytest.fixture(scope="session")
def shim(tmp_path_factory):
    return build_shim(tmp_path_factory.mktemp("shim"))


@pytest.fixture
def faulty(cluster, shim, tmp_path):
    """The cluster with files that steer its faults: see shim.c."""
    steer = {name: tmp_path / name for name in ("slow", "full", "clock")}
    cluster.environment = {
        "LD_PRELOAD": str(shim),
        "FAULT_PATH": f"{cluster.workdir}/",  # and not the logs beside it
        "FAULT_SLOW": str(steer["slow"]),
        "FAULT_FULL": str(steer["full"]),
        "FAULT_CLOCK": str(steer["clock"]),
    }
    return cluster, steer
