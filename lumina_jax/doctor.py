"""Whether a run would start, and end: everything that it needs, looked at before it begins.

    python -m lumina_jax.train --config=configs/stage1.py --workdir=gs://bucket/stage1 --dry_run

Nothing is trained, no checkpoint is written, nothing is fetched, and the workdir stays as it was
but for the compiled step. The parts of a run are made by the functions that training makes them
with, each when a check first asks for it; a part that cannot be made stops the checks that need it
and no others. Each process looks for itself, and process 0 reports what all of them found.
"""

import dataclasses
import functools
import importlib.metadata
import os
import pathlib
import platform
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from lumina_jax import checkpoint, disk, executables, files, handover, lease, optim, sharding, train
from lumina_jax.data import images, records
from lumina_jax.data.buckets import Bucket
from lumina_jax.data.captions import CaptionPolicy
from lumina_jax.data.loader import Dataset, Loader
from lumina_jax.data.records import Manifest, Record, Records, Split
from lumina_jax.errors import InputError, listed
from lumina_jax.findings import (
    ERROR,
    WARNING,
    MissingError,
    Told,
    error,
    examine,
    faults,
    gather,
    gather_findings,
    not_checked,
    ok,
    render,
    warning,
)
from lumina_jax.frozen.autoencoder import Autoencoder, make_autoencoder
from lumina_jax.frozen.text_encoder import TextEncoder, make_text_encoder
from lumina_jax.metrics import peak_flops
from lumina_jax.models import next_dit
from lumina_jax.planning import programs
from lumina_jax.planning.report import does_not_fit, peak_memory, total_memory
from lumina_jax.sampling.pipeline import sampling_settings
from lumina_jax.train_step import TrainState
from lumina_jax.weights.files import fetched_folder, is_hub_name

Findings = Iterator[Told]

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_SAMPLE = "a red fox in the snow"
_FULL = 0.9  # of a memory: beyond it allocations may fail that the compiler did not count
_SHARE = 0.4  # of the devices' peak, about what a good run reaches


def dry_run(config: ConfigDict, workdir: str) -> int:
    """Examines a run and prints the report; returns the exit status, 2 if it would not work."""
    parts = Parts(config, workdir)
    found = gather_findings(examine(CHECKS, parts))
    # Every process compiles the step, or none does: on some devices they do it together.
    ready = all(gather(parts.can_compile()))
    last = {"memory": check_memory if ready else _no_step}
    if jax.process_count() > 1:
        last["processes"] = check_processes
    found += gather_findings(examine(last, parts))
    levels = [each.level for each in found]
    if jax.process_index() == 0:
        render(f"Dry run in {workdir}", found)
        verdict = "the run would fail" if ERROR in levels else "the run can start"
        print(f"{levels.count(ERROR)} error(s), {levels.count(WARNING)} warning(s): {verdict}.")
    return InputError.status if ERROR in levels else 0


def part(check: str) -> Callable:
    """Makes a method a property that is made once; where it cannot be, `check` says why."""

    def decorate(make):
        @functools.wraps(make)
        def get(self):
            if make.__name__ not in self.made:
                try:
                    self.made[make.__name__] = make(self)
                except MissingError as missing:
                    self.made[make.__name__] = missing
                except InputError as fault:
                    self.made[make.__name__] = MissingError(check, ERROR, str(fault))
                except Exception as fault:  # of a store or a library: asked once, told once
                    logging.exception("The %s cannot be made.", make.__name__)
                    text = f"{type(fault).__name__}: {fault}"
                    self.made[make.__name__] = MissingError(check, ERROR, text)
            if isinstance(found := self.made[make.__name__], MissingError):
                raise found
            return found

        return property(get)

    return decorate


