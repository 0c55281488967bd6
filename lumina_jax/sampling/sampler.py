"""The denoising loop, whole, for one jit: from noise to latents.

The times of all evaluations are known before tracing, so it is known too after which of them
guidance ends (`guidance_truncation`) and in which tokens are merged: the loop is cut there, and
each part holds the network that it needs. What depends on the picture is decided on the device
(`caching.py`).

Axes: B batch, h w latent height and width, C latent channels, S caption slots, F text features,
E evaluations, K arrays in the solver's memory, R rows of a branch.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from lumina_jax import flow, sharding
from lumina_jax.errors import InputError
from lumina_jax.models.embed import patchify, unpatchify
from lumina_jax.models.merging import num_merged
from lumina_jax.models.next_dit import (
    Merging,
    NextDiTConfig,
    Stages,
    caption_flops,
    picture_flops,
)
from lumina_jax.sampling import caching
from lumina_jax.sampling.guidance import guide
from lumina_jax.sampling.solvers import SOLVERS, evaluations, mix
from lumina_jax.untrusted import is_finite

SEMANTICS = ("official", "diffusers")
MAX_STEPS = 10_000  # the grid of times and what follows from it are made before drawing


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How a picture is drawn. Every field is a key of `config.sampling`.

    Two programs define this model's sampler and give the same names different meanings, so
    `semantics` says whose are meant:

    - num_steps: points of the time grid, one more than intervals (official); intervals (diffusers,
      and the solver `dpm` in both).
    - guidance_truncation: guidance in evaluations at t < truncation (official); during that
      fraction of the intervals (diffusers). 1 guides to the end in both.
    - guidance_renorm: clip the picture's norm at this many times the conditional one (official);
      0 is off, anything else matches row by row (diffusers).

    The others mean the same in both:

    - solver: A name in `solvers.py`.
    - time_shift: 1 spends the steps evenly, more spends them near noise; 0 takes the shift that
      training takes for a picture of this size.
    - cache_threshold: Reuse the layers' work until it has changed by about this fraction; 0 is off.
    - cache_interval: Run the layers in every n-th evaluation instead; 1 is off.
    - cache_coefficients: Of the polynomial from how far the input moved to how much the layers'
      work changed, the highest power first: `tools/calibrate_cache.py` fits it to a model.
    - cache_order: 0 reuses the last work as it is, 1 follows the line through the last two.
    - merge_ratio: Of the image tokens, how many go with a similar one; 0 is off, 0.75 the most.
    - merge_layers: From where to where in the depth of the network, as fractions.
    - merge_steps: Likewise in the evaluations.
    - rope_scaling: "time_aware" stretches positions for pictures larger than the one trained on.
    - rope_watershed: The time from which on only slow rotations are stretched.
    - proportional_attention: Sharpen attention where more tokens share it than in training.
    """

    num_steps: int
    guidance_scale: float
    guidance_truncation: float
    guidance_renorm: float
    semantics: str
    solver: str
    time_shift: float
    cache_threshold: float = 0.0
    cache_interval: int = 1
    cache_coefficients: Sequence[float] = (1.0, 0.0)
    cache_order: int = 1
    merge_ratio: float = 0.0
    merge_layers: Sequence[float] = (0.5, 0.75)
    merge_steps: Sequence[float] = (0.5, 1.0)
    rope_scaling: str = "none"
    rope_watershed: float = 0.3
    proportional_attention: bool = False

    def __post_init__(self):
        faults = []
        for name in ("cache_coefficients", "merge_layers", "merge_steps"):
            values = tuple(getattr(self, name))
            if all(map(is_finite, values)):
                object.__setattr__(self, name, tuple(map(float, values)))
            else:
                faults.append(f"{name}={values} must be numbers")
        # What is no number is neither below nor above a bound.
        faults += [
            f"{name}={getattr(self, name)} must be a finite number"
            for name in (
                "guidance_scale", "guidance_truncation", "guidance_renorm", "time_shift",
                "cache_threshold", "merge_ratio", "rope_watershed",
            )
            if not is_finite(getattr(self, name))
        ]  # fmt: skip
        if self.num_steps > MAX_STEPS:
            faults.append(f"num_steps={self.num_steps} is more than {MAX_STEPS:,}")
        if faults:
            raise InputError("sampling: " + "; ".join(faults) + ".")
        if self.semantics not in SEMANTICS:
            faults.append(f"semantics={self.semantics!r} is not one of {', '.join(SEMANTICS)}")
        elif self.num_intervals < 1:
            faults.append(
                f"num_steps={self.num_steps} leaves no interval to integrate over: at least "
                f"{self.num_steps - self.num_intervals + 1} with {self.semantics} semantics"
            )
        if self.solver not in SOLVERS:
            faults.append(f"solver={self.solver!r} is not one of {', '.join(SOLVERS)}")
        if self.time_shift < 0:
            faults.append(
                f"time_shift={self.time_shift} must be positive; 1 shifts nothing, 0 takes the "
                f"shift of the resolution"
            )
        if self.guidance_scale < 1:
            faults.append(
                f"guidance_scale={self.guidance_scale} must be at least 1, which guides nothing"
            )
        if self.guidance_truncation < 0 or self.guidance_renorm < 0:
            faults.append(
                f"guidance_truncation={self.guidance_truncation} and "
                f"guidance_renorm={self.guidance_renorm} must not be negative"
            )
        if self.cache_threshold < 0 or self.cache_interval < 1:
            faults.append(
                f"cache_threshold={self.cache_threshold} must be at least 0 and "
                f"cache_interval={self.cache_interval} at least 1, which reuse nothing"
            )
        if self.cache_threshold > 0 and self.cache_interval > 1:
            faults.append(
                f"cache_threshold={self.cache_threshold} and cache_interval={self.cache_interval} "
                f"are two ways to choose what is reused; give one"
            )
        if self.cache_order not in (0, 1):
            faults.append(f"cache_order={self.cache_order} is neither 0 nor 1")
        if not self.cache_coefficients:
            faults.append("cache_coefficients is empty; (1, 0) takes the distance itself")
        if not 0 <= self.merge_ratio <= 0.75:
            faults.append(
                f"merge_ratio={self.merge_ratio} is not between 0 and 0.75: one token of a cell of "
                f"2 x 2 stays"
            )
        for name in ("merge_layers", "merge_steps"):
            part = getattr(self, name)
            if len(part) != 2 or not 0 <= part[0] <= part[1] <= 1:
                faults.append(
                    f"{name}={part} must be two fractions, the first not above the second"
                )
        if self.rope_scaling not in ("none", "time_aware"):
            faults.append(f"rope_scaling={self.rope_scaling!r} is not one of none, time_aware")
        if faults:
            raise InputError("sampling: " + "; ".join(faults) + ".")

    @property
    def num_intervals(self) -> int:
        # The official program counts points for its ODE solvers, and steps for `dpm`.
        points = self.semantics == "official" and self.solver != "dpm"
        return self.num_steps - 1 if points else self.num_steps

    def times(self, num_tokens: int) -> np.ndarray:
        """The time grid, from 0 (noise) to 1 (data): even, then shifted towards noise.

        That of the official `dpm` begins just after 0, where the logarithm is finite.
        """
        first = 1e-3 if self.solver == "dpm" and self.semantics == "official" else 0
        tau = np.linspace(first, 1, self.num_intervals + 1)
        shift = self.time_shift or flow.resolution_shift(num_tokens)
        return tau / (tau + shift * (1 - tau))

    def path(self, num_tokens: int, num_layers: int, strength: float = 1.0) -> "Path":
        """All that is known before a picture is drawn.

        Args:
          num_tokens: Of the picture.
          num_layers: Of the network.
          strength: The part of the intervals that is left when a picture is drawn over another.
        """
        if not 0 < strength <= 1:
            raise InputError(f"strength={strength} must be above 0, and 1 at most.")
        skipped = self.num_intervals - max(round(strength * self.num_intervals), 1)
        grid = self.times(num_tokens)[skipped:]
        # In float32, as the network sees them, a time that falls on the truncation equals it.
        times, weights = evaluations(self.solver, grid)
        num_guided = self._num_guided(times, skipped)
        forced = np.zeros(len(times), bool)
        forced[[0, -1]] = True
        if self.cache_interval > 1:
            forced[:: self.cache_interval] = True
        cached = self.cache_threshold > 0 or self.cache_interval > 1
        return Path(
            numbers=Numbers(
                times=times,
                weights=weights,
                begin=np.float32(grid[0]),
                guidance_scale=np.float32(self.guidance_scale),
                guidance_renorm=np.float32(self.guidance_renorm),
                cache=caching.Policy(
                    forced=forced,
                    threshold=np.float32(self.cache_threshold or np.inf),
                    coefficients=np.asarray(self.cache_coefficients, np.float32),
                    extrapolate=np.float32(self.cache_order),
                )
                if cached
                else None,
            ),
            program=Program(
                num_guided=num_guided,
                renorm=self.guidance_renorm > 0,
                semantics=self.semantics,
                merging=self._merging(num_layers),
                merged=tuple(round(part * len(times)) for part in self.merge_steps),
            ),
        )

    def _num_guided(self, times, skipped: int) -> int:
        """In how many evaluations, from the first, both velocities are computed."""
        if self.guidance_scale == 1:
            return 0
        if self.semantics == "official":
            return int(np.sum(times < self.guidance_truncation))
        done = np.arange(skipped + 1, self.num_intervals + 1) / self.num_intervals
        return int(np.sum(done <= self.guidance_truncation)) * len(times) // len(done)

    def _merging(self, num_layers: int) -> Merging | None:
        start, stop = (round(part * num_layers) for part in self.merge_layers)
        if self.merge_ratio == 0 or start == stop:
            return None
        return Merging(self.merge_ratio, start, stop)


