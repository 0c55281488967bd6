"""Trains a model.

python -m lumina_jax.train --config=configs/tiny.py --workdir=runs/tiny
python -m lumina_jax.train --config=configs/tiny.py --workdir=runs/other \
    --config.optim.learning_rate=1e-3

Run again with the same --workdir, it goes on from the newest checkpoint.
"""

import contextlib
import dataclasses
import functools
import math
import signal
import sys
import time
from collections.abc import Iterator

import jax
import numpy as np
from absl import flags, logging
from clu import parameter_overview
from etils import epath
from ml_collections import ConfigDict, config_flags

from lumina_jax import checkpoint, cli, distributed, files, flow, metrics, optim, sharding
from lumina_jax.data.buckets import Bucket
from lumina_jax.data.captions import CaptionPolicy
from lumina_jax.data.loader import Loader
from lumina_jax.data.records import num_tokens
from lumina_jax.errors import InputError
from lumina_jax.models import embed, next_dit
from lumina_jax.models.autoencoder import Autoencoder, make_autoencoder
from lumina_jax.models.text_encoder import TextEncoder, make_text_encoder
from lumina_jax.progress import progress_bar
from lumina_jax.sampling.contact_sheet import contact_sheet
from lumina_jax.sampling.pipeline import Pipeline, sampling_defaults
from lumina_jax.train_step import TrainState, init_state, make_train_step
from lumina_jax.types import Batch


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "A file in configs/.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and pictures go.")


