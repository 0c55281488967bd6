"""OpenMoji on a laptop, from nothing to pictures in ten minutes on two cores.

python tools/prepare_data.py openmoji --output=data/openmoji ...   (see `make demo`)
python -m lumina_jax.train --config=configs/tiny.py --workdir=runs/tiny
"""

from ml_collections import ConfigDict

from configs import base

# The languages trained on. German, Russian, Korean and Turkish are left out on purpose: prompts in
# them work all the same, because the text features are multilingual.
LANGUAGES = ("en", "es", "fr", "it", "pt", "id", "ja", "zh", "ar", "fa")


def get_config() -> ConfigDict:
    config = base.get_config()
    config.model.preset = "tiny"
    config.model.patch_size = 6
    config.model.dtype = "float32"
    config.model.remat = "none"

    config.data.directory = "data/openmoji"
    config.data.resolution = 48
    config.data.languages = LANGUAGES
    config.data.num_threads = 1
    config.data.prefetch = 4
    config.text_encoder.max_tokens = 16

    config.optim.learning_rate = 2e-3
    config.optim.warmup_steps = 50
    config.optim.schedule = "cosine"
    config.optim.ema_decay = 0.99

    config.train.num_steps = 1200
    config.train.batch_size = 32
    config.train.log_every = 20
    config.train.checkpoint_every = 200
    config.train.keep_checkpoints = 2
    config.train.keep_checkpoint_every = 0

    config.preview.every = 400
    config.preview.prompts = ("dog face", "perro", "Hund", "собака", "强", "strawberry")
    config.sampling.update(
        height=48, width=48, num_steps=25, guidance_scale=2.0, guidance_renorm=0.0, time_shift=1.0
    )
    return config
