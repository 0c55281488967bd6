"""A small autoencoder of the pictures of tiny.py.

    python tools/prepare_data.py openmoji --output=data/openmoji --flagfile=configs/tiny_data.flags
    python -m lumina_jax.train_vae --config=configs/vae_tiny.py --workdir=runs/vae

Latents a quarter as wide and high, of four channels. On two cores of a shared server with other
programs running: 7 minutes, 3.8 steps/s; the 64 pictures come back at 35.7 dB, the worst at 32.6.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0

    # A named size, and changes to it; None is the preset's.
    config.vae = vae = ConfigDict()
    vae.preset = "tiny"  # or flux
    vae.block_out_channels = config_dict.placeholder(tuple)  # each level but the last halves sides
    vae.layers_per_block = 1
    vae.latent_channels = config_dict.placeholder(int)
    vae.norm_num_groups = config_dict.placeholder(int)
    vae.mid_block_add_attention = config_dict.placeholder(bool)
    vae.dtype = "float32"  # of the computation; or bfloat16

    config.mesh = ConfigDict({"replica": 1, "data": -1, "model": 1})  # see base.py

    config.data = data = ConfigDict()
    data.directory = "data/openmoji"
    data.buckets = ()  # all of the data set's
    data.num_threads = 1
    data.prefetch = 4

    config.loss = ConfigDict({"kl_weight": 1e-4})  # the mean over pixels weighs 1

    config.optim = optim = ConfigDict()
    optim.name = "adamw"  # or adafactor
    optim.learning_rate = 2e-3
    optim.warmup_steps = 50
    optim.schedule = "cosine"
    optim.b1 = 0.9
    optim.b2 = 0.99
    optim.eps = 1e-15
    optim.muon_momentum = 0.95  # of no use here
    optim.moment_dtype = "float32"
    optim.weight_decay = 0.0
    optim.grad_clip = 1.0
    optim.ema_decay = 0.99

    config.train = train = ConfigDict()
    train.num_steps = 1200
    train.batch_size = 8
    train.log_every = 50
    train.checkpoint_every = 300
    train.keep_checkpoints = 2
    train.keep_checkpoint_every = 0  # steps; these are kept for ever
    train.if_damaged = "stop"  # a checkpoint that cannot be read; or previous: take the one before
    # In a row, whose loss or gradient is not finite. They are not applied; then the run ends.
    train.max_skipped_steps = 10
    train.hang_timeout = (
        1800.0  # seconds without a step, a save or the like, then it ends; 0: never
    )
    # Steps to record with the profiler, such as (100, 110): 100 to 109. Also on demand: a file
    # `profile` in the workdir, see docs/training.md.
    train.profile_steps = ()

    config.preview = ConfigDict({"every": 400, "num_rows": 3})  # rows of pictures; every 0: never
    return config
