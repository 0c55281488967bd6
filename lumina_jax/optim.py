"""The optimizer, its learning rate over time, and the averaged weights."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from lumina_jax.errors import InputError

SCHEDULES = ("constant", "cosine")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with clipping. Every field is a key of `config.optim`."""

    learning_rate: float
    warmup_steps: int
    schedule: str
    b1: float
    b2: float
    eps: float
    weight_decay: float
    grad_clip: float
    ema_decay: float

    def __post_init__(self):
        faults = []
        if self.schedule not in SCHEDULES:
            faults.append(f"schedule={self.schedule!r} is not one of {', '.join(SCHEDULES)}")
        if self.learning_rate <= 0 or self.grad_clip <= 0:
            faults.append(
                f"learning_rate={self.learning_rate} and grad_clip={self.grad_clip} must be "
                f"positive (grad_clip=inf clips nothing)"
            )
        if not 0 <= self.ema_decay < 1:
            faults.append(f"ema_decay={self.ema_decay} must be in [0, 1)")
        if self.warmup_steps < 0:
            faults.append(f"warmup_steps={self.warmup_steps} must not be negative")
        if faults:
            raise InputError("config.optim: " + "; ".join(faults) + ".")


def learning_rate(cfg: OptimConfig, num_steps: int) -> optax.Schedule:
    """Linear warm-up to `learning_rate`, then constant or a cosine down to zero at `num_steps`."""
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
    """Global-norm clipping, then AdamW; decay leaves biases and scales alone."""
    return optax.chain(
        optax.clip_by_global_norm(cfg.grad_clip),
        optax.adamw(
            learning_rate(cfg, num_steps),
            b1=cfg.b1,
            b2=cfg.b2,
            eps=cfg.eps,
            weight_decay=cfg.weight_decay,
            mask=decayed,
        ),
    )


def decayed(params: dict) -> dict:
    """True where weight decay applies: at kernels."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def update_ema(ema: dict, params: dict, step: jax.Array, decay: float) -> dict:
    """The average after `step` updates before this one.

    The decay grows from 0.1 to `decay` over the first steps, (1 + step) / (10 + step), so that the
    random start is forgotten.
    """
    decay = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda average, new: average + (1 - decay) * (new - average), ema, params)
