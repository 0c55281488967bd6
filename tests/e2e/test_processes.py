"""Two real processes, joined by jax.distributed on this machine, learn what one process learns."""

import pytest

from tests.faults.cluster import Cluster, running


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(dataset, tmp_path):
    flags = (
        "--config.train.num_steps=4", "--config.train.log_every=1",
        "--config.train.checkpoint_every=2", "--config.preview.every=4",
    )  # fmt: skip
    settings = dict(num_devices=4, flags=flags, config="configs/tiny.py")
    one, two = (Cluster(tmp_path / str(number), dataset, number, **settings) for number in (1, 2))
    for cluster in (two, one):
        with running(cluster):
            cluster.start().finish()
    expected, found = one.losses(), two.losses()
    assert sorted(found) == sorted(expected) == [1, 2, 3, 4]
    for step, (loss, rate) in found.items():
        assert loss == pytest.approx(expected[step][0], rel=1e-4)
        assert rate == expected[step][1]
    assert two.steps() == [2, 4]
    assert (two.workdir / "previews" / "0000004.png").is_file()
