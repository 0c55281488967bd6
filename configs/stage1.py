"""Stage 1: 256 px, 100M pictures, from nothing (paper table 3).

    python -m lumina_jax.train --config=configs/stage1.py --workdir=gs://bucket/stage1 \
        --config.data.directory=gs://bucket/data/256

144k steps of 1024 pictures; the paper took 191 A100-days. The frozen text encoder and VAE are those
of the released pipeline: name a local copy with --config.text_encoder.path and
--config.autoencoder.path where a host cannot reach the Hugging Face hub.
"""

from ml_collections import ConfigDict

from configs import base

RELEASED = "Alpha-VLLM/Lumina-Image-2.0"


def get_config() -> ConfigDict:
    config = base.get_config()
    config.text_encoder.update(kind="gemma2", path=RELEASED)
    config.autoencoder.update(kind="vae", path=RELEASED)

    config.data.resolution = 256  # 15 buckets of about 256 tokens
    config.train.num_steps = 144_000
    config.train.batch_size = 1024

    config.preview.prompts = (
        "a red fox in the snow",
        "a glass of water on a wooden table, morning light",
        "一只橘猫坐在窗台上",
        "an old lighthouse on a cliff, oil painting",
    )
    config.sampling.update(height=256, width=256)
    return config
