"""Checkpoints: everything a run needs to go on, on any mesh and any number of processes.

    <workdir>/checkpoints/<step>/state   parameters, average, moments, step (sharded arrays)
    <workdir>/checkpoints/<step>/data    the data's whole state: the index of the next batch
    <workdir>/checkpoints/<step>/meta    config, sizes of the model, fingerprint of the data
    <workdir>/checkpoints/<step>/digest  checksums of all three
    <workdir>/damaged/<step>             what was set aside

Orbax marks a checkpoint that is written to the end, and no other one is ever listed. What is read
is compared with the digest (lumina_jax/digest.py), so that a file which is cut, missing or changed
is found however it came about. Nothing here falls back by itself: what cannot be restored raises,
unless the config says that the checkpoint before is to be taken.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import fsspec
import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from lumina_jax import digest, distributed, files
from lumina_jax.errors import (
    DamagedError,
    InputError,
    RestartError,
    causes,
    is_of_storage,
    is_of_store,
    listed,
)
from lumina_jax.train_step import TrainState

_DIRECTORY = "checkpoints"
_DAMAGED = "damaged"
_ITEMS = ("state", "data", "meta", "digest")
WEIGHTS = ("ema", "params")  # sets of weights that a checkpoint of a run has
IF_DAMAGED = ("stop", "previous")
BEST_BY = "validation_loss"
# How a hand-over was asked for is no difference between two runs.
_OF_HAND_OVER = ("train.init_from", "train.init_weights", "train.init_optimizer")
# Settings that may change when a run goes on, and then change what it learns.
_OF_LEARNING = ("optim.", "flow.", "loss.", "model.", "train.num_steps")
FORMAT = 2  # since when there is a digest
_STORAGE = "storage: "  # begins a fault that is none of the checkpoint
_PASSING = (
    "UNAVAILABLE|PERMISSION_DENIED|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|UNAUTHENTICATED|ABORTED"
    "|Too many open files|Permission denied|Forbidden|Input/output error|timed out"
    "|onnection (reset|refused)"
)


class Checkpointer:
    """The checkpoints of one run. Saving returns at once; writing goes on behind the next steps.

    Nothing is touched before the first call of a method, so that a run can take its lease first.

    Args:
      workdir: Of the run; any path that Orbax takes.
      keep_latest: How many of the newest to keep.
      keep_every: Keep besides, for ever, those at multiples of this step; 0 keeps none.
      keep_best: Keep besides so many of those with the lowest validation loss.
      if_damaged: "stop", or "previous": a damaged checkpoint is set aside for the one before.
    """

    def __init__(
        self,
        workdir: str,
        *,
        keep_latest: int,
        keep_every: int,
        keep_best: int = 0,
        if_damaged: str = "stop",
    ):
        self.directory = files.absolute(workdir) / _DIRECTORY
        self._if_damaged = if_damaged
        self._policies = [checkpoint_managers.LatestN(keep_latest)]
        if keep_every:
            self._policies.append(checkpoint_managers.EveryNSteps(keep_every))
        self._best = _Best(self.directory, keep_best)
        self._policies.append(self._best)
        self._writing: int | None = None  # the step that is on its way to the disk
        self._failure: BaseException | None = None  # of this process's part of it

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        self.directory.mkdir(parents=True, exist_ok=True)
        manager = ocp.CheckpointManager(
            self.directory,
            item_names=_ITEMS,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(self._policies),
                cleanup_tmp_directories=True,  # what a killed save left
                # Slow storage is slow; what hangs, the watchdog ends.
                async_options=ocp.options.AsyncOptions(timeout_secs=24 * 3600),
            ),
        )
        self._listen(manager._checkpointer)
        return manager

    def _listen(self, checkpointer: ocp.AsyncCheckpointer) -> None:
        """Has `_failure` known as soon as this process cannot write its part.

        Orbax says it to a thread that then waits for all processes, and they wait for this one: the
        loop would hear of it after a time-out only.
        """
        wait = checkpointer.wait_until_finished

        def wait_and_note():
            try:
                wait()
            except Exception as error:
                self._failure = error
                raise

        checkpointer.wait_until_finished = wait_and_note

    def latest_step(self) -> int | None:
        """The newest step, as process 0 lists it; all processes ask together."""
        manager = self._manager  # which all processes make together

        def find():
            return [-1 if (step := manager.latest_step()) is None else step]

        (step,) = distributed.told_by_first(find, 1)
        return None if step < 0 else step

    def newest_here(self) -> int | None:
        """The newest step that this process knows of."""
        return self._manager.latest_step()

    def reached_preemption(self, step: int) -> bool:
        """Whether the machine was told to stop; the same answer on every process."""
        return self._manager.reached_preemption(step)

    def save(
        self, state: TrainState, step: int, meta: dict, *, validation_loss: float | None = None
    ) -> None:
        """Saves `state` as of `step`, once; a step that is already there is left alone."""
        if step != self._manager.latest_step():
            self.write(step, state._asdict(), meta, validation_loss=validation_loss)

    def write(
        self, step: int, state: dict, meta: dict, *, validation_loss: float | None = None
    ) -> None:
        """Begins to write a checkpoint; raises if the one before could not be written."""
        self.wait()
        meta, data = {"format": FORMAT, **meta}, {"next_batch": step, BEST_BY: validation_loss}
        checksums, strange = digest.make(state, data=data, meta=meta)
        if strange:
            raise InputError(
                f"Step {step} is not saved: not all numbers are finite of {listed(strange, 5)}. "
                f"The newest checkpoint is of step {self.newest_here()}, in {self.directory}. "
                f"Lower config.optim.learning_rate and run again."
            )
        self._best.note(step, validation_loss)
        self._writing = step
        with self._writes():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    data=ocp.args.JsonSave(data),
                    meta=ocp.args.JsonSave(meta),
                    digest=ocp.args.JsonSave(checksums),
                ),
                force=True,
            )

    def restore(
        self, abstract_state: TrainState, shardings: TrainState, meta: dict
    ) -> tuple[TrainState, int]:
        """The newest state, laid out by `shardings`, and the index of the next batch.

        Refuses the state of another model or of another order of the data.
        """
        while True:
            step = self.latest_step()
            try:
                return self._restore(self.directory / str(step), abstract_state, shardings, meta)
            except DamagedError as error:
                if self._if_damaged != "previous" or len(self._manager.all_steps()) < 2:
                    raise
                logging.error("%s", error)
                self._set_aside(step)

    def _restore(self, directory, abstract_state, shardings, meta):
        def read_words():
            return [_read_json(directory, item) for item in ("meta", "data")]

        saved, data = _sound(directory, read_words, together=True)
        check_same_run(saved, meta, self.directory)
        if jax.process_index() == 0 and (changes := describe_changes(saved, meta)):
            logging.info("%s", changes)
        state = _read(directory, _target(abstract_state, shardings)._asdict())
        return TrainState(**state), data["next_batch"]

    def _set_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            logging.error("Set aside as %s.", set_aside(self.directory.parent, step))
        multihost_utils.sync_global_devices(f"set_aside_{step}")
        self._manager.reload()

    def is_writing(self) -> bool:
        """Whether the last save is still on its way to the disk; raises if it cannot be written.

        Where one process's part cannot, it is that one which raises.
        """
        if self._failure is not None:
            raise self._not_written()
        return self._manager.is_saving_in_progress()

    def num_bytes(self) -> int:
        """The size on disk of the newest checkpoint."""
        return num_bytes(self.directory / str(self.newest_here()))

    def wait(self) -> None:
        """Waits for the last save to be on disk; raises a RestartError if it cannot be written."""
        if self._writing is not None:
            while self.is_writing():
                time.sleep(0.02)
            with self._writes():
                self._manager.wait_until_finished()
            self._writing = None

    def close(self) -> None:
        """Waits for the last save to be on disk; raises a RestartError if it cannot be written."""
        self.wait()
        if "_manager" in self.__dict__:
            self._manager.close()

    @contextlib.contextmanager
    def _writes(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            # Whoever waits for the save must not: nobody else may be there to end it.
            self._failure = self._failure or error
            if isinstance(error, Exception):
                raise self._not_written() from None
            raise

    def _not_written(self) -> BaseException:
        """The failure as a RestartError, if it is one of the storage."""
        failure = self._failure
        # TensorStore says "no space left" as a ValueError.
        if not (is_of_storage(failure) or isinstance(failure, ValueError)):
            return failure
        newest = _newest(self.directory)
        if newest == self._writing:
            what = "is whole, but an older one could not be removed"
        else:
            what = "could not be written"
        told = RestartError(
            f"The checkpoint of step {self._writing} {what}: {_first_line(failure)} The newest "
            f"whole one in {self.directory}: {newest}. Mend the storage, or make room; the same "
            f"command goes on from there."
        )
        told.__cause__ = failure
        return told


class _Best(checkpoint_managers.PreservationPolicy):
    """Keeps those with the lowest validation loss."""

    def __init__(self, directory: epath.Path, num: int):
        self._directory, self._num = directory, num
        self._losses: dict[int, float | None] = {}

    def should_preserve(self, checkpoints: Sequence, *, context: Any) -> Sequence[bool]:
        del context
        if not self._num:
            return [False] * len(checkpoints)
        found = {info.step: self._loss(info.step) for info in checkpoints}
        losses = {step: loss for step, loss in found.items() if loss is not None}
        best = sorted(losses, key=lambda step: (losses[step], -step))[: self._num]
        return [info.step in best for info in checkpoints]

    def note(self, step: int, loss: float | None) -> None:
        """Of a checkpoint that cannot be read yet."""
        self._losses[step] = loss

    def _loss(self, step: int) -> float | None:
        if step not in self._losses:
            self._losses[step] = validation_loss(self._directory / str(step))
        return self._losses[step]


def save_weights(workdir: epath.PathLike, params: Any, meta: dict) -> None:
    """A checkpoint of weights alone, from elsewhere: to sample with, or for `train.init_from`."""
    checkpointer = Checkpointer(str(workdir), keep_latest=1, keep_every=0)
    if (step := checkpointer.latest_step()) is not None:
        raise InputError(
            f"{checkpointer.directory} has a checkpoint ({step}) already. Name another folder."
        )
    checkpointer.write(0, {"ema": params}, {**meta, "data": None})
    checkpointer.close()


def set_aside(workdir: epath.PathLike, step: int) -> epath.Path:
    """Moves a checkpoint out of the way of the run, to `<workdir>/damaged/`; returns where to.

    The newest of those that stay is then where the run goes on.
    """
    directory = find(workdir, step)
    target = files.absolute(workdir) / _DAMAGED / str(step)
    number = itertools.count(2)
    while target.exists():
        target = target.with_name(f"{step}_{next(number)}")
    target.parent.mkdir(parents=True, exist_ok=True)
    if files.is_remote(directory):  # a bucket without folders can only copy and remove
        fs, source = fsspec.core.url_to_fs(os.fspath(directory))
        fs.mv(source, fsspec.core.url_to_fs(os.fspath(target))[1], recursive=True)
    else:
        directory.rename(target)
    return target


def num_bytes(directory: epath.Path) -> int:
    """The size of a checkpoint on disk."""
    fs, root = fsspec.core.url_to_fs(os.fspath(directory))
    return fs.du(root)


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
    steps, directory = find_steps(path), files.absolute(path) / _DIRECTORY
    if not steps:
        raise InputError(f"No checkpoint in {directory} yet. Let the run reach its first save.")
    if step is not None and step not in steps:
        raise InputError(f"No checkpoint of step {step} in {directory}; there are {steps}.")
    return directory / str(steps[-1] if step is None else step)


def find_steps(path: epath.PathLike) -> list[int]:
    """The steps of the finished checkpoints in a run's workdir, ascending."""
    root = files.absolute(path)
    directory = root / _DIRECTORY
    if not directory.is_dir():
        raise InputError(
            f"No checkpoint at {root}: it has no directory {_DIRECTORY!r}. Give the --workdir of a "
            f"lumina_jax run."
        )
    return sorted(ocp.utils.checkpoint_steps(directory))


