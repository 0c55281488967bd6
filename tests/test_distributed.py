"""When a process looks for others."""

import pytest

from lumina_jax import distributed
from lumina_jax.errors import InputError


@pytest.fixture
def started(monkeypatch):
    """Arguments of jax.distributed.initialize, which is not called for real."""
    calls = []
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda *args: calls.append(args))
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    return calls


def test_alone_without_any_sign_of_others(started):
    distributed.initialize()
    assert started == []


def test_joined_by_the_three_variables(started, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    monkeypatch.setenv("JAX_PROCESS_ID", "3")
    distributed.initialize()
    assert started == [("host:1234", 4, 3)]


def test_one_of_the_three_variables_is_not_enough(started, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1234")
    with pytest.raises(InputError, match="without JAX_NUM_PROCESSES, JAX_PROCESS_ID"):
        distributed.initialize()


@pytest.mark.parametrize(("tasks", "joins"), [("1", 0), ("2", 1)])
def test_slurm_joins_several_tasks(started, monkeypatch, tasks, joins):
    monkeypatch.setenv("SLURM_NTASKS", tasks)
    distributed.initialize()
    assert len(started) == joins