class Parts:
    """What a run is made of, by the functions that training uses."""

    def __init__(self, config: ConfigDict, workdir: str):
        self.config, self.workdir = config, workdir
        self.made: dict[str, Any] = {}

    @part("devices")
    def mesh(self) -> jax.sharding.Mesh:
        return sharding.make_mesh(**self.config.mesh)

    @part("text encoder")
    def text_encoder(self) -> TextEncoder:
        return self._frozen("text encoder", make_text_encoder, self.config.text_encoder)

    @part("autoencoder")
    def autoencoder(self) -> Autoencoder:
        return self._frozen("autoencoder", make_autoencoder, self.config.autoencoder)

    def _frozen(self, check: str, make: Callable, section: ConfigDict) -> Any:
        """Made of what is on this machine."""
        name = section.path
        if not name or not is_hub_name(name):
            return make(**section)
        folder = fetched_folder(name)
        if folder is None:
            raise MissingError(check, WARNING, _not_fetched(name))
        try:
            return make(**{**section, "path": str(folder)})
        except InputError as fault:
            text = f"Of {name}, not all is here yet ({fault}) The start will fetch the rest."
            raise MissingError(check, WARNING, text) from None

    @property
    def encoders(self) -> tuple[TextEncoder, Autoencoder]:
        """Of the right sizes, if need be without weights: enough for the step."""
        try:
            return self.text_encoder, self.autoencoder
        except MissingError as missing:
            try:
                return programs.encoders(self.config)
            except InputError:
                raise missing from None

    @part("model")
    def model(self) -> next_dit.NextDiTConfig:
        return train.model_config(self.config, *self.encoders)

    @part("data")
    def loader(self) -> Loader:
        return train.make_loader(self.config, *self._readers)

    @part("validation")
    def validation_loader(self) -> Loader:
        training = None if self.config.validation.directory else self.loader
        return train.make_validation_loader(self.config, training, *self._readers)

    @property
    def _readers(self) -> tuple[TextEncoder, Autoencoder]:
        """Those that a loader asks: for their fingerprints where their features are cached."""
        return (self.text_encoder, self.autoencoder) if self.config.data.cached else self.encoders

    @part("step")
    def num_slots(self) -> int:
        """Image slots of a sequence."""
        return train.check_buckets(self.config, (), self.model, self.encoders[1])

    @part("step")
    def state(self) -> TrainState:
        """Shapes and types."""
        settings = optim.OptimConfig(**self.config.optim)
        optimizer = optim.make_optimizer(settings, self.config.train.num_steps)
        return train.abstract_state(self.model, optimizer)

    @part("step")
    def program(self) -> train.StepProgram:
        return train.step_program(
            self.config, self.model, self.mesh, self.num_slots, settings=self._settings
        )

    def _settings(self) -> dict:
        try:
            return self.meta
        except MissingError:
            return {"dry run": "without data or weights"}

    @part("data")
    def meta(self) -> dict:
        """What a checkpoint of this run would say of it."""
        return train.run_meta(
            self.config, self.model, self.loader, self.text_encoder, self.autoencoder
        )

    @property
    def steps(self) -> list[int]:
        """Of the checkpoints in the workdir."""
        return checkpoint.find_steps(self.workdir) if checkpoint.is_run(self.workdir) else []

    @property
    def text_slots(self) -> int:
        """The most that a batch has."""
        slots = self.config.data.text_slots.values()
        return max(slots, default=self.encoders[0].max_tokens)

    def can_compile(self) -> bool:
        try:
            return bool(self.program) and not list(
                faults(train.check_batch_size, self.config, self.mesh)
            )
        except MissingError:
            return False


def _not_fetched(name: str) -> str:
    return (
        f"{name} is no folder here, and nothing of that name on the Hugging Face hub has been "
        f"fetched to this machine: the start will try to. To be sure, fetch it now, `hf download "
        f"{name}`, or name a local folder."
    )


def check_config(parts: Parts) -> Findings:
    config, settings = parts.config, parts.config.train
    found = [error(fault) for fault in train.number_faults(config)]
    found += faults(optim.OptimConfig, **config.optim)
    found += faults(train.caption_policy, config.data)
    found += faults(train.time_shifts, config.flow, 16)  # of any slots: the names are what counts
    found += faults(sampling_settings, config.sampling.to_dict())
    if not found:
        yield ok(
            f"{settings.num_steps:,} steps of {settings.batch_size:,} pictures in "
            f"{settings.num_microbatches} microbatch(es): {_num_images(config):,} pictures seen"
        )
        yield ok(
            f"{config.optim.name}, learning rate {config.optim.learning_rate:g} "
            f"({config.optim.schedule}) after {config.optim.warmup_steps:,} steps of warm-up; "
            f"seed {config.seed}"
        )
    yield from found


