"""The config of a run of a few seconds: real pictures, real text features, a very small model."""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
    config = tiny.get_config()
    config.data.resolution = 32
    config.text_encoder.max_tokens = 8
    # Eight heads and widths of 8 n, so that every mesh of eight devices can split it.
    config.model.update(
        patch_size=4, dim=64, num_layers=2, num_refiner_layers=1, num_heads=8, num_kv_heads=8,
        hidden_dim=128, axes_dims=(4, 2, 2),
    )  # fmt: skip
    config.optim.update(learning_rate=1e-3, warmup_steps=2)
    config.train.update(num_steps=6, batch_size=8, log_every=1, checkpoint_every=3)
    config.preview.update(every=0, prompts=("dog face", "Hund"))
    config.sampling.update(height=32, width=32, num_steps=3)
    return config
