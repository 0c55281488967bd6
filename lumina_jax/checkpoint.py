"""Checkpoints: everything a run needs to go on, on any mesh and any number of processes.

    <workdir>/checkpoints/<step>/state   parameters, average, moments, step (sharded arrays)
    <workdir>/checkpoints/<step>/data    the data's whole state: the index of the next batch
    <workdir>/checkpoints/<step>/meta    config, sizes of the model, fingerprint of the data

Orbax writes aside and renames, so a directory with a step's name is whole. Nothing here falls back:
what cannot be restored raises.
"""

import dataclasses
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from lumina_jax.errors import InputError
from lumina_jax.train_step import TrainState

_DIRECTORY = "checkpoints"
_ITEMS = ("state", "data", "meta")
WEIGHTS = ("ema", "params")  # sets of weights that a checkpoint of a run has


class Checkpointer:
    """The checkpoints of one run. Saving returns at once; writing goes on behind the next steps.

    Args:
      workdir: Of the run; any path that Orbax takes.
      keep_latest: How many of the newest to keep.
      keep_every: Keep besides, for ever, those at multiples of this step; 0 keeps none.
    """

    def __init__(self, workdir: str, *, keep_latest: int, keep_every: int):
        policies = [checkpoint_managers.LatestN(keep_latest)]
        if keep_every:
            policies.append(checkpoint_managers.EveryNSteps(keep_every))
        self.directory = epath.Path(workdir).absolute() / _DIRECTORY
        self.directory.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_names=_ITEMS,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies)
            ),
        )

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def reached_preemption(self, step: int) -> bool:
        """Whether the machine was told to stop; the same answer on every process."""
        return self._manager.reached_preemption(step)

    def save(self, state: TrainState, step: int, meta: dict) -> None:
        """Saves `state` as of `step`, once; a step that is already there is left alone."""
        if step != self._manager.latest_step():
            self.write(step, state._asdict(), meta)

    def write(self, step: int, state: dict, meta: dict) -> None:
        """Begins to write a checkpoint."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=ocp.args.JsonSave({"next_batch": step}),
                meta=ocp.args.JsonSave(meta),
            ),
            force=True,
        )

    def restore(
        self, abstract_state: TrainState, shardings: TrainState, meta: dict
    ) -> tuple[TrainState, int]:
        """The newest state, laid out by `shardings`, and the index of the next batch.

        Refuses the state of another model or of another order of the data.
        """
        step = self._manager.latest_step()
        saved = load_meta(self.directory / str(step))
        if saved["data"] is None:
            raise InputError(
                f"{self.directory} holds weights alone, no run to go on with. Name it as "
                f"config.train.init_from and give another --workdir."
            )
        check_same("model", saved["model"], meta["model"], self.directory)
        check_same("data", saved["data"], meta["data"], self.directory)
        # A checkpoint without the entry is from before there was a choice.
        check_same(
            "optimizer", {"name": "adamw"} | saved.get("optimizer", {}), meta["optimizer"],
            self.directory,
        )  # fmt: skip
        target = _target(abstract_state, shardings)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(target._asdict()), data=ocp.args.JsonRestore()
            ),
        )
        return TrainState(**restored["state"]), restored["data"]["next_batch"]

    def is_writing(self) -> bool:
        """Whether the last save is still on its way to the disk."""
        return self._manager.is_saving_in_progress()

    def close(self) -> None:
        """Waits for the last save to be on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def save_weights(workdir: epath.PathLike, params: Any, meta: dict) -> None:
    """A checkpoint of weights alone, from elsewhere: to sample with, or for `train.init_from`."""
    checkpointer = Checkpointer(str(workdir), keep_latest=1, keep_every=0)
    if (step := checkpointer.latest_step()) is not None:
        raise InputError(
            f"{checkpointer.directory} has a checkpoint ({step}) already. Name another folder."
        )
    checkpointer.write(0, {"ema": params}, {**meta, "data": None})
    checkpointer.close()


