"""Stage 3: 1024 px, the best million pictures, from stage 2 (paper table 3).

    python -m lumina_jax.train --config=configs/stage3.py --workdir=gs://bucket/stage3 \
        --config.train.init_from=gs://bucket/stage2 --config.data.directory=gs://bucket/data/hq

15k steps of 512 pictures; the paper took 224 A100-days and measured the best prompt alignment near
step 5,000 (table 8). The official fine-tuning program keeps stage 2's loss on averaged latents, and
so does this. `--config.train.init_from=Alpha-VLLM/Lumina-Image-2.0` starts from the released
weights instead.
"""

from ml_collections import ConfigDict

from configs import stage2


def get_config() -> ConfigDict:
    config = stage2.get_config()
    config.train.num_steps = 15_000
    return config