def _num_images(config: ConfigDict) -> int:
    return config.train.num_steps * config.train.batch_size


def check_devices(parts: Parts) -> Findings:
    device, stats = jax.devices()[0], jax.local_devices()[0].memory_stats()
    memory = f" with {_size(stats['bytes_limit'])} each" if stats else ""
    yield ok(
        f"{jax.device_count()} device(s) of kind {device.device_kind}{memory}, "
        f"{jax.local_device_count()} of them on each of {jax.process_count()} process(es)"
    )
    versions = (f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES)
    yield ok(f"Python {platform.python_version()}, {', '.join(versions)}")
    if host := host_memory():
        yield ok(f"memory of a host: {_size(host[0])}, {_size(host[1])} of it free")
    mesh = parts.mesh
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    yield ok(
        f"mesh {sizes}: the batch in {sharding.batch_shards(mesh)} part(s); parameters, average "
        f"and moments in {mesh.shape['data'] * mesh.shape['model']}"
    )
    yield from faults(train.check_batch_size, parts.config, mesh)
    yield from faults(train.check_validation_batch, parts.config, mesh)


def check_workdir(parts: Parts) -> Findings:
    where = _write_and_read(parts.workdir)
    yield ok(f"{where} can be written and read")


def check_cache(parts: Parts) -> Findings:
    """The folder of compiled programs; a run works without."""
    directory = jax.config.jax_compilation_cache_dir
    if not directory:
        yield ok(executables.summary())
        return
    try:
        _write_and_read(directory)
        yield ok(f"compiled programs are kept in {directory}")
    except InputError as fault:
        yield warning(f"Each start will trace and compile anew. {fault}")


def _write_and_read(folder: epath.PathLike) -> epath.Path:
    """Puts a file there as a run does, and removes it; returns where."""
    path, content = _probe(folder), os.urandom(32)
    _put(path, content)
    try:
        found = path.read_bytes()
        path.unlink()
    except Exception as fault:  # of any store
        raise InputError(f"{path} cannot be read and removed: {_first_line(fault)}.") from fault
    if found != content:
        raise InputError(f"{path} gives back other bytes than were written. Do not use it.")
    return path.parent


def _probe(folder: epath.PathLike) -> epath.Path:
    """A new file in a folder; where that is not there yet, in the nearest one around it."""
    remote = files.is_remote(folder)
    return epath.Path(folder if remote else disk.existing(folder)) / f".dry_run.{uuid.uuid4().hex}"


def _put(path: epath.Path, content: bytes = b"") -> None:
    try:
        files.write(path, content)
    except Exception as fault:  # of any store
        raise InputError(
            f"{path.parent} cannot be written to: {type(fault).__name__}, {_first_line(fault)}. "
            f"Give another place, or the right to write there."
        ) from fault


def check_lock(parts: Parts) -> Findings:
    """Whether another run holds the workdir; nothing is taken."""
    holder = lease.holder(parts.workdir)
    if holder is None:
        yield ok("nobody holds the workdir")
        return
    who = f"process {holder.pid} on {holder.host}"
    fate = holder.fate()
    if fate:
        yield error(
            f"{parts.workdir} is in use: {who} runs there. Wait for it or stop it, or give another "
            f"--workdir."
        )
    elif fate is None:
        yield warning(
            f"{lease.FILE} names {who}. A run waits until it has seen that this one is dead."
        )
    else:
        yield ok(f"{lease.FILE} was left by {who}, which is dead")


def check_text_encoder(parts: Parts) -> Findings:
    encoder, section = parts.text_encoder, parts.config.text_encoder
    encoder.check_weights()
    _, mask = encoder.tokenize([_SAMPLE])
    yield ok(
        f"{_name(section)}: {encoder.feature_dim} features, {encoder.max_tokens} slots; "
        f"{_SAMPLE!r} fills {int(mask.sum())} of them"
    )


def check_autoencoder(parts: Parts) -> Findings:
    autoencoder = parts.autoencoder
    autoencoder.check_weights()
    yield ok(
        f"{_name(parts.config.autoencoder)}: {autoencoder.channels} channels, "
        f"{autoencoder.downscale} pixel(s) to a latent along each side"
    )


