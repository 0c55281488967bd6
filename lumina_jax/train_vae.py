"""Trains a small autoencoder, for latents to draw where there is none to download.

python -m lumina_jax.train_vae --config=configs/vae_tiny.py --workdir=runs/vae

    loss = mean (images - decoder(latents))^2 + kl_weight * mean KL(N(mean, variance) || N(0, 1))

with latents drawn from N(mean, variance). The same loop as for the model, and the same data set, of
which no caption is read. When it ends, or has ended before, the averaged weights are written to
<workdir>/vae as diffusers does, scaled so that latents have mean 0 and deviation 1, and
<workdir>/reconstruction.json says how near they come to the pictures.

Axes: B batch, H W picture height and width, h w latent height and width, C latent channels.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags, logging
from clu import parameter_overview
from etils import epath
from jaxtyping import Array, Float, PRNGKeyArray, UInt8
from ml_collections import ConfigDict, config_flags

from lumina_jax import (
    checkpoint,
    cli,
    distributed,
    executables,
    files,
    loop,
    metrics,
    optim,
    sharding,
)
from lumina_jax.data.buckets import Bucket
from lumina_jax.data.loader import Dataset, Loader, read_pictures
from lumina_jax.errors import InputError
from lumina_jax.frozen.autoencoder import signed
from lumina_jax.models import vae
from lumina_jax.models.vae import VAEConfig
from lumina_jax.sampling.contact_sheet import contact_sheet
from lumina_jax.train_step import TrainState, init_state, update
from lumina_jax.weights import vae as names

_COLUMNS = 8  # of a preview


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "A file in configs/.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and pictures go.")
    distributed.define_flags()


class Trainer:
    """A run: everything that the loop needs, built from its config and checked at once."""

    def __init__(self, config: ConfigDict, workdir: str):
        self.config, self.workdir = config, workdir
        if files.is_remote(workdir):
            raise InputError(
                f"--workdir={workdir} is not on a local disk, where the autoencoder is to be read "
                f"from afterwards. Give a local folder."
            )
        _check_numbers(config)
        changes = {key: value for key, value in config.vae.items() if value is not None}
        # Latents are scaled when it is known how large they are: at the end.
        unscaled = {"scaling_factor": 1.0, "shift_factor": 0.0}
        self.cfg = VAEConfig.preset(changes.pop("preset"), **changes, **unscaled)
        self.mesh = sharding.make_mesh(**config.mesh)
        self.loader = Loader(
            [Dataset(config.data.directory)],
            batch_size=config.train.batch_size,
            seed=config.seed,
            tokenize=no_tokens,
            buckets=[Bucket.parse(name) for name in config.data.buckets],
            num_threads=config.data.num_threads,
            prefetch=config.data.prefetch,
        )
        self._check_shapes()

        optim_config = optim.OptimConfig(**config.optim)
        if optim_config.name == "muon":
            raise InputError(
                "config.optim.name='muon' is for the transformer's matrices, which an autoencoder "
                "has not; take adamw or adafactor."
            )
        self.optimizer = optim.make_optimizer(optim_config, config.train.num_steps)
        self.learning_rate = optim.learning_rate(optim_config, config.train.num_steps)
        params = vae.abstract_params(self.cfg)
        self.abstract_state = jax.eval_shape(lambda p: init_state(p, self.optimizer), params)
        self.shardings = sharding.tree_shardings(self.abstract_state, self.mesh, sharding.VAE_RULES)
        step = make_train_step(
            self.cfg,
            self.optimizer,
            kl_weight=config.loss.kl_weight,
            ema_decay=optim_config.ema_decay,
        )
        replicated = sharding.named(self.mesh, ())
        self.step = jax.jit(step, donate_argnums=0, out_shardings=(self.shardings, replicated))
        self._reconstruct = jax.jit(
            functools.partial(reconstruct, self.cfg), out_shardings=replicated
        )

        self.pauses = (loop.Pause("preview", config.preview.every, self.preview),)
        self.checkpointer = checkpoint.Checkpointer(
            workdir,
            keep_latest=config.train.keep_checkpoints,
            keep_every=config.train.keep_checkpoint_every,
            if_damaged=config.train.if_damaged,
        )
        self.meta = {
            "config": config.to_dict(),
            "model": checkpoint.plain(dataclasses.asdict(self.cfg)),
            "data": {
                "fingerprint": self.loader.fingerprint,
                "buckets": [str(bucket) for bucket in self.loader.buckets],
                "seed": config.seed,
                "batch_size": config.train.batch_size,
            },
            "optimizer": {"name": optim_config.name},
        }

    def _check_shapes(self) -> None:
        batch_size, shards = self.config.train.batch_size, sharding.batch_shards(self.mesh)
        if batch_size % shards:
            low = max(batch_size // shards, 1) * shards
            raise InputError(
                f"train.batch_size={batch_size} does not split over {shards} part(s) of the mesh; "
                f"nearest: {low} and {low + shards}."
            )
        unit = self.cfg.downscale
        for bucket in self.loader.buckets:
            if bucket.width % unit or bucket.height % unit:
                raise InputError(
                    f"Bucket {bucket} of {self.config.data.directory} is not a multiple of {unit} "
                    f"pixels, the side of a latent. Name other buckets in config.data.buckets, or "
                    f"fewer widths in config.vae.block_out_channels: each but the last halves the "
                    f"sides."
                )

    def init_state(self) -> tuple[TrainState, int]:
        """This run's newest checkpoint, else a fresh autoencoder; the index of the first batch."""
        if self.checkpointer.latest_step() is not None:
            return self.checkpointer.restore(self.abstract_state, self.shardings, self.meta)

        def make(key):
            return init_state(vae.init_params(self.cfg, key), self.optimizer)

        return jax.jit(make, out_shardings=self.shardings)(jax.random.key(self.config.seed)), 0

    def encode(self, host_batch: dict, index: int) -> Array:
        del index
        images = host_batch["images"]
        shape = (self.config.train.batch_size, *images.shape[1:])
        split = sharding.named(self.mesh, ("act_batch",))
        return jax.make_array_from_process_local_data(split, images, shape)

    def preview(self, state: TrainState, step: int, writer: metrics.Writer) -> None:
        """Draws rows of pictures, each above what the averaged weights make of it."""
        cells, captions = [], []
        for index in range(self.config.preview.num_rows):
            images = self.encode(self.loader.batch_at(index), index)
            for row, caption in zip(
                self._reconstruct(state.ema, images)[:2], ("picture", "reconstruction"), strict=True
            ):
                row = np.asarray(row.addressable_data(0))[:_COLUMNS]
                cells += list(np.round((row + 1) * 127.5).astype(np.uint8))
                captions += [caption] * len(row)
        if jax.process_index() == 0:
            columns = min(_COLUMNS, self.config.train.batch_size)
            sheet = contact_sheet(
                cells, captions, columns=columns, cell_size=96, title=f"step {step}"
            )
            writer.image(step, "preview", np.asarray(sheet))
            files.write_png(epath.Path(self.workdir) / "previews" / f"{step:07d}.png", sheet)

    def counts(self) -> dict[str, int]:
        return {"records_replaced": self.loader.num_replaced}

    def overview(self) -> str:
        return parameter_overview.get_parameter_overview(
            vae.abstract_params(self.cfg), include_stats=False
        )

    def flops(self, host_batch: dict) -> float:
        """The operations of a step with this batch, forward and backward, on all devices."""
        _, height, width, _ = host_batch["images"].shape
        forward = sum(vae.forward_flops(self.cfg, *_size(Bucket(width, height))))
        return 3.0 * forward * self.config.train.batch_size

    def measure(self, params: dict) -> dict[str, float | int]:
        """Mean and deviation of all latents of the data set, and how well it is reconstructed.

        The ratio of signal to noise is in dB, that of the mean error and that of the worst picture.
        """
        split = sharding.named(self.mesh, ("act_batch",))
        count, total, square, errors = 0, 0.0, 0.0, []
        for pictures, num in self._pictures():
            results = self._reconstruct(params, jax.device_put(pictures, split))
            images, made, latents = (
                np.asarray(result.addressable_data(0), np.float64)[:num] for result in results
            )
            count += latents.size
            total += latents.sum()
            square += np.square(latents).sum()
            errors += list(np.square(images - made).mean(axis=(1, 2, 3)))
        mean = total / count
        return {
            "num_pictures": len(errors),
            "psnr": float(psnr(np.mean(errors))),
            "psnr_worst": float(psnr(np.max(errors))),
            "latent_mean": float(mean),
            "latent_std": float(np.sqrt(square / count - mean**2)),
        }

    def _pictures(self) -> Iterator[tuple[UInt8[np.ndarray, "B H W 3"], int]]:
        """Every picture once, in batches of one size; the last of a size is filled up."""
        size = self.config.train.batch_size
        pictures = (picture["image"] for picture in read_pictures(self.config.data.directory))
        for shape, group in itertools.groupby(pictures, key=np.shape):
            if Bucket(shape[1], shape[0]) in self.loader.buckets:
                while rows := list(itertools.islice(group, size)):
                    yield np.stack(rows + rows[-1:] * (size - len(rows))), len(rows)

    def export(self, state: TrainState) -> None:
        """Writes the averaged weights as diffusers does, and how good they are beside them."""
        measured = self.measure(state.ema)
        cfg = dataclasses.replace(
            self.cfg,
            scaling_factor=1 / measured["latent_std"],
            shift_factor=measured["latent_mean"],
        )
        if jax.process_index() == 0:
            workdir = epath.Path(self.workdir)
            names.save(workdir / "vae", cfg, state.ema)
            text = json.dumps({"step": int(state.step), **measured}, indent=2)
            files.write(workdir / "reconstruction.json", text)
        logging.info(
            "%d pictures are reconstructed at %.2f dB, the worst at %.2f dB. The autoencoder is in "
            "%s/vae: config.autoencoder.kind=vae, config.autoencoder.path=%s.",
            measured["num_pictures"], measured["psnr"], measured["psnr_worst"], self.workdir,
            self.workdir,
        )  # fmt: skip