class Trainer:
    """A run: everything that the loop needs, built from its config and checked at once.

    In order: `loader` makes host batches, `encode` turns one into a `Batch` on the mesh, `step`
    learns from it.
    """

    def __init__(self, config: ConfigDict, workdir: str):
        self.config, self.workdir = config, workdir
        _check_numbers(config)
        self.text_encoder = make_text_encoder(**config.text_encoder)
        self.autoencoder = make_autoencoder(**config.autoencoder)
        self.model = model_config(config, self.text_encoder, self.autoencoder)
        self.mesh = sharding.make_mesh(**config.mesh)
        self.loader = make_loader(config, self.text_encoder)
        self.num_slots = self._check_shapes()

        optim_config = optim.OptimConfig(**config.optim)
        self.optimizer = optim.make_optimizer(optim_config, config.train.num_steps)
        self.learning_rate = optim.learning_rate(optim_config, config.train.num_steps)
        self.forward = next_dit.make_forward(self.model)
        params = next_dit.abstract_params(self.model)
        self.abstract_state = jax.eval_shape(lambda p: init_state(p, self.optimizer), params)
        self.shardings = sharding.tree_shardings(self.abstract_state, self.mesh)
        self.step = self._make_step(optim_config)
        self.pipeline = self._make_pipeline()
        self.encode = Encoder(self)

        self.checkpointer = checkpoint.Checkpointer(
            workdir,
            keep_latest=config.train.keep_checkpoints,
            keep_every=config.train.keep_checkpoint_every,
        )
        self.meta = {
            "config": config.to_dict(),
            "model": _plain(dataclasses.asdict(self.model)),
            "data": self._data_meta(),
        }

    def _data_meta(self) -> dict:
        """All that decides what batch k is, and what the model is told of it."""
        data = self.config.data.to_dict()
        for key in ("directory", "num_threads", "prefetch"):
            del data[key]
        return {
            **_plain(data),
            "fingerprint": self.loader.manifest.fingerprint,
            "seed": self.config.seed,
            "batch_size": self.config.train.batch_size,
            "text_encoder": self.config.text_encoder.to_dict(),
            "autoencoder": self.config.autoencoder.to_dict(),
        }

    def _check_shapes(self) -> int:
        """The image slots of a sequence; refuses batches and buckets that do not fit."""
        config, mesh = self.config, self.mesh
        shards, micro = sharding.batch_shards(mesh), config.train.num_microbatches
        if micro < 1 or config.train.batch_size % (shards * micro):
            unit = shards * max(micro, 1)
            low = max(config.train.batch_size // unit, 1) * unit
            raise InputError(
                f"train.batch_size={config.train.batch_size} does not split over "
                f"{shards} part(s) of the mesh and num_microbatches={micro}; it must be a multiple "
                f"of {unit}; nearest: {low} and {low + unit}."
            )
        unit = self.autoencoder.downscale * self.model.patch_size
        slots = num_tokens(config.data.resolution, unit)
        pool = 4 if config.flow.auxiliary_weight else 1
        for bucket in self.loader.buckets:
            if bucket.width % (unit * pool) or bucket.height % (unit * pool):
                raise InputError(
                    f"Bucket {bucket} of {config.data.directory} is not a multiple of "
                    f"{unit * pool} pixels (patch {self.model.patch_size}, autoencoder "
                    f"{self.autoencoder.downscale}" + (", pooled by 4" if pool > 1 else "") + "). "
                    f"Prepare the data with --pixels_per_token={unit}, or name other buckets in "
                    f"config.data.buckets."
                )
            if (tokens := bucket.width * bucket.height // unit**2) > slots:
                raise InputError(
                    f"Bucket {bucket} has {tokens} tokens; config.data.resolution="
                    f"{config.data.resolution} has room for {slots}. Raise it, or name other "
                    f"buckets in config.data.buckets."
                )
        return slots

    def _make_step(self, optim_config):
        config, main = self.config.flow, self.config.flow.time_shift
        if main is None:
            main = flow.resolution_shift(self.num_slots)
        shifts = {"main": main, "own": flow.resolution_shift(self.num_slots // 16)}
        if config.auxiliary_shift not in shifts:
            raise InputError(f"flow.auxiliary_shift={config.auxiliary_shift!r} is not main or own.")
        flow.check_distribution(config.time_distribution)
        step = make_train_step(
            self.forward,
            self.optimizer,
            time_distribution=config.time_distribution,
            time_shift=main,
            auxiliary_weight=config.auxiliary_weight,
            auxiliary_shift=shifts[config.auxiliary_shift],
            num_microbatches=self.config.train.num_microbatches,
            ema_decay=optim_config.ema_decay,
        )
        replicated = sharding.named(self.mesh, ())
        return jax.jit(step, donate_argnums=0, out_shardings=(self.shardings, replicated))

    def _make_pipeline(self):
        defaults, size = sampling_defaults(self.config.sampling.to_dict())
        return Pipeline(
            self.model,
            None,
            # One of its own: the loader's threads count what they cut in the other.
            text_encoder=make_text_encoder(**self.config.text_encoder),
            autoencoder=self.autoencoder,
            defaults=defaults,
            size=size,
            mesh=self.mesh,
        )

    def init_state(self) -> tuple[TrainState, int]:
        """The state to begin with, and the index of the first batch.

        This run's newest checkpoint, else the weights of `train.init_from`, else a fresh model.
        """
        if (step := self.checkpointer.latest_step()) is not None:
            logging.info("Going on from step %d in %s.", step, self.checkpointer.directory)
            return self.checkpointer.restore(self.abstract_state, self.shardings, self.meta)
        make_state = functools.partial(init_state, optimizer=self.optimizer)
        if source := self.config.train.init_from:
            params = checkpoint.init_from(
                source,
                self.abstract_state.params,
                self.shardings.params,
                weights=self.config.train.init_weights,
                model=self.meta["model"],
            )
            return jax.jit(make_state, out_shardings=self.shardings)(params), 0

        def make(key):
            return make_state(next_dit.init_params(self.model, key))

        # Drawn where it lies: no device, and no host, ever holds all of it.
        return jax.jit(make, out_shardings=self.shardings)(jax.random.key(self.config.seed)), 0

    def preview(self, state: TrainState, step: int, writer: metrics.Writer) -> None:
        """Draws the preview prompts with the averaged weights, as a contact sheet."""
        prompts = list(self.config.preview.prompts)
        self.pipeline.params = state.ema
        images = self.pipeline(prompts, seed=self.config.preview.seed, output="uint8")
        self.pipeline.params = None  # the step donates them
        if jax.process_index() == 0:
            sheet = contact_sheet(list(images), prompts, columns=6, title=f"step {step}")
            writer.image(step, "preview", np.asarray(sheet))
            files.write_png(epath.Path(self.workdir) / "previews" / f"{step:07d}.png", sheet)

    def make_meter(self) -> metrics.Meter:
        slots = [self.num_slots]
        if self.config.flow.auxiliary_weight:
            slots.append(self.num_slots // 16)
        forward = sum(
            next_dit.forward_flops(self.model, num, self.text_encoder.max_tokens) for num in slots
        )
        batch_size = self.config.train.batch_size
        return metrics.Meter(
            batch_size=batch_size,
            flops_per_step=3 * forward * batch_size,
            peak=metrics.peak_flops(jax.local_devices()[0]) * jax.device_count(),
        )


class Encoder:
    """The frozen programs: host batches in, `Batch` on the mesh out.

    The text encoder is one program; the autoencoder with the cut into tokens is a small one for
    each bucket shape, compiled when first met. Behind it every bucket looks alike.
    """

    def __init__(self, trainer: Trainer):
        self._sharding = sharding.named(trainer.mesh, ("act_batch",))
        self._batch_size = trainer.config.train.batch_size
        self._text_params, self._image_params = trainer.pipeline.frozen
        self._encode_text = jax.jit(trainer.text_encoder.encode, out_shardings=self._sharding)
        self._encode_images = jax.jit(
            functools.partial(
                encode_images,
                trainer.autoencoder,
                patch_size=trainer.model.patch_size,
                num_slots=trainer.num_slots,
                pooled=bool(trainer.config.flow.auxiliary_weight),
            ),
            out_shardings=self._sharding,
        )

    def __call__(self, host_batch: dict) -> Batch:
        images, ids, mask = (
            jax.make_array_from_process_local_data(
                self._sharding, host_batch[name], (self._batch_size, *host_batch[name].shape[1:])
            )
            for name in ("images", "token_ids", "token_mask")
        )
        image, pooled = self._encode_images(self._image_params, images)
        return Batch(image, pooled, self._encode_text(self._text_params, ids, mask), mask)


def encode_images(autoencoder: Autoencoder, params, images, *, patch_size, num_slots, pooled):
    """Pictures to padded tokens, and the tokens of their pooled latents where asked for."""
    latents = autoencoder.encode(params, images)
    tokens = embed.patchify(latents, patch_size, num_slots)
    if not pooled:
        return tokens, None
    return tokens, embed.patchify(embed.pool_latents(latents), patch_size, num_slots // 16)


def model_config(
    config: ConfigDict, text_encoder: TextEncoder, autoencoder: Autoencoder
) -> next_dit.NextDiTConfig:
    """The sizes of the network: preset, changes, and what its neighbours impose."""
    changes = {key: value for key, value in config.model.items() if value is not None}
    return next_dit.NextDiTConfig.preset(
        changes.pop("preset"),
        **changes,
        cap_feat_dim=text_encoder.feature_dim,
        in_channels=autoencoder.channels,
    )


def make_loader(config: ConfigDict, text_encoder: TextEncoder) -> Loader:
    """The batches of this process."""
    policy = CaptionPolicy(
        kinds=dict(config.data.kinds),
        languages=tuple(config.data.languages),
        dropout=config.data.caption_dropout,
    )
    return Loader(
        config.data.directory,
        batch_size=config.train.batch_size,
        seed=config.seed,
        tokenize=text_encoder.tokenize,
        policy=policy,
        buckets=[Bucket.parse(name) for name in config.data.buckets],
        num_threads=config.data.num_threads,
        prefetch=config.data.prefetch,
    )


def train(config: ConfigDict, workdir: str) -> TrainState:
    """Runs to the end, or to a signal; returns the last state, which is saved."""
    with contextlib.ExitStack() as stack:
        trainer = Trainer(config, workdir)
        # On whatever way out: a save that is under way must reach the disk.
        stack.callback(trainer.checkpointer.close)
        state, first = trainer.init_state()
        if first >= config.train.num_steps:
            logging.info("Nothing to do: %s has all %d steps.", workdir, config.train.num_steps)
            return state
        if jax.process_index() == 0:
            logging.info("Model:\n%s", _overview(trainer.model))
        writer = stack.enter_context(contextlib.closing(metrics.Writer(workdir)))
        batches = stack.enter_context(contextlib.closing(trainer.loader.iterate(first)))
        report = Report(trainer, writer)
        stack.enter_context(jax.set_mesh(trainer.mesh))
        state, last = loop(trainer, state, first, batches, report)
    if last < config.train.num_steps:
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
        batch = trainer.encode(report.timed_next(batches))
        for done in range(first + 1, config.num_steps + 1):
            state, step_metrics = trainer.step(state, batch, key)
            # While the device works on this step, read what the last one said, make the next batch.
            report.add(done, step_metrics)
            if done < config.num_steps:
                batch = trainer.encode(report.timed_next(batches))
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
        self.meter = trainer.make_meter()
        self.text = self._speed = ""
        self.writer = writer
        self._trainer = trainer
        self._pending: tuple[int, dict] | None = None
        self._since_line: int | None = None  # the newest step that no line has yet

    def timed_next(self, batches: Iterator[dict]) -> dict:
        began = time.perf_counter()
        batch = next(batches)
        self.meter.add_input_wait(time.perf_counter() - began)
        return batch

    def add(self, step: int, step_metrics: dict) -> None:
        """Takes the metrics of a step just begun, and reads those of the step before."""
        self.catch_up()
        self._pending = step, step_metrics

    def catch_up(self) -> None:
        """Reads the metrics that are still on the device, which waits for their step."""
        if self._pending is None:
            return
        (step, step_metrics), self._pending = self._pending, None
        loss, grad_norm = self.meter.add(step_metrics)
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
        scalars["captions_cut"] = trainer.text_encoder.num_truncated
        scalars["records_replaced"] = trainer.loader.num_replaced
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


def _overview(model: next_dit.NextDiTConfig) -> str:
    return parameter_overview.get_parameter_overview(
        next_dit.abstract_params(model), include_stats=False
    )


def _check_numbers(config: ConfigDict) -> None:
    """Refuses what would stop the run, or a division, later."""
    train, preview = config.train, config.preview
    faults = [
        f"train.{name}={train[name]} must be at least 1"
        for name in ("num_steps", "batch_size", "log_every", "checkpoint_every", "keep_checkpoints")
        if train[name] < 1
    ]
    if train.keep_checkpoint_every < 0 or preview.every < 0:
        faults.append(
            f"train.keep_checkpoint_every={train.keep_checkpoint_every} and preview.every="
            f"{preview.every} must not be negative; 0 is never"
        )
    if preview.every and not preview.prompts:
        faults.append("preview.prompts is empty; name one, or set preview.every=0")
    if not config.data.directory:
        faults.append("data.directory is empty; make a data set with tools/prepare_data.py")
    if config.flow.time_shift is not None and config.flow.time_shift <= 0:
        faults.append(
            f"flow.time_shift={config.flow.time_shift} must be positive; 1 shifts nothing"
        )
    if faults:
        raise InputError("config: " + "; ".join(faults) + ".")


def _plain(tree):
    """As JSON would return it, so that what was saved compares equal."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in tree.items()}


def main() -> None:
    distributed.initialize()
    train(flags.FLAGS.config, flags.FLAGS.workdir)


if __name__ == "__main__":
    define_flags()
    cli.run(main, required=("config", "workdir"))