def weights_meta(model: Any, config: dict) -> dict:
    """What is said beside weights alone.

    Args:
      model: Their sizes, a NextDiTConfig.
      config: The sections `text_encoder`, `autoencoder` and `sampling`, to draw pictures with.
    """
    return {"model": plain(dataclasses.asdict(model)), "config": config}


def plain(tree: dict) -> dict:
    """As JSON would return it, so that what was saved compares equal."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in tree.items()}


def is_run(path: epath.PathLike) -> bool:
    """Whether `path` is the workdir of a run, or of converted weights."""
    return (epath.Path(path) / _DIRECTORY).is_dir()


def find(path: epath.PathLike, step: int | None = None) -> epath.Path:
    """The directory of one checkpoint, given a run's workdir; the newest if no step is named."""
    root = epath.Path(path).absolute()
    directory = root / _DIRECTORY
    if not directory.is_dir():
        raise InputError(
            f"No checkpoint at {root}: it has no directory {_DIRECTORY!r}. Give the --workdir of a "
            f"lumina_jax run."
        )
    steps = sorted(ocp.utils.checkpoint_steps(directory))  # finished ones only
    if not steps:
        raise InputError(f"No checkpoint in {directory} yet. Let the run reach its first save.")
    if step is not None and step not in steps:
        raise InputError(f"No checkpoint of step {step} in {directory}; there are {steps}.")
    return directory / str(steps[-1] if step is None else step)


def load_meta(directory: epath.Path) -> dict:
    """What was saved beside the arrays: config, sizes, fingerprint."""
    if not all((directory / item).is_dir() for item in _ITEMS):
        raise InputError(
            f"{directory} is not a checkpoint of lumina_jax: it needs {', '.join(_ITEMS)} and has "
            f"{sorted(entry.name for entry in directory.iterdir())}."
        )
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        return reader.restore(directory / "meta")


def dtype_of(directory: epath.Path, weights: str) -> str:
    """The type in which a checkpoint keeps one set of weights."""
    return str(jax.tree.leaves(_tree(directory, weights))[0].dtype)


def load_params(
    directory: epath.Path, abstract_params: Any, shardings: Any, *, weights: str
) -> Any:
    """One set of weights of a checkpoint, "ema" or "params"; nothing else is read."""
    if weights not in WEIGHTS:
        raise InputError(f"weights={weights!r} is not one of {', '.join(WEIGHTS)}.")
    _tree(directory, weights)
    return load_part(directory, weights, abstract_params, shardings)


def load_part(directory: epath.Path, name: str, abstract: Any, shardings: Any) -> Any:
    """One part of a state, laid out by `shardings`; nothing else is read."""
    target = {name: _target(abstract, shardings)}
    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        restored = reader.restore(
            directory / "state",
            args=ocp.args.PyTreeRestore(target, restore_args=restore_args, partial_restore=True),
        )
    return restored[name]


def parts(directory: epath.Path) -> dict[str, Any]:
    """Shapes and types of a state on the disk, by part."""
    return ocp.PyTreeCheckpointHandler().metadata(directory / "state").tree


def _tree(directory, weights):
    """Shapes and types of one set of weights on disk."""
    there = parts(directory)
    if weights not in there:
        raise InputError(
            f"{directory} has no weights {weights!r}, only {', '.join(there)}; ask for those."
        )
    return there[weights]


def _target(abstract: Any, shardings: Any) -> Any:
    """What to restore: shapes and types, and where each array goes."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    )


def check_same(what: str, saved: dict, needed: dict, where: epath.Path) -> None:
    """Refuses a checkpoint whose `what` differs, naming every difference."""
    # None of them changes what the arrays mean.
    ignored = ("attention", "dtype", "quantization", "remat")
    differing = [
        f"{key}: {saved.get(key)!r} there, {needed.get(key)!r} in this run"
        for key in sorted(saved.keys() | needed.keys())
        if key not in ignored and saved.get(key) != needed.get(key)
    ]
    if differing:
        raise InputError(
            f"The checkpoint in {where} is of another {what}: {'; '.join(differing)}. Use its own "
            f"settings, or another --workdir (config.train.init_from takes over weights)."
        )