def load_meta(directory: epath.Path) -> dict:
    """What was saved beside the arrays: config, sizes, fingerprint."""
    if not (directory / "state").is_dir() and not (directory / "meta").is_dir():
        raise InputError(
            f"{directory} is not a checkpoint of lumina_jax: it needs {', '.join(_ITEMS)} and has "
            f"{sorted(entry.name for entry in directory.iterdir())}."
        )
    return _sound(directory, lambda: _read_json(directory, "meta"))


def load_data(directory: epath.Path) -> dict:
    """Where the data stand: `next_batch`, an index."""
    return _sound(directory, lambda: _read_json(directory, "data"))


def load_digest(directory: epath.Path) -> dict | None:
    """The checksums of a checkpoint; None if it is from before there were any."""
    return _sound(directory, lambda: _read_digest(directory))


def _read_json(directory: epath.Path, item: str) -> dict:
    """What is said beside the arrays, if it is what was written; else a ValueError or OSError."""
    content, found = _parse(directory / item), _read_digest(directory)
    if found is not None and digest.of_json(content) != found.get(item):
        raise ValueError(f"{directory / item} is not what was written")
    return content


def _read_digest(directory: epath.Path) -> dict | None:
    if _parse(directory / "meta").get("format", 1) < FORMAT:
        return None
    found = _parse(directory / "digest")
    if not digest.is_sound(found):
        raise ValueError(f"{directory / 'digest'} is not what was written")
    return found


