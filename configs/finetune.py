"""Fine-tuning of the released weights on pictures of your own, 1024 px.

    python tools/prepare_data.py folder --input=photos --output=data/photos --resolution=1024
    python -m lumina_jax.train --config=configs/finetune.py --workdir=runs/finetune

5,000 steps of 32 pictures, which is 16 times through 10,000 pictures: for fewer of them set
--config.train.num_steps lower.

Starts from: the released weights, read from the Hugging Face hub, or from what
--config.train.init_from names: a diffusers folder, an official or ComfyUI file, or the workdir of
stage 3. Published weights bring no moments, so the optimizer begins anew.

Topology: 16 v5e (4x4), two pictures a chip, or 8 H100, four a device. Parameters, average and
moments are split over all devices (mesh.data=-1), 2.6 GB of them on each of 16. Never run here.
Expected by tools/plan on 16 v5e (4x4): 7.1 GiB, 1.43 s a step, 32 chip-hours for 5,000 steps,
and the frozen encoders.
"""

from ml_collections import ConfigDict

from configs import stage1, stage3


def get_config() -> ConfigDict:
    config = stage3.get_config()
    config.seed = 3  # noise and order of its own
    config.mesh.update(replica=1, data=-1)
    # With stage 2's `names` a v5e is 1.3 of its 15.75 GiB short here, where a chip has twice the
    # parameters of stage 2. H100 have room for it: --config.model.remat=names.
    config.model.remat = "attention"

    # Over 16 chips the compiler would scatter gradients piece by piece, each added and copied: 1.64
    # seconds a step by tools/plan. Over the 32 of the stages it does not, and loses by this.
    config.compile.options = ConfigDict(
        {"TPU": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}}
    )

    config.data.directory = "data/photos"
    # All that a folder has: one text beside each picture, of any kind and language.
    config.data.kinds = ConfigDict({"long": 1.0, "medium": 1.0, "short": 1.0, "tags": 1.0})
    config.data.languages = ConfigDict()

    # All that follows is our choice. The stages' 2e-4 is for batches of 512; a batch of 32 has a
    # sixteenth of it by the linear rule, 1.25e-5.
    config.optim.learning_rate = 1e-5
    config.optim.warmup_steps = 100  # the moments are new, the weights are not
    # A mean of the last thousand steps: 0.9999 would hold on to the start for the whole run.
    config.optim.ema_decay = 0.999

    config.train.init_from = stage1.RELEASED
    config.train.num_steps = 5000
    config.train.batch_size = 32
    # Often, because a small set is overlearned soon: look at the previews and take an earlier one.
    config.train.log_every = 10
    config.train.checkpoint_every = 250
    config.train.keep_checkpoint_every = 1000
    config.preview.every = 250
    return config
