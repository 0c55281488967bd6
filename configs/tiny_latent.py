"""As tiny.py, but in the latents of a small autoencoder, as the large models work.

    python -m lumina_jax.train_vae --config=configs/vae_tiny.py --workdir=runs/vae
    python -m lumina_jax.train --config=configs/tiny_latent.py --workdir=runs/tiny_latent

With an autoencoder of 38.2 dB (1,500 steps and two blocks a level, before vae_tiny.py was made
smaller): loss 0.16 near the end; of 64 samples all are nearest to their own training picture, and
0.94 of 64 in languages left out.
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
    config = tiny.get_config()
    config.autoencoder.update(kind="vae", path="runs/vae", dtype="float32")
    config.model.patch_size = 1  # a latent is four pixels wide: 64 tokens, as in tiny.py
    return config
