"""The loop of a run, whatever is trained: restore, step, report, save, stop.

It asks of a trainer what `Trainer` names, so the model and its autoencoder share it.
"""

import contextlib
import dataclasses
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from lumina_jax import checkpoint, disk, distributed, executables, goodput, metrics
from lumina_jax.checkpoint import Checkpointer
from lumina_jax.data.loader import Loader
from lumina_jax.errors import INTERRUPTED, RESTART, InputError, RestartError, is_of_storage
from lumina_jax.lease import Lease
from lumina_jax.profiling import Profiler
from lumina_jax.progress import progress_bar
from lumina_jax.train_step import TrainState
from lumina_jax.watchdog import Watchdog


@dataclasses.dataclass(frozen=True)
class Pause:
    """What a trainer does between two steps, and after the last one.

    Attributes:
      name: Of the class of goodput.py that its time is of.
      every: So many steps; 0 is never.
      run: Called with the state, its step and where to write.
      measures: Whether what it finds belongs to the checkpoint of the step, and so comes before it.
    """

    name: str
    every: int
    run: Callable[[TrainState, int, metrics.Writer], None]
    measures: bool = False

    def due(self, step: int, num_steps: int) -> bool:
        return bool(self.every) and (step % self.every == 0 or step == num_steps)


@runtime_checkable
class Trainer(Protocol):
    """A run: `loader` makes host batches, `encode` puts one on the mesh, `step` learns from it.

    Attributes:
      config: With the section `train`, and `seed`.
      workdir: Where checkpoints, metrics and pictures go.
      step: step(state, batch, key) -> (state, metrics); metrics hold `loss`, `grad_norm`, whether
        the step was `applied`, and of each picture whether its loss is `finite`.
      learning_rate: Of a step, for the log.
      meta: What a checkpoint says of the run.
      pauses: What is done between steps, in this order.
    """

    config: ConfigDict
    workdir: str
    mesh: jax.sharding.Mesh
    loader: Loader
    step: Callable[[TrainState, Any, jax.Array], tuple[TrainState, dict]]
    learning_rate: Callable[[int], Any]
    checkpointer: Checkpointer
    meta: dict
    pauses: Sequence[Pause]

    def init_state(self) -> tuple[TrainState, int]:
        """The state to begin with, and the index of the first batch."""

    def encode(self, host_batch: dict, index: int) -> Any:
        """What `step` takes of batch `index`; returns before the device is done with it."""

    def counts(self) -> dict[str, int]:
        """What has been counted since the start, for the log."""

    def flops(self, host_batch: dict) -> float:
        """The operations of a step with this batch, forward and backward, on all devices."""

    def overview(self) -> str:
        """The parameters, as a table."""


def number_faults(config: ConfigDict) -> list[str]:
    """What in the sections `train` and `preview` would stop the loop, or a division, later."""
    train = config.train
    least = {
        **dict.fromkeys(("num_steps", "batch_size", "log_every", "checkpoint_every"), 1),
        **dict.fromkeys(("keep_checkpoints", "max_skipped_steps"), 1),
        **dict.fromkeys(("keep_checkpoint_every", "hang_timeout"), 0),
    }
    faults = [
        f"train.{name}={train[name]} must be at least {number}"
        for name, number in least.items()
        if train[name] < number
    ]
    if config.preview.every < 0:
        faults.append(f"preview.every={config.preview.every} must not be negative; 0 is never")
    if train.if_damaged not in checkpoint.IF_DAMAGED:
        choices = ", ".join(checkpoint.IF_DAMAGED)
        faults.append(f"train.if_damaged={train.if_damaged!r} is not one of {choices}")
    steps = train.profile_steps
    if steps and not (
        len(steps) == 2 and all(isinstance(s, int) for s in steps) and 0 < steps[0] < steps[1]
    ):
        faults.append(
            f"train.profile_steps={steps} must be (first, last + 1), counted from 1, or ()"
        )
    return faults


