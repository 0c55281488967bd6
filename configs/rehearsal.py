"""Three stages of seconds, as those of the paper: low resolution, high with two losses, high again.

    launch/local.sh 2

runs them as two processes of this machine, kills one and terminates one (launch/rehearsal.sh).
--config=configs/rehearsal.py:2 is the second stage. The 67,676 parameters learn nothing of use.
"""

from ml_collections import ConfigDict

from configs import tiny

NUM_STEPS = {"1": 2, "2": 40, "3": 40}  # of the last two enough to be stopped within


def get_config(stage: str) -> ConfigDict:
    config = tiny.get_config()
    config.seed = int(stage)
    config.model.update(
        patch_size=2, dim=32, num_layers=1, num_refiner_layers=1, num_heads=4, num_kv_heads=4,
        hidden_dim=64, axes_dims=(4, 2, 2),
    )  # fmt: skip
    config.text_encoder.max_tokens = 8
    config.data.resolution = 16 if stage == "1" else 32
    config.flow.auxiliary_weight = 0.0 if stage == "1" else 1.0
    config.optim.update(schedule="constant", warmup_steps=2, ema_decay=0.5)
    config.train.update(num_steps=NUM_STEPS[stage], batch_size=8, log_every=1, checkpoint_every=10)
    config.preview.every = 0
    return config
