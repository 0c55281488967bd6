"""Stage 2: 1024 px, the best 10M of the pictures, from stage 1 (paper table 3).

    python -m lumina_jax.train --config=configs/stage2.py --workdir=gs://bucket/stage2 \
        --config.train.init_from=gs://bucket/stage1 --config.data.directory=gs://bucket/data/1024

40k steps of 512 pictures; the paper took 176 A100-days. A second loss on the same latents averaged
over 4 x 4 keeps what was learned at low resolution (paper equation 4).
"""

from ml_collections import ConfigDict

from configs import stage1


def get_config() -> ConfigDict:
    config = stage1.get_config()
    config.data.resolution = 1024  # 51 buckets of about 4096 tokens
    config.flow.auxiliary_weight = 1.0
    config.train.num_steps = 40_000
    config.train.batch_size = 512
    config.sampling.update(height=1024, width=1024)
    return config