def _parse(item: epath.Path) -> dict:
    path = item / "metadata"
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no object")
    return content


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
    return _read(directory, {name: _target(abstract, shardings)})[name]


def _read(directory: epath.Path, target: dict) -> dict:
    """Reads parts of a state, if they are what was written; all processes call it together."""

    def read():
        restored = ocp.PyTreeCheckpointHandler().restore(
            directory / "state",
            args=ocp.args.PyTreeRestore(
                target,
                restore_args=ocp.checkpoint_utils.construct_restore_args(target),
                partial_restore=True,
            ),
        )
        return restored, _read_digest(directory)

    restored, found = _sound(directory, read, together=True)
    if found is not None and (differing := digest.differing(restored, found)):
        raise _damaged(directory, [f"arrays are not what was saved: {listed(differing, 5)}"])
    return restored


def _sound(directory: epath.Path, read: Callable[[], Any], *, together: bool = False) -> Any:
    """What `read` returns; a DamagedError if it finds damage, a RestartError if storage fails.

    If processes read together, all raise what one has met, before anything else that all must do
    together: who failed would not be there.
    """
    fault = found = None
    try:
        found = read()
    except jax.errors.JaxRuntimeError:  # of the devices, such as too little memory
        raise
    except Exception as error:  # Orbax raises what it likes
        fault = f"{_STORAGE if _may_pass(error) else ''}{_first_line(error)}"
    faults = distributed.faults(fault or "") if together else {0: fault} if fault else {}
    if not faults:
        return found
    said = sorted(set(faults.values()))
    if any(fault.startswith(_STORAGE) for fault in said):
        raise RestartError(
            f"The checkpoint {directory} could not be read: {'; '.join(said)}. That may pass: the "
            f"same command tries again."
        )
    raise _damaged(directory, said)