def _name(section: ConfigDict) -> str:
    return f"{section.kind} from {section.path}" if section.path else section.kind


def check_model(parts: Parts) -> Findings:
    model = parts.model
    count = sum(x.size for x in jax.tree.leaves(next_dit.abstract_params(model)))
    yield ok(
        f"{parts.config.model.preset}: {count:,} parameters; {model.num_layers} layers of "
        f"{model.dim}, {model.num_heads} heads, patches of {model.patch_size}, {model.dtype}"
    )


def check_data(parts: Parts) -> Findings:
    config = parts.config
    policy = train.caption_policy(config.data)
    records_of: dict[Bucket, int] = {}
    for dataset in train.make_datasets(config.data):
        yield from _look_into(dataset, policy, config, records_of)
    yield from _occupancy(records_of, config.train.batch_size)
    loader = parts.loader
    buckets = loader.buckets
    yield from faults(train.check_buckets, config, buckets, parts.model, parts.encoders[1])
    if len(loader.manifests) > 1:
        for share, manifest, dataset in zip(
            loader.shares, loader.manifests, train.make_datasets(config.data), strict=True
        ):
            yield ok(_epochs(dataset, manifest, share * _num_images(config)))
    _ = parts.text_encoder  # tokenizes
    yield from _rate(parts, loader)


def _look_into(
    dataset: Dataset, policy: CaptionPolicy, config: ConfigDict, records_of: dict[Bucket, int]
) -> Findings:
    """One data set: its shards, captions, and a record of each bucket; counts into `records_of`."""
    try:
        manifest = Manifest.load(dataset.directory)
        splits = _chosen(manifest, config)
        records.check_complete(dataset.directory, splits)
    except InputError as fault:
        yield error(str(fault))
        return
    for split in splits:
        records_of[split.bucket] = records_of.get(split.bucket, 0) + split.num_records
    shards = [shard for split in splits for shard in split.shards]
    yield ok(
        f"{dataset.directory}: {sum(s.num_records for s in splits):,} records in {len(splits)} "
        f"bucket(s), {len(shards)} shard(s), {_size(sum(s.num_bytes for s in shards))}"
    )
    if not config.data.datasets:
        yield ok(_epochs(dataset, manifest, _num_images(config)))
    yield from _captions(dataset, manifest, policy)
    yield from _decode(dataset, manifest, splits, config)


def _chosen(manifest: Manifest, config: ConfigDict) -> list[Split]:
    """The splits with records that the config takes."""
    names = config.data.buckets
    return [s for s in manifest.splits if s.num_records and (not names or str(s.bucket) in names)]


def _epochs(dataset: Dataset, manifest: Manifest, num_images: int | float) -> str:
    times = num_images / max(manifest.num_records, 1)
    return f"{dataset.directory}: the run takes each record {times:,.2f} times"


def _captions(dataset: Dataset, manifest: Manifest, policy: CaptionPolicy) -> Findings:
    yield ok(
        f"{dataset.directory}: captions of kind {', '.join(manifest.kinds)} in "
        f"{', '.join(manifest.languages)}"
    )
    asked = {"languages": policy.languages}
    if len(set(policy.kinds.values())) > 1:  # else the config takes whatever there is
        asked["kinds"] = policy.kinds
    for what, weights in asked.items():
        there = getattr(manifest, what)
        if lacking := [name for name, weight in weights.items() if weight and name not in there]:
            yield warning(
                f"{dataset.directory} has no captions of {what} {', '.join(lacking)}, which "
                f"config.data.{what} asks for; the others take their place."
            )


def _decode(
    dataset: Dataset, manifest: Manifest, splits: list[Split], config: ConfigDict
) -> Findings:
    """Reads the first record of each bucket as the loader does."""
    count = 0
    for split in splits:
        try:
            _read_first(dataset.directory, manifest, split, config.data.cached)
        except Exception as fault:  # of a store, or what a decoder raises on damaged bytes
            yield warning(
                f"{dataset.directory}: record 0 of bucket {split.bucket} cannot be read "
                f"({type(fault).__name__}: {_first_line(fault)}). A run puts others in the place "
                f"of damaged ones; if there are many, make the data again."
            )
            continue
        count += 1
    if count:
        yield ok(f"{dataset.directory}: a record of each of {count} bucket(s) was read and decoded")


