"""The denoising loop, whole, for one jit: from noise to latents.

The times of all evaluations are known before tracing, so after which of them guidance ends
(`guidance_truncation`) is known too: the loop is two loops, and the second one really costs half.

Axes: B batch, h w latent height and width, C latent channels, S caption slots, F text features,
E evaluations, K arrays in the solver's memory.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from lumina_jax.errors import InputError
from lumina_jax.models.embed import patchify, unpatchify
from lumina_jax.sampling.guidance import guide
from lumina_jax.sampling.solvers import SOLVERS, evaluations, integrate

SEMANTICS = ("official", "diffusers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How a picture is drawn. Every field is a key of `config.sampling`.

    Two programs define this model's sampler and give the same names different meanings, so
    `semantics` says whose are meant:

    - num_steps: points of the time grid, one more than intervals (official); intervals (diffusers).
    - guidance_truncation: guidance in evaluations at t < truncation (official); during that
      fraction of the intervals (diffusers). 1 guides to the end in both.
    - guidance_renorm: clip the picture's norm at this many times the conditional one (official);
      0 is off, anything else matches row by row (diffusers).
    """

    num_steps: int
    guidance_scale: float
    guidance_truncation: float
    guidance_renorm: float
    semantics: str
    solver: str
    time_shift: float

    def __post_init__(self):
        faults = []
        if self.semantics not in SEMANTICS:
            faults.append(f"semantics={self.semantics!r} is not one of {', '.join(SEMANTICS)}")
        elif self.num_intervals < 1:
            faults.append(
                f"num_steps={self.num_steps} leaves no interval to integrate over: at least "
                f"{2 if self.semantics == 'official' else 1} with {self.semantics} semantics"
            )
        if self.solver not in SOLVERS:
            faults.append(f"solver={self.solver!r} is not one of {', '.join(SOLVERS)}")
        if self.time_shift <= 0:
            faults.append(f"time_shift={self.time_shift} must be positive; 1 shifts nothing")
        if self.guidance_scale < 1:
            faults.append(
                f"guidance_scale={self.guidance_scale} must be at least 1, which guides nothing"
            )
        if self.guidance_truncation < 0 or self.guidance_renorm < 0:
            faults.append(
                f"guidance_truncation={self.guidance_truncation} and "
                f"guidance_renorm={self.guidance_renorm} must not be negative"
            )
        if faults:
            raise InputError("sampling: " + "; ".join(faults) + ".")

    @property
    def num_intervals(self) -> int:
        return self.num_steps - 1 if self.semantics == "official" else self.num_steps

    def times(self) -> np.ndarray:
        """The time grid, from 0 (noise) to 1 (data): even, then shifted towards noise."""
        tau = np.linspace(0, 1, self.num_intervals + 1)
        return tau / (tau + self.time_shift * (1 - tau))

    def num_guided(self) -> int:
        """In how many evaluations, from the first, both velocities are computed."""
        if self.guidance_scale == 1:
            return 0
        # In float32, as the network sees them, a time that falls on the truncation equals it.
        times, _ = evaluations(self.solver, self.times())
        if self.semantics == "official":
            return int(np.sum(times < self.guidance_truncation))
        done = np.arange(1, self.num_intervals + 1) / self.num_intervals
        return int(np.sum(done <= self.guidance_truncation)) * len(times) // self.num_intervals

    def numbers(self) -> "Numbers":
        """What may change without compiling again."""
        times, weights = evaluations(self.solver, self.times())
        return Numbers(
            times=times,
            weights=weights,
            guidance_scale=np.float32(self.guidance_scale),
            guidance_renorm=np.float32(self.guidance_renorm),
        )

    def program(self) -> "Program":
        """What a compiled sampler is made for."""
        return Program(
            num_guided=self.num_guided(),
            renorm=self.guidance_renorm > 0,
            semantics=self.semantics,
        )


class Numbers(NamedTuple):
    """The settings of a sampler that are arrays under jit."""

    times: Float[Array, " E"]
    weights: Float[Array, "E K K+1"]
    guidance_scale: Float[Array, ""]
    guidance_renorm: Float[Array, ""]


class Program(NamedTuple):
    """The settings of a sampler that are static under jit."""

    num_guided: int
    renorm: bool
    semantics: str


def sample(
    forward: Callable,
    params: Any,
    latents: Float[Array, "B h w C"],
    caption: tuple[Float[Array, "B S F"], Bool[Array, "B S"]],
    negative: tuple[Float[Array, "B S F"], Bool[Array, "B S"]],
    numbers: Numbers,
    *,
    patch_size: int,
    program: Program,
) -> Float[Array, "B h w C"]:
    """Latents of the pictures that begin as the noise `latents`.

    Args:
      forward: forward(params, image, t, cap_feats, cap_mask) -> velocity of each token.
      params: Of the model.
      latents: Noise of unit variance, float32.
      caption: Features and mask of the prompts.
      negative: Features and mask of what guidance leads away from.
      numbers: The solver's evaluations, and strengths.
      patch_size: Of the model.
      program: Static.
    """
    batch, height, width, _ = latents.shape
    num_tokens = height * width // patch_size**2

    def evaluate(x, t, conditions):
        image = patchify(x, patch_size, num_tokens)
        velocity = forward(params, image, jnp.full(len(x), t), *conditions)
        return unpatchify(velocity, patch_size, height, width)

    def conditional(x, t):
        return evaluate(x, t, caption)

    def guided(x, t):
        both = evaluate(jnp.concatenate([x, x]), t, doubled)
        return guide(
            both[:batch],
            both[batch:],
            scale=numbers.guidance_scale,
            renorm=numbers.guidance_renorm if program.renorm else None,
            semantics=program.semantics,
        )

    doubled = tuple(jnp.concatenate(pair) for pair in zip(caption, negative, strict=True))
    times, weights, split = numbers.times, numbers.weights, program.num_guided
    memory = (latents,) * weights.shape[1]
    memory = integrate(guided, memory, times[:split], weights[:split])
    memory = integrate(conditional, memory, times[split:], weights[split:])
    return memory[0]