def _may_pass(error: Exception) -> bool:
    """Whether an error says nothing of the file: it may be whole, but cannot be had now."""
    kinds = (PermissionError, TimeoutError, ConnectionError, MemoryError)
    return any(
        isinstance(e, kinds) or is_of_store(e) or re.search(_PASSING, str(e)) for e in causes(error)
    )


def _damaged(directory: epath.Path, faults: Sequence[str]) -> DamagedError:
    workdir, step = directory.parent.parent, directory.name
    others = [str(n) for n in find_steps(workdir) if str(n) != step]
    return DamagedError(
        f"The checkpoint {directory} is damaged: {'; '.join(faults)}. Nothing was changed. Others: "
        f"{', '.join(others) or 'none'}. Copy it anew from where it is whole; or go on from the "
        f"one before with `python tools/checkpoints.py set_aside --workdir={workdir} "
        f"--step={step}`, or always with config.train.if_damaged=previous."
    )


def _first_line(error: BaseException) -> str:
    """What the first of a chain of errors says, such as TensorStore of a file."""
    *_, first = causes(error)
    return str(first).strip().split("\n")[0][:600] or type(first).__name__


def _newest(directory: epath.Path) -> int | str:
    """The newest step there, or a word for why there is none to tell."""
    try:
        steps = sorted(ocp.utils.checkpoint_steps(directory)) if directory.is_dir() else []
    except Exception:  # the storage has just failed
        return "not known"
    return steps[-1] if steps else "none"


