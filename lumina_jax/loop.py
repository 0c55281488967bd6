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
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from lumina_jax import executables, goodput, metrics
from lumina_jax.checkpoint import Checkpointer
from lumina_jax.data.loader import Loader
from lumina_jax.errors import InputError
from lumina_jax.profiling import Profiler
from lumina_jax.progress import progress_bar
from lumina_jax.train_step import TrainState


@dataclasses.dataclass(frozen=True)
class Pause:
    """What a trainer does between two steps, and after the last one.

    Attributes:
      name: Of the class of goodput.py that its time is of.
      every: So many steps; 0 is never.
      run: Called with the state, its step and where to write.
    """

    name: str
    every: int
    run: Callable[[TrainState, int, metrics.Writer], None]

    def due(self, step: int, num_steps: int) -> bool:
        return bool(self.every) and (step % self.every == 0 or step == num_steps)


@runtime_checkable
class Trainer(Protocol):
    """A run: `loader` makes host batches, `encode` puts one on the mesh, `step` learns from it.

    Attributes:
      config: With the section `train`, and `seed`.
      workdir: Where checkpoints, metrics and pictures go.
      step: step(state, batch, key) -> (state, metrics); metrics hold `loss` and `grad_norm`.
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


def run(trainer: Trainer, *, began: float | None = None) -> TrainState:
    """Runs to the end, or to a signal; returns the last state, which is saved.

    Args:
      trainer: What to run.
      began: When this start of the run began, in seconds since 1970; by default now.
    """
    num_steps = trainer.config.train.num_steps
    with contextlib.ExitStack() as stack:
        path = epath.Path(trainer.workdir) / goodput.FILE
        account = stack.enter_context(goodput.Account(path, began=began))
        # On whatever way out: a save that is under way must reach the disk.
        stack.callback(_close, trainer.checkpointer, account)
        resumes = trainer.checkpointer.latest_step() is not None
        with account.spending("restore" if resumes else "start"):
            state, first = trainer.init_state()
        if first >= num_steps:
            logging.info("Nothing to do: %s has all %d steps.", trainer.workdir, num_steps)
            return state
        if jax.process_index() == 0:
            logging.info("Model:\n%s", trainer.overview())
        writer = stack.enter_context(contextlib.closing(metrics.Writer(trainer.workdir)))
        batches = stack.enter_context(contextlib.closing(trainer.loader.iterate(first)))
        report = stack.enter_context(contextlib.closing(Report(trainer, writer, account)))
        stack.enter_context(jax.set_mesh(trainer.mesh))
        state, last = loop(trainer, state, first, batches, report)
    if jax.process_index() == 0:
        logging.info("Where the time went: %s", account.table())
    if last < num_steps:
        logging.info("Stopped at step %d, which is saved; the same command goes on there.", last)
        sys.exit(130)
    logging.info("Done: %d steps; the model is in %s.", last, trainer.checkpointer.directory)
    return state


def _close(checkpointer: Checkpointer, account: goodput.Account) -> None:
    with account.spending("save"):
        checkpointer.close()


def loop(
    trainer: Trainer, state: TrainState, first: int, batches: Iterator[dict], report: "Report"
) -> tuple[TrainState, int]:
    """Takes batches and steps; returns the last state and how many steps it has seen."""
    config, checkpointer = trainer.config.train, trainer.checkpointer
    key = jax.random.key(trainer.config.seed)

    with (
        Stopper() as stopper,
        progress_bar("Training", config.num_steps, first, "steps") as advance,
    ):
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

            stop = stopper.requested or checkpointer.reached_preemption(done)
            last = stop or done == config.num_steps
            if last or done % config.checkpoint_every == 0:
                report.catch_up()  # what is saved must be known to be sound
                with report.saving():
                    checkpointer.save(state, done, trainer.meta)
            for pause in trainer.pauses:
                if pause.due(done, config.num_steps):
                    report.catch_up()
                    with report.pausing(pause.name):
                        pause.run(state, done, report.writer)
            if stop:
                break
        report.finish()
    return state, done


class Report:
    """Metrics from the device to the log, one step late, so that the device never waits for them.

    Attributes:
      meter: Gathers steps up to the next line.
      text: The newest loss and speed, for the progress bar.
      writer: Where lines go.
    """

    def __init__(self, trainer: Trainer, writer: metrics.Writer, account: goodput.Account):
        self.meter = metrics.Meter(
            batch_size=trainer.config.train.batch_size,
            peak=metrics.peak_flops(jax.local_devices()[0]) * jax.device_count(),
        )
        self.text = self._speed = ""
        self.writer = writer
        self._trainer, self._account = trainer, account
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
        if self._profiler.is_due(step):
            self.catch_up()
            with self.pausing("other"):
                self._profiler.switch(step)

    def timed_next(self, batches: Iterator[dict]) -> dict:
        began = time.perf_counter()
        batch = next(batches)
        ended = time.perf_counter()
        self.meter.add_input_wait(ended - began)
        if self._pending is not None and self._pending.finished.done():
            # The device has run dry meanwhile.
            idle = ended - max(began, self._pending.finished.result())
            self._account.move(max(idle, 0.0), "data")
        self._flops = self._trainer.flops(batch)
        return batch

    def add(self, step: int, step_metrics: dict) -> None:
        """Takes the metrics of a step just begun, and reads those of the step before."""
        finished = self._watcher.submit(_time_finished, step_metrics)
        interruptions = self._account.interruptions()
        self.catch_up()
        self._pending = _Pending(step, step_metrics, self._flops, finished, interruptions)

    def catch_up(self) -> None:
        """Reads the metrics that are still on the device, which waits for their step."""
        if self._pending is None:
            return
        step, step_metrics, flops, finished, interruptions = self._pending
        self._pending = None
        loss, grad_norm = self.meter.add(step_metrics, flops)
        if not self._started:
            logging.info("The first step is done. %s", executables.summary())
            self._started = True
        self._add_step_time(step, finished.result(), interruptions)
        if self._saving_since and not self._trainer.checkpointer.is_writing():
            self.meter.set("save_write_seconds", time.perf_counter() - self._saving_since)
            self._saving_since = None
        self._since_line = step
        sound = math.isfinite(loss) and math.isfinite(grad_norm)
        if not sound or step % self._trainer.config.train.log_every == 0:
            self._write()
        self.text = f"loss {loss:.4f}{self._speed}"
        if not sound:
            saved = self._trainer.checkpointer
            raise InputError(
                f"At step {step} the loss is {loss} and the gradient's norm {grad_norm}. The "
                f"newest checkpoint is of step {saved.latest_step()}, in {saved.directory}. Lower "
                f"config.optim.learning_rate or config.optim.grad_clip, or use "
                f"config.model.dtype=float32, and run again."
            )

    def _add_step_time(self, step: int, finished: float, interruptions: float) -> None:
        """From one step's end to the next one's, where nothing else came between."""
        before, self._before = self._before, (finished, interruptions)
        if before[1] == interruptions and before[0]:
            self.meter.add_step_time(step, finished - before[0])

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        began = time.perf_counter()
        with self._account.spending("save"):
            yield
        self.meter.set("save_seconds", time.perf_counter() - began)
        self._saving_since = began

    @contextlib.contextmanager
    def pausing(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        with self._account.spending(name):
            yield
        self.meter.exclude(time.perf_counter() - began)

    def finish(self) -> None:
        """Writes what the last full line left over."""
        self.catch_up()
        if self._since_line is not None:
            self._write()

    def _write(self) -> None:
        trainer, step = self._trainer, self._since_line
        scalars = self.meter.flush()
        scalars["learning_rate"] = float(trainer.learning_rate(step - 1))
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
    flops: float
    finished: futures.Future  # time.perf_counter() when the device is done with it
    interruptions: float  # seconds, before it was begun


def _time_finished(step_metrics: dict) -> float:
    jax.block_until_ready(step_metrics)
    return time.perf_counter()


class Stopper:
    """Turns the first interrupt or termination into a request; the second one is obeyed at once.

    With several processes a signal to one must stop them all at the same step, which Orbax agrees
    on (`reached_preemption`); here only the lone process listens.
    """

    def __init__(self):
        self.requested = False
        self._old = {}

    def __enter__(self):
        if jax.process_count() == 1:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._request)
        return self

    def _request(self, number, frame):
        del frame
        self.requested = True
        self.__exit__()
        logging.info("Signal %d: saving after this step. Again, and nothing is saved.", number)

    def __exit__(self, *_):
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}