def run(trainer: Trainer, *, began: float | None = None) -> TrainState:
    """Runs to the end, or to a signal; returns the last state, which is saved.

    Args:
      trainer: What to run.
      began: When this start of the run began, in seconds since 1970; by default now.
    """
    try:
        return _run(trainer, began)
    except (PermissionError, NotADirectoryError, FileExistsError, IsADirectoryError) as error:
        raise InputError(
            f"{trainer.workdir} cannot be written to ({error}). Give another --workdir."
        ) from error
    except InputError:
        raise
    except Exception as error:
        if not is_of_storage(error):
            raise
        raise RestartError(  # what the run writes besides checkpoints
            f"The storage failed: {error}. Mend it, or make room; the same command goes on from "
            f"the newest checkpoint in {trainer.workdir}."
        ) from error


def _run(trainer: Trainer, began: float | None) -> TrainState:
    train = trainer.config.train
    with contextlib.ExitStack() as stack:
        # First in, last out: a signal must not end the last save.
        stopper = stack.enter_context(Stopper(trainer.checkpointer))
        watchdog = stack.enter_context(Watchdog(trainer.workdir, train.hang_timeout))
        lease = _take(trainer.workdir, stack)
        path = epath.Path(trainer.workdir) / goodput.FILE
        account = stack.enter_context(goodput.Account(path, began=began))
        stack.enter_context(_closing(trainer.checkpointer, account))
        state, first = _begin(trainer, account)
        if first >= train.num_steps:
            logging.info("Nothing to do: %s has all %d steps.", trainer.workdir, train.num_steps)
            return state
        distributed.told_by_first(lambda: _check_room(trainer.workdir, state), 0)
        if jax.process_index() == 0:
            logging.info("Model:\n%s", trainer.overview())
        writer = stack.enter_context(contextlib.closing(metrics.Writer(trainer.workdir)))
        batches = stack.enter_context(contextlib.closing(trainer.loader.iterate(first)))
        report = stack.enter_context(
            contextlib.closing(Report(trainer, writer, account, watchdog, lease))
        )
        stack.enter_context(jax.set_mesh(trainer.mesh))
        state, last, signalled = loop(trainer, state, first, batches, report, stopper)
    if jax.process_index() == 0:
        logging.info("Where the time went: %s", account.table())
    if signalled:
        logging.info("Stopped at step %d, which is saved; the same command goes on there.", last)
        sys.exit(INTERRUPTED if signalled == signal.SIGINT else RESTART)
    logging.info("Done: %d steps; the model is in %s.", last, trainer.checkpointer.directory)
    return state


def _take(workdir: str, stack: contextlib.ExitStack) -> Lease | None:
    """The lease of the workdir, which process 0 holds; no process goes on without."""
    lease = Lease(workdir) if jax.process_index() == 0 else None

    def take():
        stack.enter_context(lease)
        return ()

    distributed.told_by_first(take, 0)
    return lease


def _begin(trainer: Trainer, account: goodput.Account) -> tuple[TrainState, int]:
    """The state to begin with, and the index of the first batch."""
    checkpointer = trainer.checkpointer
    if (step := checkpointer.latest_step()) is None:
        with account.spending("start"):
            return trainer.init_state()
    logging.info("Going on from step %d in %s.", step, checkpointer.directory)
    began = time.perf_counter()
    with account.spending("restore"):
        state, first = jax.block_until_ready(trainer.init_state())
    if jax.process_index() == 0:
        size = checkpointer.num_bytes()
        seconds = time.perf_counter() - began
        logging.info("Read step %d, %.4g GB, in %.3g s.", first, size / 1e9, seconds)
    return state, first


