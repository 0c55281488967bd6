"""Training an autoencoder: it learns, goes on where it stopped, and is what diffusers reads."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from configs import vae_tiny
from lumina_jax import sharding
from lumina_jax.data.loader import read_pictures
from lumina_jax.errors import InputError
from lumina_jax.frozen.autoencoder import VAE
from lumina_jax.train_vae import Trainer, train


@pytest.fixture
def config(dataset):
    return make_config(dataset)


def make_config(dataset):
    config = vae_tiny.get_config()
    config.data.update(directory=str(dataset), buckets=("32x32",))  # one shape, one compilation
    config.vae.update(
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        mid_block_add_attention=False,
    )  # fmt: skip
    config.optim.update(learning_rate=1e-2, warmup_steps=0, schedule="constant")
    config.train.update(num_steps=6, batch_size=8, log_every=1, checkpoint_every=6)
    config.preview.update(every=6, num_rows=1)
    return config


@pytest.fixture(scope="module")
def resumed(dataset, tmp_path_factory):
    """Workdir and last state of three steps over eight devices, and three after a new start."""
    workdir, config = tmp_path_factory.mktemp("vae"), make_config(dataset)
    config.train.num_steps = 3
    train(config, str(workdir))
    config.train.num_steps = 6
    return workdir, train(config, str(workdir))


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def squares(dataset):
    """The pictures that are trained on."""
    images = [picture["image"] for picture in read_pictures(dataset)]
    return np.stack([image for image in images if image.shape == (32, 32, 3)])


def test_the_loss_falls_and_its_parts_are_reported(resumed):
    first, *_, last = every = lines(resumed[0])
    assert [line["step"] for line in every] == [1, 2, 3, 4, 5, 6]
    assert last["loss"] < 0.9 * first["loss"]
    assert last["psnr"] > first["psnr"]
    assert last["loss"] == pytest.approx(last["reconstruction"] + 1e-4 * last["kl"], rel=1e-4)


def test_pictures_are_shown_above_their_reconstructions(resumed):
    with Image.open(resumed[0] / "previews" / "0000006.png") as sheet:
        assert sheet.width > 3 * sheet.height


@pytest.mark.slow
def test_stop_and_resume_equals_an_uninterrupted_run_bit_for_bit(resumed, config, tmp_path):
    assert_equal(train(config, str(tmp_path)), resumed[1])


def test_the_averaged_weights_are_an_autoencoder_of_latents_of_unit_scale(resumed, dataset):
    workdir, state = resumed
    autoencoder = VAE(str(workdir), dtype="float32")
    params = autoencoder.load_params(sharding.make_mesh(replica=1, data=8, model=1))
    assert_equal(params, state.ema)

    images = squares(dataset)
    latents = jax.jit(autoencoder.encode)(params, images, jax.random.key(0))
    assert np.mean(latents) == pytest.approx(0, abs=1e-3)
    assert np.std(latents) == pytest.approx(1, abs=1e-3)
    made = np.clip(jax.jit(autoencoder.decode)(params, latents), -1, 1)
    errors = np.square(made - (images / 127.5 - 1)).mean(axis=(1, 2, 3))
    said = json.loads((workdir / "reconstruction.json").read_text())
    assert (said["step"], said["num_pictures"]) == (6, len(images))
    assert said["psnr"] == pytest.approx(10 * np.log10(4 / errors.mean()), abs=0.01)
    assert said["psnr_worst"] == pytest.approx(10 * np.log10(4 / errors.max()), abs=0.01)


@pytest.mark.parity
def test_diffusers_reads_it_and_makes_the_same_of_a_picture(resumed, dataset):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    workdir, _ = resumed
    theirs = diffusers.AutoencoderKL.from_pretrained(workdir / "vae", low_cpu_mem_usage=False)
    ours = VAE(str(workdir), dtype="float32")
    params = ours.load_params(sharding.make_mesh(replica=1, data=8, model=1))

    images = squares(dataset)
    with torch.no_grad():
        signed = torch.permute(torch.from_numpy(images) / 127.5 - 1, (0, 3, 1, 2))
        expected = theirs.decode(theirs.encode(signed).latent_dist.mode()).sample
    latents = jax.jit(ours.encode)(params, images, jax.random.key(0))
    found = jax.jit(ours.decode)(params, latents)
    np.testing.assert_allclose(found, torch.permute(expected, (0, 2, 3, 1)).numpy(), atol=2e-4)


def test_a_finished_run_writes_its_autoencoder_again(resumed, config):
    workdir, state = resumed
    before = {path: path.read_bytes() for path in (workdir / "vae").iterdir()}
    for path in before:
        path.unlink()
    assert_equal(train(config, str(workdir)), state)
    assert {path: path.read_bytes() for path in (workdir / "vae").iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"batch_size": 12}}, "batch_size=12 does not split over 8.*nearest: 8 and 16"),
        ({"train": {"log_every": 0}}, "train.log_every=0 must be at least 1"),
        (
            {"train": {"keep_checkpoint_every": -1}},
            "train.keep_checkpoint_every=-1 must be at least 0",
        ),
        ({"preview": {"num_rows": 0}}, "preview.num_rows=0 must be at least 1"),
        ({"loss": {"kl_weight": -1.0}}, "loss.kl_weight=-1.0 must not be negative"),
        ({"data": {"directory": ""}}, "data.directory is empty"),
        ({"vae": {"preset": "sdxl"}}, "'sdxl' is not one of tiny, flux"),
        ({"vae": {"block_out_channels": (8,) * 7}}, "Bucket 32x32 .* not a multiple of 64 pixels"),
    ],
)
def test_a_run_that_cannot_work_is_refused_before_it_starts(config, tmp_path, changes, message):
    for section, values in changes.items():
        config[section].update(values)
    with pytest.raises(InputError, match=message):
        Trainer(config, str(tmp_path))


def test_a_run_on_a_bucket_is_refused_because_its_autoencoder_could_not_be_read(config):
    with pytest.raises(InputError, match="--workdir=gs://here/vae is not on a local disk"):
        Trainer(config, "gs://here/vae")


def test_muon_is_refused(config, tmp_path):
    config.optim.name = "muon"
    with pytest.raises(InputError, match="'muon' is for the transformer's matrices"):
        Trainer(config, str(tmp_path))