class Numbers(NamedTuple):
    """The settings of a sampler that are arrays under jit.

    Attributes:
      times: Of the evaluations.
      weights: Of the solver's memory after each.
      begin: The time at which the path begins.
      guidance_scale: 1 follows the prompt alone.
      guidance_renorm: See SamplerConfig.
      cache: When the layers are skipped; None never skips them.
    """

    times: Float[Array, " E"]
    weights: Float[Array, "E K K+1"]
    begin: Float[Array, ""]
    guidance_scale: Float[Array, ""]
    guidance_renorm: Float[Array, ""]
    cache: caching.Policy | None


class Program(NamedTuple):
    """The settings of a sampler that are static under jit.

    Attributes:
      num_guided: Evaluations with guidance, from the first.
      renorm: Whether guidance is renormalised.
      semantics: See SamplerConfig.
      merging: In which layers tokens are merged; None merges none.
      merged: The first evaluation with merging, and the one after the last.
      parallel: Prompt and negative prompt are two halves of the devices. After guidance both halves
        follow the prompt.
    """

    num_guided: int
    renorm: bool
    semantics: str
    merging: Merging | None = None
    merged: tuple[int, int] = (0, 0)
    parallel: bool = False


class Path(NamedTuple):
    """What a config says of a picture of one size."""

    numbers: Numbers
    program: Program

    @property
    def num_evaluations(self) -> int:
        return len(self.numbers.times)

    def flops(
        self,
        cfg: NextDiTConfig,
        *,
        height: int,
        width: int,
        slots: tuple[int, int],
        trace: "Trace | None" = None,
    ) -> float:
        """Floating-point operations of the network for one picture, a multiply-add being two.

        Args:
          cfg: Of the network.
          height: Of the picture, in tokens.
          width: Likewise.
          slots: Of its caption and of the negative one.
          trace: What a cache really skipped, the mean over its pictures. Without one, what it must
            compute counts alone, which is all of it for a fixed interval.
        """
        num_tokens, merging = height * width, self.program.merging
        forced = np.ones(self.num_evaluations)
        if self.numbers.cache is not None:
            forced = self.numbers.cache.forced.astype(float)
        guided = self.program.num_guided
        computed = [forced, forced[:guided]]
        if trace is not None:
            computed = [np.mean(r.computed, axis=1) if r else [] for r in trace]
        total = 0.0
        for num_slots, shares in zip(slots, computed, strict=True):
            if not len(shares):
                continue
            total += caption_flops(cfg, num_slots)
            for index, share in enumerate(shares):
                merged = {}
                if merging and self.program.merged[0] <= index < self.program.merged[1]:
                    merged = {
                        "num_merged": num_merged(height, width, merging.ratio),
                        "num_merging": merging.stop - merging.start,
                    }
                full = picture_flops(cfg, num_tokens, num_slots, **merged)
                skipped = picture_flops(cfg, num_tokens, num_slots, skipped=True)
                total += share * full + (1 - share) * skipped
        return total