def _check_room(workdir: str, state: TrainState) -> tuple[()]:
    """Refuses to begin what would end at the first save."""
    needed, free = disk.checkpoint_bytes(state), disk.free_bytes(workdir)
    if free is not None and free < needed:
        raise InputError(
            f"A checkpoint of this run takes up to {needed / 1e9:.3g} GB, and where {workdir} lies "
            f"{free / 1e9:.3g} GB are free. Make room, or give a --workdir elsewhere; --dry_run "
            f"says how much the whole run will take."
        )
    return ()


@contextlib.contextmanager
def _closing(checkpointer: Checkpointer, account: goodput.Account) -> Iterator[None]:
    """On whatever way out, a save that is under way reaches the disk."""
    try:
        yield
    except BaseException as ending:
        try:
            with account.spending("save"):
                checkpointer.close()
        except Exception as error:  # why the run ended is said by what ended it
            if str(error) != str(ending):
                logging.error("%s", error)
        raise
    with account.spending("save"):
        checkpointer.close()


def loop(
    trainer: Trainer,
    state: TrainState,
    first: int,
    batches: Iterator[dict],
    report: "Report",
    stopper: "Stopper",
) -> tuple[TrainState, int, int | None]:
    """Takes batches and steps; returns the last state, how many steps it has seen, and the signal.

    The signal is None unless one stopped the run.
    """
    config = trainer.config.train
    key = jax.random.key(trainer.config.seed)
    save_is_due = False

    with progress_bar("Training", config.num_steps, first, "steps") as advance:
        batch = trainer.encode(report.timed_next(batches), first)
        for done in range(first + 1, config.num_steps + 1):
            report.begin(done)
            with jax.profiler.StepTraceAnnotation("train", step_num=done):
                state, step_metrics = trainer.step(state, batch, key)
            # While the device works on this step, read what the last one said, make the next batch.
            report.add(done, step_metrics)
            if done < config.num_steps:
                batch = trainer.encode(report.timed_next(batches), done)
            advance(done, report.text)

            signalled = stopper.signalled(done)
            last = signalled is not None or done == config.num_steps
            save_is_due |= last or done % config.checkpoint_every == 0
            pauses = [p for p in trainer.pauses if p.due(done, config.num_steps)]
            if signalled is not None:
                pauses = []  # there may be little time left
            if save_is_due or pauses:
                report.catch_up()  # what is saved must be known to be sound
            for pause in pauses:
                if pause.measures:
                    report.pause(pause, state)
            # A state that gives no finite loss must not take the place of one that did.
            if save_is_due and (last or not report.num_skipped_in_a_row):
                report.save(state)
                save_is_due = False
            for pause in pauses:
                if not pause.measures:
                    report.pause(pause, state)
            if signalled is not None:
                break
        report.finish()
    return state, done, signalled


