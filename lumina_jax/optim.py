"""The optimizer, its learning rate over time, and the averaged weights.

An optimizer is a direction, and the same for all around it: the gradient is clipped by its global
norm before, decay and learning rate come after. Directions, all about as long as Adam's, so that
learning rates mean the same:

    adamw      Adam (arXiv 1711.05101)
    muon       matrices of the blocks: the nearest orthogonal matrix to the momentum, all singular
               values one (Jordan et al. 2024, arXiv 2502.16982); everything else: Adam
    adafactor  Adam's second moment as an outer product of row and column means (arXiv 1804.04235),
               with a first moment and without relative step sizes, as in arXiv 2106.04560

Axes: L layers, m inputs and n outputs of a matrix.
"""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from lumina_jax import sharding
from lumina_jax.errors import InputError

SCHEDULES = ("constant", "cosine")
OPTIMIZERS = ("adamw", "muon", "adafactor")
MOMENT_DTYPES = ("float32", "bfloat16")
MAX_STEPS = 2**31 - 1  # optax counts in int32
LARGEST = 2.0**127  # what is larger may be infinite in float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """An optimizer with clipping. Every field is a key of `config.optim`."""

    name: str
    learning_rate: float
    warmup_steps: int
    schedule: str
    b1: float
    b2: float
    eps: float
    muon_momentum: float
    moment_dtype: str
    weight_decay: float
    grad_clip: float
    ema_decay: float

    def __post_init__(self):
        faults = []
        for key, choices in (
            ("name", OPTIMIZERS), ("schedule", SCHEDULES), ("moment_dtype", MOMENT_DTYPES)
        ):  # fmt: skip
            if getattr(self, key) not in choices:
                faults.append(f"{key}={getattr(self, key)!r} is not one of {', '.join(choices)}")
        # Written so that what is no number fails too.
        if not 0 < self.learning_rate < LARGEST or not self.grad_clip > 0:
            faults.append(
                f"learning_rate={self.learning_rate} and grad_clip={self.grad_clip} must be "
                f"positive (grad_clip=inf clips nothing)"
            )
        for key in ("b1", "b2", "muon_momentum", "ema_decay"):
            if not 0 <= getattr(self, key) < 1:
                faults.append(f"{key}={getattr(self, key)} must be in [0, 1)")
        for key in ("eps", "weight_decay"):
            if not 0 <= getattr(self, key) < LARGEST:
                faults.append(f"{key}={getattr(self, key)} must be zero or more")
        if not 0 <= self.warmup_steps < MAX_STEPS:
            faults.append(
                f"warmup_steps={self.warmup_steps} must not be negative, and below {MAX_STEPS}"
            )
        if self.moment_dtype == "bfloat16" and max(self.b1, self.b2, self.muon_momentum) > 0.99:
            faults.append(
                f"b1={self.b1}, b2={self.b2}, muon_momentum={self.muon_momentum}: a moment of "
                f"moment_dtype=bfloat16 has eight bits, and what a step changes at a decay above "
                f"0.99 is rounded away; lower the decay or take float32"
            )
        if faults:
            raise InputError("config.optim: " + "; ".join(faults) + ".")


def learning_rate(cfg: OptimConfig, num_steps: int) -> optax.Schedule:
    """Linear warm-up to `learning_rate`, then constant or a cosine down to zero at `num_steps`."""
    if not 0 < num_steps < MAX_STEPS:
        raise InputError(f"train.num_steps={num_steps} must be 1 or more, and below {MAX_STEPS}.")
    if cfg.schedule == "cosine":
        after = optax.cosine_decay_schedule(cfg.learning_rate, max(num_steps - cfg.warmup_steps, 1))
    else:
        after = optax.constant_schedule(cfg.learning_rate)
    # One above zero at the first step: a step at rate zero would be computed for nothing.
    warmup = optax.linear_schedule(
        cfg.learning_rate / max(cfg.warmup_steps, 1), cfg.learning_rate, cfg.warmup_steps - 1
    )
    return optax.join_schedules([warmup, after], [cfg.warmup_steps]) if cfg.warmup_steps else after