class Start(NamedTuple):
    """A picture to begin from.

    Attributes:
      latents: Of the picture.
      repaint: Where it may change, 1, and where it is kept, 0; None lets all of it change.
    """

    latents: Float[Array, "B h w C"]
    repaint: Float[Array, "B h w 1"] | None


class Trace(NamedTuple):
    """What the cache did in each evaluation, for prompts and for negative prompts.

    Those of negative prompts are fewer where guidance ends before the path does.
    """

    conditional: caching.Record
    unconditional: caching.Record | None


class Branch(NamedTuple):
    """A caption that a picture is drawn by: refined, with its mask."""

    caption: Float[Array, "R S D"]
    mask: Bool[Array, "R S"]


def sample(
    stages: Stages,
    params: Any,
    noise: Float[Array, "B h w C"],
    captions: Sequence[tuple[Array, Array]],
    numbers: Numbers,
    *,
    patch_size: int,
    program: Program,
    start: Start | None = None,
    watch: Callable | None = None,
) -> tuple[Float[Array, "B h w C"], Trace | None]:
    """Latents of the pictures that begin as `noise`, and what the cache did if there is one.

    Args:
      stages: Of the network.
      params: Of the network.
      noise: Of unit variance, float32.
      captions: Features [R, S, F] and mask [R, S]. Of two entries the first is the prompts', the
        second the negative prompts', each of B rows and of as many slots as it needs. One of 2 B
        rows has prompts, then negative prompts, in as many slots. Without guidance: one of B rows.
      numbers: The solver's evaluations, strengths, and when the layers are skipped.
      patch_size: Of the model.
      program: Static.
      start: A picture to begin from, or to repaint parts of.
      watch: watch(evaluation, t, latents) is called with the data that each velocity predicts.
    """
    batch, height, width, _ = noise.shape
    rows, columns = height // patch_size, width // patch_size

    def evaluate(branch, x, t, cache, policy, merging):
        """The velocity of a branch; x has as many pictures as it has rows."""
        x = sharding.constrain(x, ("act_batch", None, None, None))
        image = patchify(x, patch_size, rows * columns)
        joined = stages.join(params, image, jnp.full(len(x), t), branch.caption, branch.mask)

        def layers():
            return stages.attend(params, joined, rows, columns, merging)

        if cache is None:
            after, record = layers(), None
        else:
            first_input = stages.first_input(params, joined)
            after, cache, record = caching.reuse(
                layers, joined.xs[0], first_input, joined.segment_ids[0], t, cache, policy
            )
        tokens = stages.predict(params, after, joined, branch.mask.shape[1])
        return unpatchify(tokens, patch_size, height, width), cache, record

    def velocity(branches, x, t, caches, policy, *, guided, merging):
        """Of the pictures, by all branches: their velocities first, then what guidance makes."""
        found = []
        for branch, cache in zip(branches, caches, strict=True):
            num = len(branch.mask)
            own = x if num == batch else jnp.concatenate([x, x])
            found.append(evaluate(branch, own, t, cache, policy, merging))
        velocities, caches, records = zip(*found, strict=True)
        v = velocities[0][:batch]
        if guided:
            unconditional = velocities[-1][-batch:]
            v = guide(
                v,
                unconditional,
                scale=numbers.guidance_scale,
                renorm=numbers.guidance_renorm if program.renorm else None,
                semantics=program.semantics,
            )
        return v, caches, records

    def part(carry, first, last, branches):
        """The evaluations from `first` to `last`, which all need the same network."""
        guided = last <= program.num_guided
        inside = program.merged[0] <= first and last <= program.merged[1]
        merging = program.merging if inside else None

        def step(carry, now):
            memory, caches = carry
            index, t, weights, forced = now
            x = memory[0]
            policy = None if forced is None else numbers.cache._replace(forced=forced)
            v, caches, records = velocity(
                branches, x, t, caches, policy, guided=guided, merging=merging
            )
            if start is not None and start.repaint is not None:
                # On a straight path every solver stays: what is kept ends as the start's latents.
                v = jnp.where(start.repaint > 0, v, start.latents - noise)
            if watch is not None:
                watch(index, t, x + (1 - t) * v)
            return (mix(weights, memory, v), caches), records

        now = (
            jnp.arange(first, last),
            numbers.times[first:last],
            numbers.weights[first:last],
            None if numbers.cache is None else numbers.cache.forced[first:last],
        )
        return jax.lax.scan(step, carry, now)

    branches = [Branch(stages.refine(params, *caption), caption[1]) for caption in captions]
    x = noise
    if start is not None:
        x = (1 - numbers.begin) * noise + numbers.begin * start.latents
    caches = [None] * len(branches)
    if numbers.cache is not None:
        caches = [_empty(stages, params, branch, x, patch_size) for branch in branches]
    carry, records = ((x,) * numbers.weights.shape[1], tuple(caches)), []
    guided = program.num_guided > 0
    for first, last in itertools.pairwise(_cuts(program, len(numbers.times))):
        if guided and first >= program.num_guided:
            guided = False
            branches, caches = _without_negatives(branches, carry[1], batch, program.parallel)
            carry = (carry[0], caches)
        carry, record = part(carry, first, last, branches)
        records.append((guided, record))
    return carry[0][0], _trace(records, batch) if numbers.cache is not None else None


