"""What a run says of itself: losses, speed, and how much of the machine it uses.

images_per_second    over the wall time since the line before
mfu                  model FLOPs a second (analytic, no recomputation) over the devices' peak
input_wait           part of the time that the loop stood waiting for data
loss_bins/00 .. 19   mean loss in twenty equal bins of t, since the line before
step_seconds_*       from the end of one step on the device to that of the next

docs/training.md has the whole list.
"""

import collections
import contextlib
import itertools
import json
import math
import pathlib
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary

from lumina_jax import files

# Peak bfloat16 FLOP/s of one device, from the makers' data sheets. The key is part of device_kind.
_PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
}

# A slow step takes so many times the median of the recent ones; so many are told of in a line.
_SLOW, _NUM_RECENT, _MAX_WARNINGS = 3.0, 200, 3


def peak_flops(device: jax.Device) -> float:
    """Peak FLOP/s of one device: published where known, else measured on a matrix product."""
    for kind, peak in _PEAK_FLOPS.items():
        if kind in device.device_kind:
            return peak
    size = 1024
    matrix = jax.device_put(jnp.ones((size, size)), device)
    product = jax.jit(jnp.matmul)
    product(matrix, matrix).block_until_ready()
    seconds = min(_seconds(lambda: product(matrix, matrix).block_until_ready()) for _ in range(5))
    # Emulated devices share the processor whose whole speed was measured.
    peak = 2 * size**3 / seconds / jax.local_device_count()
    logging.info("No published peak for %s; measured %.3g FLOP/s.", device.device_kind, peak)
    return peak


def memory() -> dict[str, float]:
    """Memory of the fullest local device; nothing where the backend does not tell, as a processor.

    hbm_bytes_in_use is of now, hbm_peak_share the most so far, of what the program may have.
    """
    found = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    if not found:
        return {}
    return {
        "hbm_bytes_in_use": max(stats["bytes_in_use"] for stats in found),
        "hbm_peak_share": max(s["peak_bytes_in_use"] / s["bytes_limit"] for s in found),
    }


def _seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Meter:
    """Gathers the steps between two lines of the log.

    Args:
      batch_size: Pictures in a step.
      peak: FLOP/s of all devices together.
    """

    def __init__(self, *, batch_size: int, peak: float):
        self._batch_size = batch_size
        self._peak = peak
        self._recent = collections.deque[float](maxlen=_NUM_RECENT)  # seconds of steps
        self._num_slow = 0
        self._start()

    def _start(self):
        self._steps: list[dict[str, np.ndarray]] = []
        self._num_steps = 0
        self._flops = 0.0
        self._input_wait = 0.0
        self._step_seconds: list[float] = []
        self._num_warnings = 0
        self._extra: dict[str, float] = {}
        self._since = time.perf_counter()

    def add_input_wait(self, seconds: float) -> None:
        self._input_wait += seconds

    def add_step_time(self, step: int, seconds: float) -> None:
        """Takes how long a step took; says so where it was slow."""
        self._step_seconds.append(seconds)
        median = float(np.median(self._recent)) if self._recent else 0.0
        if len(self._recent) >= _NUM_RECENT // 10 and seconds > _SLOW * median:
            self._num_slow += 1
            self._num_warnings += 1
            if self._num_warnings <= _MAX_WARNINGS:
                logging.warning(
                    "Step %d took %.3g s, %.1f times the median.", step, seconds, seconds / median
                )
        self._recent.append(seconds)

    def set(self, name: str, value: float) -> None:
        """A scalar of the next line alone."""
        self._extra[name] = value

    def exclude(self, seconds: float) -> None:
        """Leaves out time that was not training, such as drawing sample pictures."""
        self._since += seconds

    def add(self, step_metrics: dict[str, Any], flops: float) -> None:
        """Takes the metrics of one step, off the device; those of a skipped one are in no mean.

        `flops` are those of the model in this step, see `next_dit.forward_flops`.
        """
        self._flops += flops
        self._num_steps += 1
        if step_metrics["applied"]:
            self._steps.append({k: v for k, v in step_metrics.items() if k != "applied"})

    def flush(self) -> dict[str, float]:
        """The scalars of the steps since the last call."""
        seconds, steps = time.perf_counter() - self._since, self._steps
        scalars: dict[str, float] = {}
        for name in steps[0] if steps else ():
            values = np.stack([step[name] for step in steps])
            if name.endswith("_bins_sum"):
                scalars |= _bin_means(name.removesuffix("_sum"), values, steps)
            elif not name.endswith("_bins_count"):
                scalars[name] = float(values.mean())
        scalars["steps_per_second"] = self._num_steps / seconds
        scalars["images_per_second"] = self._num_steps * self._batch_size / seconds
        scalars["mfu"] = self._flops / seconds / self._peak
        scalars["input_wait"] = self._input_wait / seconds
        if self._step_seconds:
            scalars["step_seconds_median"] = float(np.median(self._step_seconds))
            scalars["step_seconds_max"] = max(self._step_seconds)
        scalars["slow_steps"] = self._num_slow
        scalars |= self._extra
        self._start()
        return scalars


