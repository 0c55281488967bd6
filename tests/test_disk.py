"""How much room checkpoints take, against those that are really written."""

import jax.numpy as jnp
import numpy as np
import pytest

from lumina_jax import checkpoint, disk
from lumina_jax.checkpoint import Checkpointer
from lumina_jax.train_step import TrainState


def test_a_checkpoint_has_the_bytes_of_its_arrays():
    params = {"kernel": jnp.zeros((3, 5)), "scale": jnp.zeros(7, jnp.bfloat16)}
    state = TrainState(jnp.zeros((), jnp.int32), params, params, ())
    assert disk.checkpoint_bytes(state) == 4 + 2 * (60 + 14)


def test_a_checkpoint_on_the_disk_is_about_as_large_as_was_said(tmp_path):
    kernel = jnp.asarray(np.random.default_rng(0).standard_normal((300, 1000)), jnp.float32)
    state = TrainState(jnp.zeros((), jnp.int32), {"kernel": kernel}, {"kernel": kernel}, ())
    checkpointer = Checkpointer(str(tmp_path), keep_latest=1, keep_every=0)
    checkpointer.save(state, 1, {})
    checkpointer.close()
    written = sum(p.stat().st_size for p in (tmp_path / "checkpoints" / "1").rglob("*"))
    assert written == pytest.approx(disk.checkpoint_bytes(state), rel=0.15)


@pytest.mark.parametrize(
    ("every", "latest", "forever", "most"),
    [(1, 1, 0, 2), (2, 2, 4, 4), (3, 3, 0, 4), (10, 2, 5, 1)],
)
def test_no_more_checkpoints_lie_side_by_side_than_was_said(tmp_path, every, latest, forever, most):
    """The second by hand: 4 and 8 are kept for ever, 6 and 8 are the newest, 10 is on its way."""
    said = disk.most_checkpoints(
        10, checkpoint_every=every, keep_checkpoints=latest, keep_checkpoint_every=forever
    )
    checkpointer = Checkpointer(str(tmp_path), keep_latest=latest, keep_every=forever)
    seen = 0
    for step in (*range(every, 10, every), 10):
        kept = checkpoint.find_steps(tmp_path) if step > every else []
        seen = max(seen, len(kept) + 1)
        checkpointer.save(TrainState(jnp.zeros((), jnp.int32), {}, {}, ()), step, {})
        checkpointer.wait()
    checkpointer.close()
    assert seen == said


def test_the_best_ones_are_counted_but_no_checkpoint_twice():
    settings = dict(checkpoint_every=2, keep_checkpoints=2, keep_checkpoint_every=0)
    for best, most in ((0, 3), (1, 4), (9, 5)):
        assert disk.most_checkpoints(10, **settings, keep_best_checkpoints=best) == most


def test_what_is_there_need_not_find_room_again():
    assert disk.needed_bytes(10, 4) == 40
    assert disk.needed_bytes(10, 4, there=3) == 10
    assert disk.needed_bytes(10, 4, there=9) == 10  # the next one is written before one goes


def test_free_room_is_known_of_a_disk_and_not_of_a_bucket(tmp_path):
    assert disk.free_bytes(tmp_path / "not" / "yet") == pytest.approx(
        disk.free_bytes(tmp_path), rel=0.05
    )
    assert disk.free_bytes("gs://bucket/run") is None
    assert disk.existing(tmp_path / "not" / "yet") == tmp_path