class Report:
    """Metrics from the device to the log, one step late, so that the device never waits for them.

    Attributes:
      meter: Gathers steps up to the next line.
      text: The newest loss and speed, for the progress bar.
      writer: Where lines go.
      num_skipped_in_a_row: Steps up to the newest that were not applied.
    """

    def __init__(
        self,
        trainer: Trainer,
        writer: metrics.Writer,
        account: goodput.Account,
        watchdog: Watchdog,
        lease: Lease | None,
    ):
        self.meter = metrics.Meter(
            batch_size=trainer.config.train.batch_size,
            peak=metrics.peak_flops(jax.local_devices()[0]) * jax.device_count(),
        )
        self.text = self._speed = ""
        self.writer = writer
        self.num_skipped_in_a_row = 0
        self._num_skipped = 0
        self._ids: Sequence[str] = ()  # of the records in the batch that was taken last
        self._trainer, self._account = trainer, account
        self._watchdog, self._lease = watchdog, lease
        self._profiler = Profiler(trainer.workdir, trainer.config.train.profile_steps)
        self._flops = 0.0  # of the batch that was taken last
        self._begun = 0  # the newest step
        self._pending: _Pending | None = None
        self._since_line: int | None = None  # the newest step that no line has yet
        self._started = False
        # Waits for steps on the device, to know when each was done whatever the loop does then.
        self._watcher = futures.ThreadPoolExecutor(1, thread_name_prefix="watch_steps")
        self._before = (0.0, 0.0)  # of the step before: when done, and the interruptions until then
        self._saving_since: float | None = None

    def close(self) -> None:
        self._profiler.close()
        self._watcher.shutdown()

    def begin(self, step: int) -> None:
        """What follows belongs to `step`."""
        self._account.begin_step(step)
        self._begun = step
        if self._lease is not None:
            self._lease.check()
        if self._profiler.is_due(step):
            self.catch_up()
            with self._pausing("other"):
                self._profiler.switch(step)

    def timed_next(self, batches: Iterator[dict]) -> dict:
        began = time.perf_counter()
        self._watchdog.advance(self._begun, "waiting for data")
        batch = next(batches)
        self._watchdog.advance(self._begun, "training")
        ended = time.perf_counter()
        self.meter.add_input_wait(ended - began)
        if self._pending is not None and self._pending.finished.done():
            # The device has run dry meanwhile.
            idle = ended - max(began, self._pending.finished.result())
            self._account.move(max(idle, 0.0), "data")
        self._flops, self._ids = self._trainer.flops(batch), [str(i) for i in batch["ids"]]
        return batch

    def add(self, step: int, step_metrics: dict) -> None:
        """Takes the metrics of a step just begun, and reads those of the step before."""
        finished = self._watcher.submit(_time_finished, step_metrics)
        interruptions = self._account.interruptions()
        self.catch_up()
        self._pending = _Pending(
            step, step_metrics, self._ids, self._flops, finished, interruptions
        )

    def catch_up(self) -> None:
        """Reads the metrics that are still on the device, which waits for their step."""
        if self._pending is None:
            return
        step, step_metrics, ids, flops, finished, interruptions = self._pending
        self._pending = None
        step_metrics = jax.device_get(step_metrics)  # all transfers at once
        is_finite = step_metrics.pop("finite")
        self.meter.add(step_metrics, flops)
        if not self._started:
            logging.info("The first step is done. %s", executables.summary())
            self._started = True
        self._add_step_time(step, finished.result(), interruptions)
        self._look_after_save()
        self._since_line = step
        if not step_metrics["applied"]:
            self._skip(step, step_metrics, is_finite, ids)
        else:
            self.num_skipped_in_a_row = 0
        if step % self._trainer.config.train.log_every == 0:
            self._write()
        self.text = f"loss {step_metrics['loss']:.4f}{self._speed}"

    def _skip(
        self, step: int, step_metrics: dict, is_finite: np.ndarray, ids: Sequence[str]
    ) -> None:
        """Counts a step that was not applied; raises after too many of them in a row."""
        self._num_skipped += 1
        self.num_skipped_in_a_row += 1
        config, saved = self._trainer.config.train, self._trainer.checkpointer
        numbers = f"loss {step_metrics['loss']}, gradient's norm {step_metrics['grad_norm']}"
        # Of the global batch these rows are this process's.
        first = jax.process_index() * len(ids)
        records = [i for i, ok in zip(ids, is_finite[first:], strict=False) if not ok]
        which = f" Of these records: {', '.join(records[:8])}." if records else ""
        logging.warning("Step %d is not applied: %s.%s", step, numbers, which)
        if self.num_skipped_in_a_row < config.max_skipped_steps:
            return
        self._write()
        raise InputError(
            f"{self.num_skipped_in_a_row} steps up to step {step} were not applied, one after "
            f"another (config.train.max_skipped_steps): {numbers}.{which} The newest checkpoint is "
            f"of step {saved.newest_here()}, in {saved.directory}. Lower "
            f"config.optim.learning_rate or config.optim.grad_clip, or use "
            f"config.model.dtype=float32, and run again."
        )

    def _look_after_save(self) -> None:
        """Says how long a save took to reach the disk, once it has; raises if it could not."""
        saved = self._trainer.checkpointer
        if self._saving_since is None or saved.is_writing():
            return
        saved.wait()
        self.meter.set("save_write_seconds", time.perf_counter() - self._saving_since)
        self._saving_since = None
        if jax.process_index() == 0:
            with self._spending("save"):
                self.meter.set("checkpoint_bytes", float(saved.num_bytes()))

    def _add_step_time(self, step: int, finished: float, interruptions: float) -> None:
        """From one step's end to the next one's, where nothing else came between."""
        before, self._before = self._before, (finished, interruptions)
        if before[1] == interruptions and before[0]:
            self.meter.add_step_time(step, finished - before[0])

    def save(self, state: TrainState) -> None:
        """Begins to save the state as of the step that was begun last."""
        trainer, step = self._trainer, self._begun
        loss = self.writer.newest(checkpoint.BEST_BY, step)
        if loss is not None and not math.isfinite(loss):
            loss = None  # it is not among the best
        if self._lease is not None:
            self._lease.check(now=True)
        began = time.perf_counter()
        with self._spending("save"):
            trainer.checkpointer.save(state, step, trainer.meta, validation_loss=loss)
        self.meter.set("save_seconds", time.perf_counter() - began)
        self._saving_since = began

    def pause(self, pause: Pause, state: TrainState) -> None:
        """Lets a trainer do something that is not training, with the newest state."""
        with self._pausing(pause.name):
            pause.run(state, self._begun, self.writer)

    @contextlib.contextmanager
    def _pausing(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        with self._spending(name):
            yield
        self.meter.exclude(time.perf_counter() - began)

    @contextlib.contextmanager
    def _spending(self, name: str) -> Iterator[None]:
        self._watchdog.advance(self._begun, name)
        with self._account.spending(name):
            yield
        self._watchdog.advance(self._begun, "training")

    def finish(self) -> None:
        """Writes what the last full line left over."""
        self.catch_up()
        if self._since_line is not None:
            self._write()

    def _write(self) -> None:
        trainer, step = self._trainer, self._since_line
        scalars = self.meter.flush()
        scalars["learning_rate"] = float(trainer.learning_rate(step - 1))
        scalars["skipped_steps"] = self._num_skipped
        scalars |= trainer.counts() | metrics.memory() | self._account.scalars()
        self.writer.scalars(step, scalars)
        self._account.write(step)
        self._profiler.look_for_request(self._begun)
        self._since_line = None
        speed = ", {steps_per_second:.2f} steps/s, {images_per_second:.0f} images/s"
        self._speed = speed.format(**scalars)


class _Pending(NamedTuple):
    """A step whose metrics are still on the device."""

    step: int
    metrics: dict
    ids: Sequence[str]  # of this process's records
    flops: float
    finished: futures.Future  # time.perf_counter() when the device is done with it
    interruptions: float  # seconds, before it was begun


def _time_finished(step_metrics: dict) -> float:
    jax.block_until_ready(step_metrics)
    return time.perf_counter()


class Stopper:
    """Turns the first interrupt or termination into a request; the second one is obeyed at once.

    With several processes a termination of one must stop all of them at the same step, which JAX's
    preemption service agrees on; here only the lone process listens.
    """

    def __init__(self, checkpointer: Checkpointer):
        self._checkpointer = checkpointer
        self._number: int | None = None
        self._old = {}

    def signalled(self, step: int) -> int | None:
        """The signal that asked for an end at this step; the same on every process."""
        if self._number is None and self._checkpointer.reached_preemption(step):
            return signal.SIGTERM
        return self._number

    def __enter__(self):
        if jax.process_count() == 1:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._request)
        return self

    def _request(self, number, frame):
        del frame
        self._number = number
        self.__exit__()
        logging.info("Signal %d: saving after this step. Again, and nothing is saved.", number)

    def __exit__(self, *_):
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}
