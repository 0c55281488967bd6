"""Our autoencoder equals diffusers.AutoencoderKL.

Random weights, every one of them (norms and biases too), go through the production name table.
"""

import jax
import numpy as np
import pytest
from flax import traverse_util

torch = pytest.importorskip("torch")
AutoencoderKL = pytest.importorskip("diffusers").AutoencoderKL

from lumina_jax.models import vae  # noqa: E402
from lumina_jax.models.vae import VAEConfig  # noqa: E402
from lumina_jax.weights.vae import tensors  # noqa: E402

pytestmark = pytest.mark.parity

CONFIGS = {
    "tiny": VAEConfig.preset(
        "tiny", layers_per_block=1, scaling_factor=0.7, shift_factor=0.2, dtype="float32"
    ),
    # Levels and blocks as in the released one, a sixteenth as wide.
    "narrow flux": VAEConfig.preset(
        "flux", block_out_channels=(8, 16, 32, 32), norm_num_groups=4, dtype="float32"
    ),
    # Odd on purpose: the level below is narrower, one block each, no attention.
    "odd": VAEConfig(
        block_out_channels=(24, 16), layers_per_block=1, latent_channels=5, norm_num_groups=8,
        mid_block_add_attention=False, scaling_factor=2.0, shift_factor=-1.0, dtype="float32",
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request):
    """Our config and parameters, and their model with the same weights."""
    cfg = CONFIGS[request.param]
    theirs = AutoencoderKL.from_config(cfg.to_json())
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            noise = torch.from_numpy(rng.normal(size=parameter.shape).astype(np.float32))
            if parameter.ndim == 1:
                is_scale = "norm" in key and key.endswith("weight")
                parameter.copy_(is_scale + 0.2 * noise)
            else:
                parameter.copy_(noise / np.prod(parameter.shape[1:]) ** 0.5)
    state = {name: value.numpy() for name, value in theirs.state_dict().items()}
    flat = {t.path: t.to_ours(state[t.name]) for t in tensors(cfg)}
    return cfg, traverse_util.unflatten_dict(flat, sep="/"), theirs


def call_theirs(function, x):
    """NHWC in and out."""
    with torch.no_grad():
        found = function(torch.permute(torch.as_tensor(x), (0, 3, 1, 2)))
    return torch.permute(found, (0, 2, 3, 1)).numpy()


def assert_close(ours, theirs, relative=2e-5):
    scale = np.abs(theirs).max()
    assert scale > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=relative * scale)


def test_encoding_and_decoding_equal_diffusers(pair):
    """Mean and log variance; then latents and images as their pipelines shift and scale them."""
    cfg, params, theirs = pair
    rng = np.random.default_rng(1)
    images = rng.uniform(-1, 1, size=(2, 24, 40, 3)).astype(np.float32)
    sides = 24 // cfg.downscale, 40 // cfg.downscale
    latents = rng.normal(size=(2, *sides, cfg.latent_channels)).astype(np.float32)

    @jax.jit
    def ours(params, images, latents):
        moments = vae.encode_moments(cfg, params, images)
        return *moments, vae.encode(cfg, params, images), vae.decode(cfg, params, latents)

    mean, logvar, encoded, decoded = ours(params, images, latents)
    their_mean = call_theirs(lambda x: theirs.encode(x).latent_dist.mode(), images)
    assert_close(mean, their_mean)
    assert_close(logvar, call_theirs(lambda x: theirs.encode(x).latent_dist.logvar, images))
    scale, shift = theirs.config.scaling_factor, theirs.config.shift_factor
    assert_close(encoded, (their_mean - shift) * scale)
    assert_close(decoded, call_theirs(lambda x: theirs.decode(x / scale + shift).sample, latents))


def test_the_released_sizes_have_the_names_and_shapes_of_diffusers():
    """244 tensors, 83,819,683 numbers."""
    cfg = VAEConfig.preset("flux")
    with torch.device("meta"):
        theirs = AutoencoderKL.from_config(cfg.to_json())
    ours = {t.name: t.shape for t in tensors(cfg)}
    assert ours == {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
    assert len(ours) == 244
    assert sum(np.prod(shape, dtype=np.int64) for shape in ours.values()) == 83_819_683