def _read_first(directory: str, manifest: Manifest, split: Split, cached: tuple[str, ...]) -> None:
    record = Record(Records(directory, split)[0])
    if "latents" in cached:
        manifest.cache["latents"].decode(record.latents, split.bucket)
    else:
        bucket = split.bucket
        images.decode_stored(record.image, np.empty((bucket.height, bucket.width, 3), np.uint8))
    if "cap_feats" in cached:
        for content in record.cap_feats:
            manifest.cache["cap_feats"].decode(content)
    _ = record.captions, record.id


def _occupancy(records_of: dict[Bucket, int], batch_size: int) -> Findings:
    """Records of each bucket, over all data sets, against those of a batch."""
    if not records_of:
        return
    ordered = sorted(records_of.items(), key=lambda item: (item[1], item[0]))
    shown = ordered if len(ordered) <= 6 else [*ordered[:3], None, *ordered[-2:]]
    filling = ", ".join(
        "..." if item is None else f"{item[0]} {item[1]:,} ({item[1] / batch_size:.1f})"
        for item in shown
    )
    yield ok(f"records of a bucket (and the batches that they fill): {filling}")
    small = [f"{bucket} ({count})" for bucket, count in ordered if count < batch_size]
    if small:
        yield warning(
            f"{len(small)} of {len(ordered)} bucket(s) have fewer records than the batch of "
            f"{batch_size}, so a batch of them holds some twice: {listed(small, 6)}. Fewer buckets "
            f"(config.data.buckets) or a smaller batch mend it."
        )


def _rate(parts: Parts, loader: Loader) -> Findings:
    """Records that this host can make, against those that the devices can take."""
    loader.batch_at(0)  # opens the files
    began = time.perf_counter()
    batch = loader.batch_at(1)
    seconds = time.perf_counter() - began
    num_threads = min(parts.config.data.num_threads, os.cpu_count() or 1)
    rate = num_threads * len(batch["ids"]) / seconds
    text = f"this host makes about {rate:,.0f} records/s with {num_threads} thread(s)"
    try:
        flops = train.step_flops(parts.config, parts.model, parts.num_slots, parts.text_slots)
    except MissingError:
        yield ok(text)
        return
    peak = _SHARE * jax.device_count() * peak_flops(jax.local_devices()[0])
    needed = len(batch["ids"]) / (flops / peak)
    text += f"; at {_SHARE:.0%} of the devices' peak the step takes {needed:,.0f} of them"
    if rate < needed:
        text += (
            ". The devices would wait for data: raise config.data.num_threads, or store features "
            "with tools/cache_features.py"
        )
    yield ok(text) if rate >= needed else warning(text)


def check_validation(parts: Parts) -> Findings:
    config = parts.config.validation
    loader = parts.validation_loader
    yield from faults(
        train.check_buckets, parts.config, loader.buckets, parts.model, parts.encoders[1]
    )
    where = f" of {config.directory}" if config.directory else ""
    when = f"every {config.every:,} steps" if config.every else "never measured"
    yield ok(f"{loader.num_held_out:,} records held out{where}, {when}")


def check_step(parts: Parts) -> Findings:
    _ = parts.program
    flops = train.step_flops(parts.config, parts.model, parts.num_slots, parts.text_slots)
    yield ok(
        f"{parts.num_slots} image slots and {parts.text_slots} text slots; "
        f"{flops / 1e12:,.3g} TFLOP a step"
    )


def check_previews(parts: Parts) -> Findings:
    """What draws previews, and what a checkpoint samples with by default."""
    config = parts.config.copy_and_resolve_references()
    _ = parts.text_encoder, parts.autoencoder
    for section in (config.text_encoder, config.autoencoder):
        if section.path and is_hub_name(section.path):
            section.path = str(fetched_folder(section.path))
    train.make_pipeline(config, parts.model, parts.mesh)
    prompts, every = len(config.preview.prompts), config.preview.every
    yield ok(
        f"{prompts} prompt(s) of {config.sampling.width} x {config.sampling.height} pixels, "
        + (f"every {every:,} steps" if every else "never drawn")
    )