def make_train_step(
    cfg: VAEConfig,
    optimizer: optax.GradientTransformation,
    *,
    kl_weight: float,
    ema_decay: float,
) -> Callable[[TrainState, Array, PRNGKeyArray], tuple[TrainState, dict]]:
    """Returns `step(state, images, key) -> (state, metrics)`, ready for `jax.jit`."""

    def loss_fn(params, images, key):
        mean, logvar = vae.encode_moments(cfg, params, images)
        made = vae.decode(cfg, params, vae.draw(mean, logvar, key))
        errors = jnp.mean(jnp.square(made - images), axis=(1, 2, 3))
        divergences = 0.5 * jnp.mean(
            jnp.square(mean) + jnp.exp(logvar) - 1 - logvar, axis=(1, 2, 3)
        )
        finite = jnp.isfinite(errors + divergences)
        reconstruction, kl = jnp.mean(errors), jnp.mean(divergences)
        parts = {"reconstruction": reconstruction, "kl": kl, "finite": finite}
        return reconstruction + kl_weight * kl, parts

    def step(state, images, key):
        key = jax.random.fold_in(key, state.step)
        (loss, parts), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, signed(images), key
        )
        grad_norm = optax.tree.norm(grads)
        applied = jnp.isfinite(grad_norm) & jnp.all(parts["finite"])
        numbers = {"loss": loss, "grad_norm": grad_norm, "applied": applied, **parts}
        numbers["psnr"] = psnr(parts["reconstruction"])
        return update(state, grads, applied, optimizer, ema_decay=ema_decay), numbers

    return step


