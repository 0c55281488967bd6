"""Picture codecs: where their files may lie, what they draw, what changes their fingerprint."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lumina_jax import sharding
from lumina_jax.errors import InputError
from lumina_jax.frozen.autoencoder import VAE, Autoencoder, Pixels, make_autoencoder, signed
from lumina_jax.models import vae
from lumina_jax.weights.vae import CONFIG_FILE, WEIGHTS_FILE, save

CFG = vae.VAEConfig(
    block_out_channels=(8, 8), layers_per_block=1, latent_channels=2, norm_num_groups=2,
    mid_block_add_attention=False, scaling_factor=0.5, shift_factor=0.3, dtype="float32",
)  # fmt: skip
IMAGES = np.random.default_rng(1).integers(0, 256, size=(2, 8, 12, 3), dtype=np.uint8)


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: rng.normal(scale=0.4, size=x.shape).astype(np.float32), vae.abstract_params(CFG)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """As diffusers keeps a pipeline, or train_vae its result: the autoencoder is in vae/."""
    folder = tmp_path_factory.mktemp("pipeline")
    save(folder / "vae", CFG, make_params())
    return folder


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(replica=1, data=8, model=1)


def copy(folder, target, **changes):
    """The autoencoder of `folder`, with changes to its config."""
    config = json.loads((folder / "vae" / CONFIG_FILE).read_text()) | changes
    (target / CONFIG_FILE).write_text(json.dumps(config))
    (target / WEIGHTS_FILE).write_bytes((folder / "vae" / WEIGHTS_FILE).read_bytes())
    return str(target)


def test_weights_come_back_as_they_were_saved_on_every_device(folder, mesh):
    autoencoder = VAE(str(folder), dtype="float32")
    params = autoencoder.load_params(mesh)
    jax.tree.map(np.testing.assert_array_equal, params, make_params())
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(params))
    assert (autoencoder.downscale, autoencoder.channels) == (2, 2)
    assert isinstance(autoencoder, Autoencoder)


def test_only_kernels_are_kept_in_bfloat16(folder, mesh):
    resnet = VAE(str(folder)).load_params(mesh)["encoder"]["down_blocks"]["0"]["resnets"]["0"]
    assert resnet["conv1"]["kernel"].dtype == jnp.bfloat16
    assert resnet["conv1"]["bias"].dtype == resnet["norm1"]["scale"].dtype == jnp.float32


def test_the_folder_of_a_pipeline_and_that_of_the_autoencoder_are_the_same(folder, tmp_path):
    whole, alone = VAE(str(folder)), VAE(str(folder / "vae"))
    assert whole.folder == alone.folder == folder / "vae"
    assert whole.fingerprint() == alone.fingerprint() == VAE(copy(folder, tmp_path)).fingerprint()


def test_one_of_several_precisions_is_read(folder, tmp_path, mesh):
    """As on the hub, where fp16 lies beside float32."""
    path = copy(folder, tmp_path)
    (tmp_path / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"not read")
    assert VAE(path).fingerprint() == VAE(str(folder)).fingerprint()


def test_the_likeliest_latents_need_no_key(folder, mesh):
    autoencoder = VAE(str(folder), dtype="float32")
    params, encode = autoencoder.load_params(mesh), jax.jit(autoencoder.encode)
    latents = encode(params, IMAGES, jax.random.key(0))
    assert latents.shape == (2, 4, 6, 2)
    np.testing.assert_array_equal(latents, encode(params, IMAGES, jax.random.key(1)))
    images = jax.eval_shape(autoencoder.decode, params, latents)
    assert (images.shape, images.dtype) == (IMAGES.shape, jnp.float32)


def test_a_draw_has_the_predicted_mean_and_deviation_and_follows_the_key(folder, mesh):
    """A thousand draws for the same picture."""
    autoencoder = VAE(str(folder), dtype="float32", sample=True)
    params, encode = autoencoder.load_params(mesh), jax.jit(autoencoder.encode)
    images = np.repeat(IMAGES[:1, :4, :4], 1024, axis=0)
    latents = encode(params, images, jax.random.key(0))
    mean, logvar = jax.jit(lambda p, x: vae.encode_moments(CFG, p, signed(x)))(params, images[:1])
    drawn, deviation = np.asarray(latents) / 0.5 + 0.3, np.exp(logvar[0] / 2)
    assert np.all(np.abs(drawn.mean(axis=0) - mean[0]) < 5 * deviation / 32)
    np.testing.assert_allclose(drawn.std(axis=0), deviation, rtol=0.12)
    np.testing.assert_array_equal(latents, encode(params, images, jax.random.key(0)))
    assert np.abs(latents - encode(params, images, jax.random.key(1))).max() > 0.1


def test_bytes_become_numbers_from_minus_one_to_one():
    ends = jnp.array([0, 255], jnp.uint8).reshape(1, 1, 2, 1).repeat(3, axis=3)
    np.testing.assert_array_equal(signed(ends)[0, 0], [[-1] * 3, [1] * 3])
    np.testing.assert_array_equal(Pixels().encode((), ends, jax.random.key(0)), signed(ends))


def test_whatever_changes_the_latents_changes_the_fingerprint(folder, tmp_path):
    path, other = str(folder), tmp_path / "other"
    save(other, CFG, make_params(seed=1))
    found = [
        VAE(path), VAE(path, dtype="float32"), VAE(path, sample=True), VAE(str(other)),
        VAE(copy(folder, tmp_path, scaling_factor=0.6)),
    ]  # fmt: skip
    assert len({autoencoder.fingerprint() for autoencoder in found}) == len(found)


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("jpeg", {}, "autoencoder.kind='jpeg' is not one of pixels, vae"),
        ("pixels", {"path": "runs/vae"}, "path='runs/vae' .*'pixels' has no weights"),
        ("pixels", {"sample": True}, "autoencoder.sample=True .*nothing to draw"),
        ("vae", {}, "autoencoder.path is empty"),
        ("vae", {"path": "/no/such/folder"}, "No file or folder at /no/such/folder"),
    ],
)
def test_what_a_config_cannot_mean_is_refused(kind, given, message):
    with pytest.raises(InputError, match=message):
        make_autoencoder(kind, **given)


def test_a_folder_without_an_autoencoder_is_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match=r"no config.json but notes.txt.*when it ends"):
        VAE(str(tmp_path))


def test_an_autoencoder_of_another_kind_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match="use_quant_conv is True, needed False"):
        VAE(copy(folder, tmp_path, use_quant_conv=True))


def test_weights_of_other_sizes_are_refused(folder, tmp_path, mesh):
    autoencoder = VAE(copy(folder, tmp_path, latent_channels=3))
    with pytest.raises(InputError, match=r"mis-shaped encoder.conv_out.weight"):
        autoencoder.load_params(mesh)