def _bin_means(name, sums, steps):
    sums = sums.sum(axis=0)
    counts = sum(step[f"{name}_count"] for step in steps)
    return {f"{name}/{i:02d}": float(sums[i] / counts[i]) for i in np.flatnonzero(counts)}


class Writer:
    """Writes scalars as JSON lines and for TensorBoard; only on the first process."""

    def __init__(self, workdir: str):
        self._newest: dict[str, tuple[int, float]] = {}
        self._active = jax.process_index() == 0
        if self._active:
            path = epath.Path(workdir)
            path.mkdir(parents=True, exist_ok=True)
            self._path = path / "metrics.jsonl"
            self._lines = self._path.read_text() if self._path.exists() else ""
            self._board = _Board(str(path / "tensorboard"))

    def newest(self, name: str, step: int) -> float | None:
        """What was written of `step` under this name, on any process; None if nothing was."""
        written_at, value = self._newest.get(name, (-1, 0.0))
        return value if written_at == step else None

    def scalars(self, step: int, scalars: dict[str, float]) -> None:
        self._newest |= {name: (step, value) for name, value in scalars.items()}
        if self._active:
            line = {"step": step} | {k: float(f"{v:.6g}") for k, v in scalars.items()}
            self._lines += json.dumps(line) + "\n"
            # Whole, because a bucket knows no appending (a long run's lines are a few megabytes);
            # aside, because a run may be killed at any moment.
            files.write(self._path, self._lines)
            values = (Summary.Value(tag=k, simple_value=v) for k, v in scalars.items())
            self._board.add(step, Summary(value=values))

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """An RGB picture, uint8 [H, W, 3]."""
        if self._active:
            self._board.add(step, summary.image(name, image, dataformats="HWC"))

    def close(self) -> None:
        if self._active:
            self._board.close()


class _Board:
    """What TensorBoard shows, written by the thread that calls.

    tensorboardX's own SummaryWriter has a thread that a full disk ends, and whoever then fills its
    queue waits for ever. Here a run does not even end for it: what could not be written is missing
    in TensorBoard alone, since metrics.jsonl has the numbers and `previews` the pictures.

    Args:
      folder: Of the files.
      flush_every: Seconds that what is written may wait in memory, and between two tries.
      max_bytes: Of one file, which a bucket takes anew as a whole each time.
    """

    def __init__(self, folder: str, *, flush_every: float = 60.0, max_bytes: int = 2**23):
        self._folder, self._flush_every, self._max_bytes = folder, flush_every, max_bytes
        self._suffixes = (f".{number}" for number in itertools.count())
        self._file: EventsWriter | None = None
        self._size, self._flushed, self._failed = 0, -math.inf, -math.inf
        self._local: tempfile.TemporaryDirectory | None = None  # of what goes to a bucket

    def add(self, step: int, what: Summary) -> None:
        with self._tolerating():
            if self._file is None:
                if time.monotonic() - self._failed < self._flush_every:
                    return
                self._open()
            event = Event(wall_time=time.time(), step=step, summary=what)
            self._file.write_event(event)
            self._size += event.ByteSize()
            if self._size > self._max_bytes:
                self.close()
            elif time.monotonic() - self._flushed > self._flush_every:
                self._flush()

    def close(self) -> None:
        with self._tolerating():
            if self._file is not None:
                self._flush()
                self._file.close()
            self._file = None

    def _open(self) -> None:
        folder, self._size = self._folder, 0
        if files.is_remote(folder):
            self._local = tempfile.TemporaryDirectory()
            folder = self._local.name
        else:
            pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        self._file = EventsWriter(f"{folder}/events", next(self._suffixes))

    def _flush(self) -> None:
        self._file.flush()
        if self._local is not None:
            (path,) = pathlib.Path(self._local.name).iterdir()
            files.put(path, f"{self._folder}/{path.name}")
        self._flushed = time.monotonic()

    @contextlib.contextmanager
    def _tolerating(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of any store
            logging.warning("%s lacks what could not be written: %s", self._folder, error)
            self._file, self._failed = None, time.monotonic()
