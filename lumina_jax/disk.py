"""Room on the disk for the checkpoints of a run.

A checkpoint is a whole train state. Side by side lie the newest ones, those that are kept for ever,
and the one that is being written: an old one goes when its successor is whole.
"""

import os
import pathlib
import shutil
from typing import Any

import jax
from etils import epath

from lumina_jax import files


def checkpoint_bytes(abstract_state: Any) -> int:
    """Bytes of one checkpoint of a state, given as arrays or their shapes and types.

    Orbax compresses what it writes, but noise does hardly become smaller: this is an upper bound
    that is nearly reached.
    """
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract_state))


def most_checkpoints(
    num_steps: int,
    *,
    checkpoint_every: int,
    keep_checkpoints: int,
    keep_checkpoint_every: int,
    keep_best_checkpoints: int = 0,
) -> int:
    """How many lie side by side while the last one of a run is written, it included.

    Args:
      num_steps: Of the run, at whose end there is a checkpoint in any case.
      checkpoint_every: Steps from one to the next.
      keep_checkpoints: How many of the newest are kept.
      keep_checkpoint_every: Those at multiples of it are kept for ever; 0: none.
      keep_best_checkpoints: So many are kept besides, which may be any of the others.
    """
    before = range(checkpoint_every, num_steps, checkpoint_every)
    kept = set(before[-keep_checkpoints:])
    if keep_checkpoint_every:
        kept.update(step for step in before if step % keep_checkpoint_every == 0)
    return min(len(kept) + keep_best_checkpoints, len(before)) + 1


def needed_bytes(checkpoint: int, most: int, there: int = 0) -> int:
    """Bytes that a run will still take, the one checkpoint that is being written at the least.

    Args:
      checkpoint: Bytes of one.
      most: How many will lie side by side.
      there: How many of them there are already.
    """
    return checkpoint * max(most - there, 1)


def free_bytes(path: epath.PathLike) -> int | None:
    """Room for files at `path`, which need not exist yet; None where nobody knows, as in a bucket.

    It is what a user may fill; a quota is not seen.
    """
    if files.is_remote(path):
        return None
    return shutil.disk_usage(existing(path)).free


def existing(path: epath.PathLike) -> pathlib.Path:
    """The local `path`, or of the folders around it the nearest that is there."""
    path = pathlib.Path(path).absolute()
    return next(folder for folder in (path, *path.parents) if os.path.exists(folder))