def reconstruct(
    cfg: VAEConfig, params: dict, images: UInt8[Array, "B H W 3"]
) -> tuple[Float[Array, "B H W 3"], Float[Array, "B H W 3"], Float[Array, "B h w C"]]:
    """The images in [-1, 1], what their likeliest latents are decoded to, and those latents."""
    images = signed(images)
    latents = vae.encode(cfg, params, images)
    return images, jnp.clip(vae.decode(cfg, params, latents), -1, 1), latents


def psnr(error):
    """Of a mean squared error between images in [-1, 1]: 2^2 over it, in dB."""
    return 10 * jnp.log10(4 / error)


def no_tokens(captions: Sequence[str]):
    """No caption is read here."""
    return np.zeros((len(captions), 0), np.int32), np.zeros((len(captions), 0), bool)


def train(config: ConfigDict, workdir: str) -> TrainState:
    """Runs to the end, or to a signal; returns the last state, which is saved and exported."""
    trainer = Trainer(config, workdir)
    state = loop.run(trainer)
    trainer.export(state)
    return state


def _size(bucket: Bucket) -> tuple[int, int]:
    return bucket.height, bucket.width


def _check_numbers(config: ConfigDict) -> None:
    """Refuses what would stop the run, or a division, later."""
    preview = config.preview
    faults = loop.number_faults(config)
    if preview.num_rows < 1:
        faults.append(f"preview.num_rows={preview.num_rows} must be at least 1")
    if config.loss.kl_weight < 0:
        faults.append(f"loss.kl_weight={config.loss.kl_weight} must not be negative")
    if not config.data.directory:
        faults.append("data.directory is empty; make a data set with tools/prepare_data.py")
    if faults:
        raise InputError("config: " + "; ".join(faults) + ".")


def main() -> None:
    distributed.from_flags()
    executables.use_cache("", default=f"{flags.FLAGS.workdir}/compiled")
    train(flags.FLAGS.config, flags.FLAGS.workdir)


if __name__ == "__main__":
    define_flags()
    cli.run(main, required=("config", "workdir"))
