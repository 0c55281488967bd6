"""A pipeline that draws in a second: random weights, letters as features, pixels as latents."""

import jax
import numpy as np

from lumina_jax import checkpoint, sharding
from lumina_jax.frozen.autoencoder import Pixels
from lumina_jax.models.next_dit import NextDiTConfig, abstract_params, init_params
from lumina_jax.sampling.pipeline import Pipeline
from lumina_jax.sampling.sampler import SamplerConfig

MODEL = NextDiTConfig(
    dim=32, num_layers=1, num_refiner_layers=1, num_heads=4, num_kv_heads=2, hidden_dim=64,
    axes_dims=(4, 2, 2), in_channels=3, patch_size=4, cap_feat_dim=8, dtype="float32",
)  # fmt: skip
DEFAULTS = SamplerConfig(
    num_steps=5, guidance_scale=3.0, guidance_truncation=0.6, guidance_renorm=1.0,
    semantics="official", solver="euler", time_shift=2.0,
)  # fmt: skip


class Letters:
    """A text encoder whose features are its letters."""

    feature_dim, max_tokens, num_truncated = 8, 6, 0

    def placed_params(self, mesh):
        return jax.ShapeDtypeStruct((256, 8), np.float32, sharding=sharding.named(mesh, ()))

    def check_weights(self):
        pass  # they are drawn

    def load_params(self, mesh):
        return jax.device_put(
            jax.random.normal(jax.random.key(5), (256, 8)), sharding.named(mesh, ())
        )

    def fingerprint(self):
        return "letters"

    def tokenize(self, captions):
        ids = np.zeros((len(captions), 6), np.int32)
        for row, text in zip(ids, captions, strict=True):
            content = b"\x01" + text.encode()
            self.num_truncated += len(content) > 6
            row[: len(content[:6])] = list(content[:6])
        return ids, ids > 0

    def encode(self, params, token_ids, token_mask):
        return params[token_ids] * token_mask[..., None]


def random_params(model):
    """Of NumPy, which compiles nothing for them; none of them is zero, as many are at the start."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: 0.3 * rng.standard_normal(x.shape, np.float32), abstract_params(model)
    )


def make_pipeline(**mesh):
    params = random_params(MODEL)
    devices = jax.devices() if mesh else jax.devices()[:1]
    mesh = sharding.make_mesh(**{"replica": 1, "data": 1, "model": 1, **mesh}, devices=devices)
    return Pipeline(
        MODEL,
        jax.device_put(params, sharding.tree_shardings(params, mesh)),
        text_encoder=Letters(),
        autoencoder=Pixels(),
        defaults=DEFAULTS,
        size=(16, 16),
        system_prompt="empty",
        mesh=mesh,
    )


def save_run(workdir, *, side, num_steps, max_tokens, **sizes):
    """A checkpoint with random weights of such `sizes`, for commands that open one."""
    model = NextDiTConfig(
        num_layers=2, num_refiner_layers=1, num_heads=4, in_channels=3, patch_size=4,
        cap_feat_dim=512, dtype="float32", **sizes,
    )  # fmt: skip
    config = {
        "text_encoder": {"kind": "use", "path": "", "max_tokens": max_tokens},
        "autoencoder": {"kind": "pixels", "path": ""},
        "sampling": {
            "height": side, "width": side, "num_steps": num_steps, "guidance_scale": 2.0,
            "guidance_truncation": 1.0, "guidance_renorm": 0.0, "semantics": "official",
            "solver": "euler", "time_shift": 1.0, "system_prompt": "empty",
        },
    }  # fmt: skip
    params = init_params(model, jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.02, params)  # what begins at zero draws nothing
    checkpoint.save_weights(workdir, params, checkpoint.weights_meta(model, config))
