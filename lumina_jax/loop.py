"""The loop of a run, whatever is trained: restore, step, report, save, stop.

It asks of a trainer what `Trainer` names, so the model and its autoencoder share it.
"""

import contextlib
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax
from absl import logging
from ml_collections import ConfigDict

from lumina_jax import executables, metrics
from lumina_jax.checkpoint import Checkpointer
from lumina_jax.data.loader import Loader
from lumina_jax.errors import InputError
from lumina_jax.progress import progress_bar
from lumina_jax.train_step import TrainState


@runtime_checkable
class Trainer(Protocol):
    """A run: `loader` makes host batches, `encode` puts one on the mesh, `step` learns from it.

    Attributes:
      config: With the sections `train` and `preview`, and `seed`.
      workdir: Where checkpoints, metrics and pictures go.
      step: step(state, batch, key) -> (state, metrics); metrics hold `loss` and `grad_norm`.
      learning_rate: Of a step, for the log.
      meta: What a checkpoint says of the run.
    """

    config: ConfigDict
    workdir: str
    mesh: jax.sharding.Mesh
    loader: Loader
    step: Callable[[TrainState, Any, jax.Array], tuple[TrainState, dict]]
    learning_rate: Callable[[int], Any]
    checkpointer: Checkpointer
    meta: dict

    def init_state(self) -> tuple[TrainState, int]:
        """The state to begin with, and the index of the first batch."""

    def encode(self, host_batch: dict, index: int) -> Any:
        """What `step` takes of batch `index`; returns before the device is done with it."""

    def preview(self, state: TrainState, step: int, writer: metrics.Writer) -> None:
        """Draws what the model can do so far."""

    def counts(self) -> dict[str, int]:
        """What has been counted since the start, for the log."""

    def flops(self, host_batch: dict) -> float:
        """The operations of a step with this batch, forward and backward, on all devices."""

    def overview(self) -> str:
        """The parameters, as a table."""


def run(trainer: Trainer) -> TrainState:
    """Runs to the end, or to a signal; returns the last state, which is saved."""
    num_steps = trainer.config.train.num_steps
    with contextlib.ExitStack() as stack:
        # On whatever way out: a save that is under way must reach the disk.
        stack.callback(trainer.checkpointer.close)
        state, first = trainer.init_state()
        if first >= num_steps:
            logging.info("Nothing to do: %s has all %d steps.", trainer.workdir, num_steps)
            return state
        if jax.process_index() == 0:
            logging.info("Model:\n%s", trainer.overview())
        writer = stack.enter_context(contextlib.closing(metrics.Writer(trainer.workdir)))
        batches = stack.enter_context(contextlib.closing(trainer.loader.iterate(first)))
        report = Report(trainer, writer)
        stack.enter_context(jax.set_mesh(trainer.mesh))
        state, last = loop(trainer, state, first, batches, report)
    if last < num_steps:
        logging.info("Stopped at step %d, which is saved; the same command goes on there.", last)
        sys.exit(130)
    logging.info("Done: %d steps; the model is in %s.", last, trainer.checkpointer.directory)
    return state


def loop(
    trainer: Trainer, state: TrainState, first: int, batches: Iterator[dict], report: "Report"
) -> tuple[TrainState, int]:
    """Takes batches and steps; returns the last state and how many steps it has seen."""
    config, checkpointer = trainer.config.train, trainer.checkpointer
    preview_every = trainer.config.preview.every
    key = jax.random.key(trainer.config.seed)

    with (
        Stopper() as stopper,
        progress_bar("Training", config.num_steps, first, "steps") as advance,
    ):
        batch = trainer.encode(report.timed_next(batches), first)
        for done in range(first + 1, config.num_steps + 1):
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
                checkpointer.save(state, done, trainer.meta)
            if preview_every and (done % preview_every == 0 or done == config.num_steps):
                report.catch_up()
                began = time.perf_counter()
                trainer.preview(state, done, report.writer)
                report.meter.exclude(time.perf_counter() - began)
            if stop:
                break
        report.close()
    return state, done


class Report:
    """Metrics from the device to the log, one step late, so that the device never waits for them.

    Attributes:
      meter: Gathers steps up to the next line.
      text: The newest loss and speed, for the progress bar.
      writer: Where lines go.
    """

    def __init__(self, trainer: Trainer, writer: metrics.Writer):
        self.meter = metrics.Meter(
            batch_size=trainer.config.train.batch_size,
            peak=metrics.peak_flops(jax.local_devices()[0]) * jax.device_count(),
        )
        self.text = self._speed = ""
        self.writer = writer
        self._trainer = trainer
        self._flops = 0.0  # of the batch that was taken last
        self._pending: tuple[int, dict, float] | None = None
        self._since_line: int | None = None  # the newest step that no line has yet
        self._started = False

    def timed_next(self, batches: Iterator[dict]) -> dict:
        began = time.perf_counter()
        batch = next(batches)
        self.meter.add_input_wait(time.perf_counter() - began)
        self._flops = self._trainer.flops(batch)
        return batch

    def add(self, step: int, step_metrics: dict) -> None:
        """Takes the metrics of a step just begun, and reads those of the step before."""
        self.catch_up()
        self._pending = step, step_metrics, self._flops

    def catch_up(self) -> None:
        """Reads the metrics that are still on the device, which waits for their step."""
        if self._pending is None:
            return
        (step, step_metrics, flops), self._pending = self._pending, None
        loss, grad_norm = self.meter.add(step_metrics, flops)
        if not self._started:
            logging.info("The first step is done. %s", executables.summary())
            self._started = True
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

    def close(self) -> None:
        """Writes what the last full line left over."""
        self.catch_up()
        if self._since_line is not None:
            self._write()

    def _write(self) -> None:
        trainer, step = self._trainer, self._since_line
        scalars = self.meter.flush()
        scalars["learning_rate"] = float(trainer.learning_rate(step - 1))
        scalars |= trainer.counts()
        self.writer.scalars(step, scalars)
        self._since_line = None
        speed = ", {steps_per_second:.2f} steps/s, {images_per_second:.0f} images/s"
        self._speed = speed.format(**scalars)


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
