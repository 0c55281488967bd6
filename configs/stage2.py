"""Stage 2: 1024 px, from stage 1.

    python -m lumina_jax.train --config=configs/stage2.py --workdir=gs://bucket/stage2 \
        --config.train.init_from=gs://bucket/stage1 --config.data.directory=gs://bucket/data/1024

    paper, table 3    pixels  pictures  steps    batch  learning rate  A100-days
                      1024    10M       40,000   512    2e-4           176

The best 10M of the pictures, each seen twice. A second loss, on the same latents averaged over
4 x 4, 256 tokens, keeps what was learned at low resolution (paper equation 4).

From the stage before: the averaged weights of its last checkpoint. Optimizer, average, learning
rate, step and data begin anew; the log says so (docs/training.md, "From one stage to the next").

Topology: as stage 1, 256 v5e (16x16), two pictures a chip. On 64 v5p (4x4x4):
--config.mesh.replica=2 --config.model.remat=dots. On 64 v6e (8x8): --config.mesh.replica=2
--config.train.num_microbatches=2.
Expected by tools/plan: 1.24 s a step, 412 images/s, 14 hours, 3,530 chip-hours on 256 v5e (never
run there); other topologies in docs/performance.md. The frozen encoders take 0.21 s more, unless
their features are cached (docs/data.md).
"""

from ml_collections import ConfigDict

from configs import stage1


def get_config() -> ConfigDict:
    config = stage1.get_config()
    # Our choice: another seed, so that noise is not that of stage 1 again.
    config.seed = 1
    # 4352 tokens a picture: what `dots` keeps has no room here.
    config.model.remat = "names"

    config.data.resolution = 1024  # 51 buckets of about 4096 tokens
    # Our choice: 256 text slots are 6 % of the tokens now, not worth batches of one kind.
    config.data.text_slots = ConfigDict()

    # Our choice, the paper gives no weight: both losses alike, as in the released program, which
    # also draws the times of both by the shift of the large picture ("main").
    config.flow.auxiliary_weight = 1.0
    config.flow.auxiliary_shift = "main"

    # Our choice: averaged weights draw the better pictures, so they are what is worth going on
    # from. Moments belong to the raw weights and to the gradients at 256 px, and Adam's second
    # moment forgets in twenty steps; so they begin anew, and the learning rate is warmed up.
    config.train.init_weights = "ema"
    config.train.init_optimizer = "fresh"
    config.optim.warmup_steps = 500

    config.train.num_steps = 40_000
    config.train.batch_size = 512
    config.sampling.update(height=1024, width=1024)
    return config