def check_start(parts: Parts) -> Findings:
    """What the run begins with: its newest checkpoint, a stage before, published weights."""
    steps, num_steps = parts.steps, parts.config.train.num_steps
    source = parts.config.train.init_from
    if steps:
        directory = checkpoint.find(parts.workdir)
        saved = checkpoint.load_meta(directory)
        # First what needs neither data nor weights.
        model = checkpoint.plain(dataclasses.asdict(parts.model))
        checkpoint.check_same("model", saved["model"], model, directory)
        checkpoint.check_same_run(saved, parts.meta, directory)
        if steps[-1] >= num_steps:
            yield warning(
                f"{directory} is the last step of {num_steps:,}: there is nothing to do. Raise "
                f"config.train.num_steps to train longer, or give another --workdir."
            )
        else:
            yield ok(f"goes on from step {steps[-1]:,} of {num_steps:,}, in {directory}")
    elif not source:
        yield ok(f"a fresh model, drawn from seed {parts.config.seed}")
    elif is_hub_name(source) and fetched_folder(source) is None:
        yield warning(_not_fetched(source))
    else:
        handover.check(
            fetched_folder(source) if is_hub_name(source) else source,
            parts.state,
            model=parts.model,
            config=parts.config.to_dict(),
            init_weights=parts.config.train.init_weights,
            init_optimizer=parts.config.train.init_optimizer,
        )
        yield ok(f"takes over the weights in {source}")


def check_disk(parts: Parts) -> Findings:
    settings = parts.config.train
    size = disk.checkpoint_bytes(parts.state)
    most = disk.most_checkpoints(
        settings.num_steps,
        checkpoint_every=settings.checkpoint_every,
        keep_checkpoints=settings.keep_checkpoints,
        keep_checkpoint_every=settings.keep_checkpoint_every,
        keep_best_checkpoints=settings.keep_best_checkpoints,
    )
    there = len(parts.steps)
    needed = disk.needed_bytes(size, most, there)
    text = (
        f"a checkpoint has {_size(size)}; up to {most} lie side by side, {there} are there: "
        f"{_size(needed)} will be needed"
    )
    free = disk.free_bytes(parts.workdir)
    if free is None:
        yield ok(f"{text}. How much {parts.workdir} has room for is not known of a bucket.")
        return
    text += f", {_size(free)} are free"
    if free < disk.needed_bytes(size, min(most, 2), there):
        yield error(f"{text}. Not even two fit: make room, or give a --workdir elsewhere.")
    elif free < needed:
        yield warning(
            f"{text}. The run will stop when the disk is full: make room, lower "
            f"config.train.keep_checkpoints or raise config.train.keep_checkpoint_every."
        )
    else:
        yield ok(text)


def check_memory(parts: Parts) -> Findings:
    """Compiles the step, as the run would, and compares what it needs with a device's memory."""
    state = sharding.placed(parts.state, parts.mesh)
    batch = programs.abstract_batch(
        parts.config, parts.model, parts.mesh, parts.num_slots, parts.text_slots
    )
    began = time.perf_counter()
    try:
        with jax.set_mesh(parts.mesh):
            # Made here as the loop makes it: a key that lies elsewhere is of another program.
            key = jax.random.key(parts.config.seed)
            compiled = parts.program.step.compile(state, batch, key)
    except jax.errors.JaxRuntimeError as fault:
        if too_large := does_not_fit(str(fault)):
            yield error(f"The step {too_large}. {_SAVE_MEMORY}")
            return
        raise
    yield ok(
        f"the step of {parts.text_slots} text slots was compiled in "
        f"{time.perf_counter() - began:.1f} s{_kept(parts)}"
    )
    memory = compiled.memory_analysis()
    # Elsewhere the compiler's own peak leaves temporaries out.
    peak = peak_memory if sharding.platform() == "tpu" else total_memory
    step, encoders = peak(memory), _encoder_bytes(parts)
    held, given = sharding.device_bytes(state), sharding.device_bytes(batch)
    needed, (limit, what) = step + encoders, _device_memory()
    yield ok(
        f"a device holds {_size(held)} of the state, {_size(given)} of the batch, "
        f"{_size(step - memory.argument_size_in_bytes)} of temporaries and results, "
        f"{_size(encoders)} of frozen weights"
    )
    text = f"together {_size(needed)}, and what the encoders compute; a device has {_size(limit)}"
    text += f" ({what})"
    if needed > limit:
        yield error(f"{text}. {_SAVE_MEMORY}")
    elif needed > _FULL * limit:
        yield warning(f"{text}, which is nearly all. {_SAVE_MEMORY}")
    else:
        yield ok(text)


