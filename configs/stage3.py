"""Stage 3: 1024 px, tuning on the best pictures, from stage 2.

    python -m lumina_jax.train --config=configs/stage3.py --workdir=gs://bucket/stage3 \
        --config.train.init_from=gs://bucket/stage2 --config.data.directory=gs://bucket/data/hq

    paper, table 3    pixels  pictures  steps    batch  learning rate  A100-days
                      1024    1M        15,000   512    2e-4           224

The best million of stage 2's pictures, each seen 7.7 times. The paper's table 8 has the best
GenEval at step 5,000 of 15,000 (0.73; 0.72 at 11,000, where DPG is 87.6 after 87.2). So every
1000th checkpoint stays: compare them, `lumina_jax.sample --step=5000` draws with one.

From the stage before: the averaged weights of its last checkpoint, and nothing else, as in stage 2.

Topology: as stage 2, 256 v5e (16x16), two pictures a chip; on 64 v5p
--config.mesh.replica=2 --config.model.remat=dots.
Expected by tools/plan: 1.24 s a step, 5.2 hours, 1,320 chip-hours on 256 v5e (never run there);
other topologies in docs/performance.md. The frozen encoders are as in stage 2. The paper's
A100-days for a step are 3.4 times those of stage 2, at the same batch and size; it does not say
why.
"""

from ml_collections import ConfigDict

from configs import stage2


def get_config() -> ConfigDict:
    config = stage2.get_config()
    config.seed = 2  # as in stage 2: noise of its own
    # The learning rate stays at 2e-4, which the paper has for all stages, with the warm-up, the
    # captions and both losses of stage 2 (the official fine-tuning program keeps the second, too).
    config.train.num_steps = 15_000
    # 15 checkpoints of 42 GB: weights, average and two moments in float32.
    config.train.keep_checkpoint_every = 1000
    return config