def _cuts(program: Program, num_evaluations: int) -> list[int]:
    """Where the loop needs another network, with both its ends."""
    points = {0, num_evaluations, program.num_guided}
    if program.merging is not None:
        points |= set(program.merged)
    return sorted(points)


def _without_negatives(branches, caches, batch, parallel):
    """The branch of the prompts; on both halves of the devices where they work in parallel."""

    def prompts(x):
        return jnp.concatenate([x[:batch], x[:batch]]) if parallel else x[:batch]

    return jax.tree.map(prompts, ([branches[0]], (caches[0],)))


def _empty(stages, params, branch, x, patch_size):
    """The cache of a branch before the first evaluation."""
    num = len(branch.mask)

    def joined(x):
        image = patchify(x, patch_size, math.prod(x.shape[1:3]) // patch_size**2)
        return stages.join(params, image, jnp.zeros(num), branch.caption, branch.mask).xs[0]

    return caching.empty(jax.eval_shape(joined, jax.ShapeDtypeStruct((num, *x.shape[1:]), x.dtype)))


def _trace(records, batch):
    """Parts of the loop -> one record of all evaluations for each kind of prompt."""

    def joined(pieces):
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *pieces)

    negatives = [
        jax.tree.map(lambda x: x[:, -batch:], its[-1]) for guided, its in records if guided
    ]
    return Trace(
        joined([jax.tree.map(lambda x: x[:, :batch], its[0]) for _, its in records]),
        joined(negatives) if negatives else None,
    )