def _kept(parts: Parts) -> str:
    """Whether the run will find what was compiled: its key holds all that a checkpoint says."""
    try:
        _ = parts.meta
    except MissingError:
        return ""
    kept = jax.config.jax_compilation_cache_dir
    return "; it is kept, so the run will not wait for it again" if kept else ""


_SAVE_MEMORY = (
    "Raise config.train.num_microbatches, take a config.model.remat that saves less, more devices "
    "along mesh.data, or moments in bfloat16 (config.optim.moment_dtype)."
)


def _no_step(parts: Parts) -> Findings:
    try:
        _ = parts.program
        text = "because the batch does not split, or on another process"
    except MissingError as missing:
        text = f"because of what is said under {missing.check!r}"
    yield not_checked(text)


def _encoder_bytes(parts: Parts) -> int:
    """Of the frozen weights on one device."""
    return sum(sharding.device_bytes(e.placed_params(parts.mesh)) for e in parts.encoders)


def _device_memory() -> tuple[int, str]:
    """Bytes that a program may have on one device, and where that is known from."""
    if stats := jax.local_devices()[0].memory_stats():
        return stats["bytes_limit"], "as it says"
    if host := host_memory():
        return host[1] // jax.local_device_count(), "its share of the host's free memory"
    raise InputError("Neither the devices nor the system tell how much memory there is.")


def host_memory() -> tuple[int, int] | None:
    """Bytes of memory of this host, and how many are available; None where Linux does not say."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return 1024 * kib["MemTotal"], 1024 * kib["MemAvailable"]


def check_processes(parts: Parts) -> Findings:
    """What only all together can tell: do they run the same program, and see one workdir?"""
    yield ok(f"{jax.process_count()}, on {listed(sorted(set(gather(socket.gethostname()))), 6)}")
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    told = gather(versions)
    differing = {n: [each[n] for each in told] for n in versions if len({e[n] for e in told}) > 1}
    if differing:
        yield error(f"The processes have other versions of a library: {differing}.")
    yield from _shared(parts.workdir)


def _shared(workdir: str) -> Findings:
    """Whether what process 0 writes is seen by all; none may raise before all have told."""
    first, path = jax.process_index() == 0, _probe(workdir)
    path = epath.Path(gather(os.fspath(path))[0])
    written = gather(first and not list(faults(_put, path)))[0]
    seen = written and _exists(path)
    all_seen = all(gather(seen))
    if first and written:
        path.unlink()
    if not written:
        yield not_checked("whether all see one workdir: process 0 cannot write there")
    elif all_seen:
        yield ok(f"all of them see what is written in {path.parent}")
    elif not seen:
        yield error(
            f"what process 0 writes in {path.parent} is not seen here. Give a --workdir that all "
            f"hosts share, such as a bucket or a network disk."
        )


def _exists(path: epath.Path) -> bool:
    try:
        return path.exists()
    except Exception:  # of any store; to whoever asks it is not there
        return False


def _size(num_bytes: int) -> str:
    for unit in ("GiB", "MiB", "KiB"):
        scale = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}[unit]
        if num_bytes >= scale:
            return f"{num_bytes / scale:,.1f} {unit}"
    return f"{num_bytes:.0f} B"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


CHECKS = {
    "config": check_config,
    "devices": check_devices,
    "workdir": check_workdir,
    "lock": check_lock,
    "compiled": check_cache,
    "text encoder": check_text_encoder,
    "autoencoder": check_autoencoder,
    "model": check_model,
    "data": check_data,
    "validation": check_validation,
    "step": check_step,
    "previews": check_previews,
    "start": check_start,
    "disk": check_disk,
}