def make_optimizer(cfg: OptimConfig, num_steps: int) -> optax.GradientTransformation:
    """Global-norm clipping, then a direction; decay leaves biases and scales alone."""
    adam = kept_in(cfg.moment_dtype, optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=cfg.eps))
    if cfg.name == "adamw":
        direction = adam
    elif cfg.name == "muon":
        momentum = kept_in(cfg.moment_dtype, optax.trace(cfg.muon_momentum, nesterov=True))
        muon = optax.chain(momentum, optax.stateless(lambda updates, _: orthogonalized(updates)))
        direction = optax.partition({"muon": muon, "adam": adam}, which_rule)
    else:
        direction = optax.chain(
            optax.scale_by_factored_rms(
                # Above the number of layers, which is no dim of a matrix, and below a head's
                # features. The decay grows to b2, not to 1, which would freeze the moment.
                min_dim_size_to_factor=64,
                decay_rate_fn=lambda step, _: jnp.minimum(1 - (step + 1.0) ** -0.8, cfg.b2),
            ),
            optax.clip_by_block_rms(1.0),
            kept_in(cfg.moment_dtype, optax.ema(cfg.b1, debias=False)),
        )
    return optax.chain(
        optax.clip_by_global_norm(cfg.grad_clip),
        # In a chain of its own, as in optax.adamw: checkpoints know the moments by this place.
        optax.chain(
            direction,
            optax.add_decayed_weights(cfg.weight_decay, decayed),
            optax.scale_by_learning_rate(learning_rate(cfg, num_steps)),
        ),
    )


def is_schedule(state: Any) -> bool:
    """Whether this part of an optimizer's state counts the steps of the learning rate."""
    return isinstance(state, optax.ScaleByScheduleState)


def kept_in(dtype: str, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner`, which computes in float32, with its moments rounded to `dtype` between steps."""

    def cast(state, dtype):
        return jax.tree.map(
            lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, state
        )

    def update(updates, state, params=None):
        updates, state = inner.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(inner.init(params), dtype), update)


# Kernels that are matrices from tokens to tokens, and how many dims after that of layers are
# inputs. Heads are one matrix, as in the reference. The first and last layers go to Adam, as is
# usual, and so does the modulation, which starts at zero and sees one row for each picture.
MATRICES = (
    (r"attention/(q|k|v)/kernel$", 1),
    (r"attention/out/kernel$", 2),
    (r"feed_forward/(gate|up|down)/kernel$", 1),
)


def num_input_dims(path) -> int | None:
    """How many dims of the kernel at `path` are inputs of Muon's matrix; None: it is Adam's."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return next((num for pattern, num in MATRICES if re.search(pattern, name)), None)


def which_rule(params: dict) -> dict:
    """Of each parameter: "muon" or "adam"."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "adam" if num_input_dims(path) is None else "muon", params
    )


def orthogonalized(updates: dict) -> dict:
    """Each matrix of each layer with singular values of about one, scaled to Adam's size."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(updates)
    matrices, groups = [], {}
    for index, (path, leaf) in enumerate(leaves):
        inputs = leaf.shape[1 : 1 + num_input_dims(path)]
        matrices.append(wide(leaf.reshape(len(leaf), math.prod(inputs), -1)))
        groups.setdefault(matrices[-1].shape[1:], []).append(index)

    # All matrices of a shape at once: a stack of two layers alone would not divide over devices.
    for shape, members in groups.items():
        counts = np.cumsum([len(matrices[index]) for index in members])
        x = newton_schulz(jnp.concatenate([matrices[index] for index in members]))
        # arXiv 2502.16982, equation 4: a root mean square of 0.2, about that of Adam's updates.
        parts = jnp.split(0.2 * max(shape) ** 0.5 * x, counts[:-1])
        for index, part in zip(members, parts, strict=True):
            matrices[index] = part

    def restore(x, path, leaf):
        num_inputs = math.prod(leaf.shape[1 : 1 + num_input_dims(path)])
        return (x if x.shape[1] == num_inputs else jnp.swapaxes(x, 1, 2)).reshape(leaf.shape)

    return treedef.unflatten(
        restore(x, path, leaf) for x, (path, leaf) in zip(matrices, leaves, strict=True)
    )


def wide(x: Float[Array, "L m n"]) -> Float[Array, "L a b"]:
    """The matrices themselves or their transposes, so that they are not higher than wide."""
    return jnp.swapaxes(x, 1, 2) if x.shape[1] > x.shape[2] else x


def newton_schulz(x: Float[Array, "L m n"]) -> Float[Array, "L m n"]:
    """About U V^T of each x = U S V^T, m <= n: singular values go to between 0.7 and 1.2.

    Five times the quintic polynomial of Muon (Jordan et al. 2024). Whole matrices are spread over
    the devices: were their rows, they would be gathered anew for every product.
    """
    num = len(x)
    x = sharding.spread(x)
    x = x / (jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + 1e-8)
    for _ in range(5):
        square = x @ jnp.swapaxes(x, 1, 2)
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x[:num]


def decayed(params: dict) -> dict:
    """True where weight decay applies: at kernels."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def update_ema(ema: dict, params: dict, step: jax.Array, decay: float) -> dict:
    """The average after `step` updates before this one, in float32 always.

    A step changes it by 1 - decay of a difference, which eight bits of bfloat16 would round away.
    The decay grows from 0.1 to `decay` over the first steps, (1 + step) / (10 + step), so that the
    random start is forgotten.
    """
    decay = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda average, new: average + (1 - decay) * (new - average), ema, params)
