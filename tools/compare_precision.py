"""What optimizers, moments of fewer bits and products in eight bits cost in precision.

    python tools/compare_precision.py --what=curve --optimizer=muon
    python tools/compare_precision.py --what=curve --quantization=int8 --num_steps=200
    python tools/compare_precision.py --what=moments
    python tools/compare_precision.py --what=products

`curve`: the loss of the tiny model on 64 smooth random pictures, each with features of its own.
`moments`: the root of Adam's second moment in bfloat16, against float32, on Gaussian gradients.
`products`: velocity and gradient of a random model in lower precision, against float32.
"""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl import flags

from lumina_jax import cli, optim
from lumina_jax.models import embed
from lumina_jax.models.next_dit import NextDiTConfig, init_params, make_forward
from lumina_jax.models.quantized import QUANTIZATIONS
from lumina_jax.train_step import init_state, make_train_step
from lumina_jax.types import Batch

_WHAT = flags.DEFINE_enum("what", None, ["curve", "moments", "products"], "See above.")
_OPTIMIZER = flags.DEFINE_enum("optimizer", "adamw", optim.OPTIMIZERS, "Of the curve.")
_MOMENT_DTYPE = flags.DEFINE_enum("moment_dtype", "float32", optim.MOMENT_DTYPES, "Likewise.")
_QUANTIZATION = flags.DEFINE_enum("quantization", "none", QUANTIZATIONS, "Likewise.")
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 2e-3, "Likewise.")
_NUM_STEPS = flags.DEFINE_integer("num_steps", 400, "After which the curve ends.")

TINY = {"in_channels": 3, "patch_size": 4, "cap_feat_dim": 32, "dtype": "float32", "remat": "none"}


def curve() -> None:
    """Prints the mean loss of forty steps, now and then. The schedule is that of 400 steps."""
    model = NextDiTConfig.preset("tiny", **TINY, quantization=_QUANTIZATION.value)
    config = optim.OptimConfig(
        name=_OPTIMIZER.value, moment_dtype=_MOMENT_DTYPE.value, schedule="cosine",
        learning_rate=_LEARNING_RATE.value, warmup_steps=50, b1=0.9, b2=0.95, eps=1e-15,
        muon_momentum=0.95, weight_decay=0.0, grad_clip=2.0, ema_decay=0.99,
    )  # fmt: skip
    optimizer = optim.make_optimizer(config, 400)
    step = make_train_step(
        make_forward(model), optimizer, time_distribution="logit_normal", time_shift=1.0,
        ema_decay=0.99,
    )  # fmt: skip
    step = jax.jit(step, donate_argnums=0)
    state = jax.jit(lambda key: init_state(init_params(model, key), optimizer))(jax.random.key(0))
    rng = np.random.default_rng(0)
    pictures = jax.image.resize(rng.uniform(-1, 1, (64, 4, 4, 3)), (64, 32, 32, 3), "cubic")
    features = jnp.asarray(rng.standard_normal((64, 4, 32)), jnp.float32)
    rng, losses = np.random.default_rng(0), []
    for _ in range(_NUM_STEPS.value):
        rows = rng.choice(64, 16, replace=False)
        image = embed.patchify(pictures[rows].astype(jnp.float32), 4, 64)
        batch = Batch(image, None, features[rows], jnp.ones((16, 4), bool))
        state, metrics = step(state, batch, jax.random.key(100))
        losses.append(float(metrics["loss"]))
        if len(losses) % 100 == 0:
            print(f"step {len(losses)}: loss {np.mean(losses[-40:]):.4f}")


def moments() -> None:
    """Prints, for each decay, the error of sqrt(v): of rounding to nearest, and stochastically."""
    rng = np.random.default_rng(0)

    def nearest(x):
        return x.astype(ml_dtypes.bfloat16).astype(np.float32)

    def stochastic(x):
        noise = rng.integers(0, 1 << 16, x.shape, dtype=np.uint32)
        return ((x.view(np.uint32) + noise) & np.uint32(0xFFFF0000)).view(np.float32)

    rules = {"exact": lambda x: x, "nearest": nearest, "stochastic": stochastic}
    scale = (10 ** rng.uniform(-6, -2, 4000)).astype(np.float32)
    for decay in np.float32([0.9, 0.95, 0.98, 0.99, 0.995, 0.999]):
        v = dict.fromkeys(rules, np.zeros(4000, np.float32))
        ratios = {"nearest": [], "stochastic": []}
        for step in range(6000):
            # Gradients a tenth as long from a third on: the moment has to fall.
            size = scale if step < 2000 else np.float32(0.1) * scale
            g = size * rng.standard_normal(4000).astype(np.float32)
            v = {k: rule(decay * v[k] + (1 - decay) * g * g) for k, rule in rules.items()}
            if step >= 5000 and step % 50 == 0:
                for k, found in ratios.items():
                    found.append(np.sqrt(v[k] / v["exact"]))
        print(
            f"b2={decay:.3f}",
            *(
                f"{k}: mean ratio {np.mean(r):.4f}, error "
                f"{np.sqrt(np.mean((np.array(r) - 1) ** 2)):.4f}"
                for k, r in ratios.items()
            ),
        )


def products() -> None:
    """Prints relative errors of the velocity and of the gradient of the layers."""
    cfg = NextDiTConfig(
        dim=384, num_layers=4, num_refiner_layers=1, num_heads=4, num_kv_heads=2, hidden_dim=1536,
        axes_dims=(32, 32, 32), cap_feat_dim=256, remat="none",
    )  # fmt: skip
    keys = iter(jax.random.split(jax.random.key(0), 200))
    # Kernels that start at zero would hide the blocks.
    params = jax.tree.map(
        lambda x: x if x.any() else 0.02 * jax.random.normal(next(keys), x.shape),
        init_params(cfg, next(keys)),
    )
    image = embed.patchify(jax.random.normal(next(keys), (4, 16, 16, 16)), 2, 64)
    cap_feats = jax.random.normal(next(keys), (4, 32, 256))
    target = jax.random.normal(next(keys), image.tokens.shape)
    t, mask = jnp.linspace(0.1, 0.9, 4), jnp.ones((4, 32), bool)

    def run(**changes):
        forward = make_forward(dataclasses.replace(cfg, **changes))

        def loss(params):
            velocity = forward(params, image, t, cap_feats, mask)
            return jnp.mean((velocity - target) ** 2), velocity

        grads, velocity = jax.jit(jax.grad(loss, has_aux=True))(params)
        return velocity.ravel(), jnp.concatenate([g.ravel() for g in jax.tree.leaves(grads)])

    exact = run(dtype="float32")
    for quantization in QUANTIZATIONS:
        found = run(dtype="bfloat16", quantization=quantization)
        velocity, gradient = (
            float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
            for a, b in zip(found, exact, strict=True)
        )
        print(f"bfloat16, {quantization}: velocity {velocity:.4f}, gradient {gradient:.4f}")


def main() -> None:
    {"curve": curve, "moments": moments, "products": products}[_WHAT.value]()


if __name__ == "__main__":
    cli.run(main, required=("what",))
