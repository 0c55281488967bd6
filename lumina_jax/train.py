"""Trains a model.

python -m lumina_jax.train --config=configs/tiny.py --workdir=runs/tiny
python -m lumina_jax.train --config=configs/tiny.py --workdir=runs/other \
    --config.optim.learning_rate=1e-3

Run again with the same --workdir, it goes on from the newest checkpoint.

python -m lumina_jax.train --config=configs/stage1.py --workdir=gs://bucket/stage1 --dry_run

Checks devices, paths, data, weights, disk and memory, and lists every fault; status 2 if the run
would not start or not end.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from absl import flags, logging
from clu import parameter_overview
from etils import epath
from ml_collections import ConfigDict, config_flags

from lumina_jax import (
    checkpoint,
    cli,
    compiler,
    distributed,
    executables,
    files,
    flow,
    goodput,
    handover,
    loop,
    metrics,
    optim,
    sharding,
)
from lumina_jax.data.buckets import Bucket
from lumina_jax.data.captions import CaptionPolicy
from lumina_jax.data.loader import Dataset, Loader
from lumina_jax.data.records import num_tokens
from lumina_jax.errors import InputError
from lumina_jax.frozen import cache
from lumina_jax.frozen.autoencoder import Autoencoder, make_autoencoder
from lumina_jax.frozen.encoder import Encoder
from lumina_jax.frozen.text_encoder import TextEncoder, make_text_encoder
from lumina_jax.models import next_dit
from lumina_jax.sampling.contact_sheet import contact_sheet
from lumina_jax.sampling.pipeline import Pipeline, from_sections
from lumina_jax.train_step import TrainState, init_state, make_train_step
from lumina_jax.validation import Validator


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "A file in configs/.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and pictures go.")
    flags.DEFINE_bool("dry_run", False, "Check all that the run needs, and train nothing.")
    distributed.define_flags()


class Trainer:
    """A run: everything that the loop needs, built from its config and checked at once.

    In order: `loader` makes host batches, `encode` turns one into a `Batch` on the mesh, `step`
    learns from it.
    """

    def __init__(self, config: ConfigDict, workdir: str):
        self.config, self.workdir = config, workdir
        check_numbers(config)
        self.text_encoder = make_text_encoder(**config.text_encoder)
        self.autoencoder = make_autoencoder(**config.autoencoder)
        self.model = model_config(config, self.text_encoder, self.autoencoder)
        self.mesh = sharding.make_mesh(**config.mesh)
        self.loader = make_loader(config, self.text_encoder, self.autoencoder)
        self.validation_loader = make_validation_loader(
            config, self.loader, self.text_encoder, self.autoencoder
        )
        self.num_slots = self._check_shapes()

        self.program = step_program(
            config, self.model, self.mesh, self.num_slots, settings=lambda: self.meta
        )
        self.step, self.learning_rate = self.program.step, self.program.learning_rate
        self.pipeline = make_pipeline(config, self.model, self.mesh)
        self.encode = self._make_encoder(self.autoencoder, config.train.batch_size)
        self.validator = Validator(
            next_dit.make_forward(self.model),
            # Latents that are drawn would depend on the batch.
            self._make_encoder(
                make_autoencoder(**{**config.autoencoder, "sample": False}),
                config.validation.batch_size,
            ),
            self.validation_loader,
            mesh=self.mesh,
            batch_size=config.validation.batch_size,
            num_times=config.validation.num_times,
        )
        self.pauses = (
            loop.Pause("validation", config.validation.every, self.validate, measures=True),
            loop.Pause("preview", config.preview.every, self.preview),
        )
        self.checkpointer = checkpoint.Checkpointer(
            workdir,
            keep_latest=config.train.keep_checkpoints,
            keep_every=config.train.keep_checkpoint_every,
            keep_best=config.train.keep_best_checkpoints,
            if_damaged=config.train.if_damaged,
        )
        self.meta = run_meta(config, self.model, self.loader, self.text_encoder, self.autoencoder)

    def _make_encoder(self, autoencoder: Autoencoder, batch_size: int) -> Encoder:
        return Encoder(
            self.text_encoder,
            autoencoder,
            text_params=lambda: self.pipeline.text_params,
            image_params=lambda: self.pipeline.autoencoder_params,
            mesh=self.mesh,
            batch_size=batch_size,
            patch_size=self.model.patch_size,
            num_slots=self.num_slots,
            pooled=bool(self.config.flow.auxiliary_weight),
            seed=self.config.seed,
            settings=lambda: {**self.meta, "autoencoder": autoencoder.fingerprint()},
        )

    def _check_shapes(self) -> int:
        """The image slots of a sequence; refuses batches and buckets that do not fit."""
        check_batch_size(self.config, self.mesh)
        check_validation_batch(self.config, self.mesh)
        buckets = {*self.loader.buckets, *self.validation_loader.buckets}
        return check_buckets(self.config, buckets, self.model, self.autoencoder)

    def init_state(self) -> tuple[TrainState, int]:
        """The state to begin with, and the index of the first batch.

        This run's newest checkpoint, else what `train.init_from` hands over, else a fresh model.
        """
        abstract, shardings = self.program.abstract_state, self.program.shardings
        if self.checkpointer.latest_step() is not None:
            return self.checkpointer.restore(abstract, shardings, self.meta)
        train = self.config.train
        if train.init_from:
            state, report = handover.take_over(
                train.init_from,
                abstract,
                shardings,
                optimizer=self.program.optimizer,
                learning_rate=self.learning_rate,
                model=self.model,
                config=self.meta["config"],
                init_weights=train.init_weights,
                init_optimizer=train.init_optimizer,
            )
            logging.info("%s", report)
            return state, 0

        def make(key):
            return init_state(next_dit.init_params(self.model, key), self.program.optimizer)

        # Drawn where it lies: no device, and no host, ever holds all of it.
        return jax.jit(make, out_shardings=shardings)(jax.random.key(self.config.seed)), 0

    def validate(self, state: TrainState, step: int, writer: metrics.Writer) -> None:
        """Writes the loss on held-out pictures, of the averaged weights and of the raw ones."""
        scalars = self.validator(state.ema, state.params)
        writer.scalars(step, scalars)
        if jax.process_index() == 0:
            logging.info("Validation loss at step %d: %.4f.", step, scalars["validation_loss"])

    def preview(self, state: TrainState, step: int, writer: metrics.Writer) -> None:
        """Draws the prompts with the averaged weights and with the raw ones, side by side."""
        prompts, seed = list(self.config.preview.prompts), self.config.preview.seed
        drawn = []
        for self.pipeline.params in (state.ema, state.params):
            drawn.append(self.pipeline(prompts, seed=seed, output="uint8"))
        self.pipeline.params = None  # the step donates them
        if jax.process_index() == 0:
            sheet = contact_sheet(
                [image for pair in zip(*drawn, strict=True) for image in pair],
                [prompt for prompt in prompts for _ in drawn],
                columns=6,
                title=f"step {step}",
                notes=["averaged weights", "raw weights"] * len(prompts),
            )
            writer.image(step, "preview", np.asarray(sheet))
            files.write_png(epath.Path(self.workdir) / "previews" / f"{step:07d}.png", sheet)

    def counts(self) -> dict[str, int]:
        return {
            "captions_cut": self.text_encoder.num_truncated + self.loader.num_features_cut,
            "records_replaced": self.loader.num_replaced,
        }

    def overview(self) -> str:
        return parameter_overview.get_parameter_overview(
            next_dit.abstract_params(self.model), include_stats=False
        )

    def flops(self, host_batch: dict) -> float:
        """The operations of a step with this batch, forward and backward, on all devices."""
        return step_flops(
            self.config, self.model, self.num_slots, host_batch["token_mask"].shape[1]
        )


class StepProgram(NamedTuple):
    """The step of a run on a mesh, not compiled yet, and the state that it takes.

    Attributes:
      step: step(state, batch, key) -> (state, metrics).
      optimizer: Its own.
      learning_rate: Of a step.
      abstract_state: Shapes and types of the state.
      shardings: Where its arrays go.
    """

    step: executables.Program
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    abstract_state: TrainState
    shardings: TrainState


def step_program(
    config: ConfigDict,
    model: next_dit.NextDiTConfig,
    mesh: jax.sharding.Mesh,
    num_slots: int,
    *,
    settings: Callable[[], Any] = dict,
) -> StepProgram:
    """Builds the step that a config names; no data, weights or devices are needed.

    Args:
      config: Of the run.
      model: Sizes of the network, see `model_config`.
      mesh: Of the devices to run on, or to compile for.
      num_slots: Image slots of a sequence.
      settings: Gives all that decides the step, where its trace may be kept.
    """
    optim_config = optim.OptimConfig(**config.optim)
    optimizer = optim.make_optimizer(optim_config, config.train.num_steps)
    state = abstract_state(model, optimizer)
    shardings = sharding.tree_shardings(state, mesh)
    main_shift, auxiliary_shift = time_shifts(config.flow, num_slots)
    step = make_train_step(
        next_dit.make_forward_many(model),
        optimizer,
        time_distribution=config.flow.time_distribution,
        time_shift=main_shift,
        auxiliary_weight=config.flow.auxiliary_weight,
        auxiliary_shift=auxiliary_shift,
        num_microbatches=config.train.num_microbatches,
        ema_decay=optim_config.ema_decay,
    )
    program = executables.Program(
        step,
        name="train_step",
        settings=settings,
        donate_argnums=0,
        out_shardings=(shardings, sharding.named(mesh, ())),
        compiler_options=compiler.options(
            sharding.device_kind(mesh), config.compile.options.to_dict()
        ),
    )
    learning_rate = optim.learning_rate(optim_config, config.train.num_steps)
    return StepProgram(program, optimizer, learning_rate, state, shardings)


def time_shifts(config: ConfigDict, num_slots: int) -> tuple[float, float]:
    """Shifts of the times of both losses, from the section `flow`; refuses names it does not know.

    Args:
      config: The section.
      num_slots: Image slots of a sequence.
    """
    flow.check_distribution(config.time_distribution)
    main = flow.resolution_shift(num_slots) if config.time_shift is None else config.time_shift
    shifts = {"main": main, "own": flow.resolution_shift(num_slots // 16)}
    if config.auxiliary_shift not in shifts:
        raise InputError(f"flow.auxiliary_shift={config.auxiliary_shift!r} is not main or own.")
    return main, shifts[config.auxiliary_shift]


def abstract_state(
    model: next_dit.NextDiTConfig, optimizer: optax.GradientTransformation
) -> TrainState:
    """Shapes and types of what a run changes, and of what a checkpoint of it holds."""
    return jax.eval_shape(lambda p: init_state(p, optimizer), next_dit.abstract_params(model))


def step_flops(
    config: ConfigDict, model: next_dit.NextDiTConfig, num_slots: int, text_slots: int
) -> float:
    """The operations of a step, forward and backward, on all devices; no recomputation."""
    image_slots = [num_slots]
    if config.flow.auxiliary_weight:
        image_slots.append(num_slots // 16)
    return 3.0 * next_dit.forward_flops(model, image_slots, text_slots) * config.train.batch_size


def check_batch_size(config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
    """Refuses a batch that does not split over the mesh and the microbatches."""
    shards, micro = sharding.batch_shards(mesh), config.train.num_microbatches
    if micro < 1 or config.train.batch_size % (shards * micro):
        unit = shards * max(micro, 1)
        low = max(config.train.batch_size // unit, 1) * unit
        raise InputError(
            f"train.batch_size={config.train.batch_size} does not split over "
            f"{shards} part(s) of the mesh and num_microbatches={micro}; it must be a multiple "
            f"of {unit}; nearest: {low} and {low + unit}."
        )


def check_validation_batch(config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
    """Refuses a batch of held-out records that does not split over the mesh."""
    shards, batch_size = sharding.batch_shards(mesh), config.validation.batch_size
    if config.validation.every and batch_size % shards:
        low = max(batch_size // shards, 1) * shards
        raise InputError(
            f"validation.batch_size={batch_size} does not split over {shards} part(s) of the "
            f"mesh; nearest: {low} and {low + shards}."
        )


def check_buckets(
    config: ConfigDict,
    buckets: Iterable[Bucket],
    model: next_dit.NextDiTConfig,
    autoencoder: Autoencoder,
) -> int:
    """The image slots of a sequence; refuses buckets that cannot be trained on, all of them."""
    downscale, patch_size = autoencoder.downscale, model.patch_size
    slots = num_tokens(config.data.resolution, downscale * patch_size)
    pooled = bool(config.flow.auxiliary_weight)
    faults = [
        f"Bucket {bucket} of the data {fault}"
        for bucket in sorted(buckets)
        if (fault := bucket_fault(bucket, downscale, patch_size, slots, pooled=pooled))
    ]
    if faults:
        raise InputError(f"{'. '.join(faults)}, or name other buckets in config.data.buckets.")
    return slots


def bucket_fault(
    bucket: Bucket, downscale: int, patch_size: int, num_slots: int, *, pooled: bool
) -> str | None:
    """Why a bucket cannot be trained on, and what to do; None if it can."""
    unit = downscale * patch_size
    if bucket.width % unit or bucket.height % unit:
        return (
            f"does not cut into patches of {unit} pixels (patch {patch_size}, autoencoder "
            f"{downscale}). Prepare the data with --pixels_per_token={unit}"
        )
    # An incomplete window of 4 x 4 latents is dropped, so a multiple of it is not asked for.
    small = [side // downscale // 4 for side in (bucket.width, bucket.height)]
    if pooled and any(side < patch_size or side % patch_size for side in small):
        return (
            f"has {small[0]} x {small[1]} pooled latents, which do not cut into patches of "
            f"{patch_size}. Set config.flow.auxiliary_weight=0"
        )
    if (tokens := bucket.width * bucket.height // unit**2) > num_slots:
        return f"has {tokens} tokens; config.data.resolution has room for {num_slots}. Raise it"
    return None


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


def make_pipeline(
    config: ConfigDict, model: next_dit.NextDiTConfig, mesh: jax.sharding.Mesh
) -> Pipeline:
    """What draws previews; it has no weights of the model yet."""
    # Encoders of its own: the loader's threads count what they cut in the other.
    return Pipeline(model, None, **from_sections(config.to_dict()), mesh=mesh)


def run_meta(
    config: ConfigDict,
    model: next_dit.NextDiTConfig,
    loader: Loader,
    text_encoder: TextEncoder,
    autoencoder: Autoencoder,
) -> dict:
    """What a checkpoint says of its run.

    `data` is all that decides what batch k is, and what the model is told of it.
    """
    data = config.data.to_dict()
    if loader.num_held_out:
        data["held_out"] = loader.num_held_out
    for key in ("directory", "num_threads", "prefetch"):
        del data[key]
    for dataset in data["datasets"].values():
        del dataset["directory"]
    return {
        "config": config.to_dict(),
        "model": checkpoint.plain(dataclasses.asdict(model)),
        "data": {
            **checkpoint.plain(data),
            "fingerprint": loader.fingerprint,
            "seed": config.seed,
            "batch_size": config.train.batch_size,
            # Not their paths: the same files may lie elsewhere when the run goes on.
            "text_encoder": text_encoder.fingerprint(),
            "autoencoder": autoencoder.fingerprint(),
        },
        "optimizer": {"name": config.optim.name},
    }


def make_loader(config: ConfigDict, text_encoder: TextEncoder, autoencoder: Autoencoder) -> Loader:
    """The batches of this process."""
    datasets, validation = make_datasets(config.data), config.validation
    loader = _load(
        config,
        datasets,
        text_encoder,
        autoencoder,
        batch_size=config.train.batch_size,
        held_out=0 if validation.directory else validation.num_records,
    )
    if len(datasets) > 1:
        for dataset, share, manifest in zip(datasets, loader.shares, loader.manifests, strict=True):
            seen = share * config.train.num_steps * config.train.batch_size / manifest.num_records
            logging.info(
                "%.1f %% of the rows are of %s: the run takes each of its %d records %.2f times.",
                100 * share, dataset.directory, manifest.num_records, seen,
            )  # fmt: skip
    return loader


def make_validation_loader(
    config: ConfigDict,
    training: Loader | None,
    text_encoder: TextEncoder,
    autoencoder: Autoencoder,
) -> Loader:
    """What reads the held-out records: the one that trains on the others, or one of its own."""
    validation = config.validation
    if not validation.directory:
        return training
    return _load(
        config,
        [Dataset(validation.directory)],
        text_encoder,
        autoencoder,
        batch_size=validation.batch_size,
        held_out=validation.num_records,
        trains=False,
    )


def _load(config, datasets, text_encoder, autoencoder, **settings) -> Loader:
    data = config.data
    loader = Loader(
        datasets,
        seed=config.seed,
        tokenize=text_encoder.tokenize,
        policy=caption_policy(data),
        buckets=[Bucket.parse(name) for name in data.buckets],
        features=data.cached,
        text_slots=dict(data.text_slots),
        num_threads=data.num_threads,
        prefetch=data.prefetch,
        **settings,
    )
    for dataset, manifest in zip(datasets, loader.manifests, strict=True):
        cache.check(
            manifest,
            data.cached,
            text_encoder=text_encoder,
            autoencoder=autoencoder,
            system_prompt=dataset.system_prompt or data.system_prompt,
        )
    return loader


def caption_policy(data: ConfigDict) -> CaptionPolicy:
    """How a config wants captions to be chosen."""
    return CaptionPolicy(
        kinds=dict(data.kinds),
        languages=dict(data.languages),
        dropout=data.caption_dropout,
        dropout_keeps_system_prompt=data.dropout_keeps_system_prompt,
        system_prompt=data.system_prompt,
        shuffle_tags=data.shuffle_tags,
    )


def make_datasets(data: ConfigDict) -> list[Dataset]:
    """The mixture that a config names, in the order of the names."""
    if bool(data.directory) == bool(data.datasets):
        raise InputError(
            f"config.data.directory={data.directory!r} and config.data.datasets name "
            f"{len(data.datasets)} data set(s). Give either one directory, or datasets to mix; "
            "tools/prepare_data.py makes them."
        )
    if data.directory:
        return [Dataset(data.directory)]
    if strange := [n for n, dataset in data.datasets.items() if not hasattr(dataset, "items")]:
        raise InputError(
            f"config.data.datasets.{strange[0]}={data.datasets[strange[0]]!r} is no section; it "
            "has a directory, and may have a weight and a system_prompt."
        )
    faults = [
        f"{name}.{key}"
        for name, dataset in sorted(data.datasets.items())
        for key in dataset
        if key not in {field.name for field in dataclasses.fields(Dataset)}
    ]
    faults += [name for name, dataset in data.datasets.items() if not dataset.get("directory")]
    if faults:
        raise InputError(
            f"config.data.datasets: {', '.join(faults)}: each has a directory, and may have a "
            "weight and a system_prompt, and nothing else."
        )
    return [Dataset(**data.datasets[name]) for name in sorted(data.datasets)]


def train(config: ConfigDict, workdir: str, *, began: float | None = None) -> TrainState:
    """Runs to the end, or to a signal; returns the last state, which is saved.

    `began` is when this start of the run began, in seconds since 1970; by default now.
    """
    began = time.time() if began is None else began
    return loop.run(Trainer(config, workdir), began=began)


def check_numbers(config: ConfigDict) -> None:
    """Refuses what would stop the run, or a division, later."""
    if faults := number_faults(config):
        raise InputError("config: " + "; ".join(faults) + ".")


def number_faults(config: ConfigDict) -> list[str]:
    """Every number that would stop the run, or a division, later."""
    train, preview, validation = config.train, config.preview, config.validation
    faults = loop.number_faults(config)
    if preview.every and not preview.prompts:
        faults.append("preview.prompts is empty; name one, or set preview.every=0")
    for key, choices in (
        ("init_weights", checkpoint.WEIGHTS),
        ("init_optimizer", handover.OPTIMIZERS),
    ):
        if train[key] not in choices:
            faults.append(f"train.{key}={train[key]!r} is not one of {', '.join(choices)}")
    if train.init_optimizer == "kept" and not train.init_from:
        faults.append("train.init_optimizer=kept needs train.init_from, the run whose it is")
    faults += [
        f"validation.{name}={validation[name]} must be at least {least}"
        for name, least in (("every", 0), ("num_records", 0), ("batch_size", 1), ("num_times", 1))
        if validation[name] < least
    ]
    if train.keep_best_checkpoints < 0 or (
        train.keep_best_checkpoints
        and (not validation.every or train.checkpoint_every % validation.every)
    ):
        faults.append(
            f"train.keep_best_checkpoints={train.keep_best_checkpoints} must not be negative, and "
            f"needs a validation loss of each checkpoint: validation.every={validation.every} must "
            f"divide train.checkpoint_every={train.checkpoint_every}"
        )
    if validation.every and validation.num_records < validation.num_times:
        faults.append(
            f"validation.num_records={validation.num_records} must be at least validation."
            f"num_times={validation.num_times}, a record for each; or set validation.every=0"
        )
    if config.flow.time_shift is not None and config.flow.time_shift <= 0:
        faults.append(
            f"flow.time_shift={config.flow.time_shift} must be positive; 1 shifts nothing"
        )
    return faults


def main() -> int:
    began = goodput.process_start()
    distributed.from_flags()
    config, workdir = flags.FLAGS.config, flags.FLAGS.workdir
    executables.use_cache(config.compile.cache_directory, default=f"{workdir}/compiled")
    if flags.FLAGS.dry_run:
        from lumina_jax import doctor  # here, because it examines what this module builds

        return doctor.dry_run(config, workdir)
    train(config, workdir, began=began)
    return 0


if __name__ == "__main__":
    define_flags()
    cli.run(main, required=("config", "workdir"))