def verify(directory: epath.Path) -> None:
    """Reads everything in a checkpoint, a part at a time, on one device; raises a DamagedError."""
    load_meta(directory), load_data(directory)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    try:
        trees = parts(directory)
    except Exception as error:  # Orbax raises what it likes
        raise _damaged(directory, [_first_line(error)]) from error
    for name, tree in trees.items():
        load_part(directory, name, tree, jax.tree.map(lambda _: device, tree))


def validation_loss(directory: epath.Path) -> float | None:
    """The validation loss at a checkpoint; None if it was not measured, or cannot be read."""
    try:
        return _read_json(directory, "data").get(BEST_BY)
    except (OSError, ValueError):
        return None


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


def check_same_run(saved: dict, meta: dict, where: epath.Path) -> None:
    """Refuses to go on with a run of another model, order of the data or optimizer."""
    if saved["data"] is None:
        raise InputError(
            f"{where} holds weights alone, no run to go on with. Name it as "
            f"config.train.init_from and give another --workdir."
        )
    check_same("model", saved["model"], meta["model"], where)
    check_same("data", saved["data"], meta["data"], where)
    # A checkpoint without the entry is from before there was a choice.
    optimizer = {"name": "adamw"} | saved.get("optimizer", {})
    check_same("optimizer", optimizer, meta["optimizer"], where)


def describe_changes(saved: dict, meta: dict) -> str:
    """The settings that differ from those the checkpoint was written with; "" if none does."""
    changes = differences(saved["config"], meta["config"])
    learning = [line for line in changes if line.startswith(_OF_LEARNING)]
    parts = {
        "Since the checkpoint these settings have changed, and with them what is learned from here":
            learning,
        "Since the checkpoint these settings have changed, which learning does not depend on but "
        "for rounding": [line for line in changes if line not in learning],
    }  # fmt: skip
    return "\n".join("\n  ".join([f"{title}:", *lines]) for title, lines in parts.items() if lines)


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


def differences(saved: dict, config: dict) -> list[str]:
    """Settings that differ, one a line, of the sections that both have.

    Converted weights know three sections only; a key that one side does not have is absent there.
    """
    both = saved.keys() & config.keys()
    there, here = (
        # As JSON returns it: a tuple is a list.
        dict(_flat(json.loads(json.dumps({name: side[name] for name in both}))))
        for side in (saved, config)
    )
    return [
        f"{key}: {there.get(key, 'absent')!r} there, {here.get(key, 'absent')!r} here"
        for key in sorted(there.keys() | here.keys())
        if key not in _OF_HAND_OVER and there.get(key) != here.get(key)
    ]


def _flat(tree: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
