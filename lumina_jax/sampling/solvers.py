"""Solvers of dx/dt = velocity(x, t) from noise (t = 0) to data (t = 1).

A solver is a list of evaluations of the velocity, known before tracing. Its memory is K arrays, all
of them the noise at first. Each evaluation looks at the first of them, then mixes them anew:

    v = velocity(memory[0], t)
    memory[i] = sum over j < K of weights[i, j] * memory[j]  +  weights[i, K] * v

So one loop, which holds the network once, runs every solver and may be cut between any two
evaluations. After the last one memory[0] is the answer.

The weights are worked out on the host in float64, where infinite logarithms of the ends of the path
do no harm: no solver has a first or a last step of its own on the device.

Axes: B batch, h w latent height and width, C latent channels, G times of the grid, E evaluations,
K arrays in memory.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Array, Float

Velocity = Callable[[Float[Array, "B h w C"], Float[Array, ""]], Float[Array, "B h w C"]]
Memory = tuple[Float[Array, "B h w C"], ...]


def euler(times: Float[np.ndarray, " G"]) -> Iterator[tuple[float, list]]:
    """One evaluation an interval; exact where the velocity is constant."""
    for start, stop in itertools.pairwise(times):
        yield start, [[1, stop - start]]


def midpoint(times: Float[np.ndarray, " G"]) -> Iterator[tuple[float, list]]:
    """Two evaluations an interval, of second order; exact where the velocity is linear in t.

    In memory: where to look, and where the interval began.
    """
    for start, stop in itertools.pairwise(times):
        whole, half = stop - start, (stop - start) / 2
        yield start, [[0, 1, half], [0, 1, 0]]
        yield start + half, [[0, 1, whole], [0, 1, whole]]


def heun(times: Float[np.ndarray, " G"]) -> Iterator[tuple[float, list]]:
    """Two evaluations, at both ends of an interval, of second order (the trapezoidal rule).

    In memory: where to look, and the interval's start with half a step of the first velocity.
    """
    for start, stop in itertools.pairwise(times):
        whole, half = stop - start, (stop - start) / 2
        yield start, [[1, 0, whole], [1, 0, half]]
        yield stop, [[0, 1, half], [0, 1, half]]


def rk4(times: Float[np.ndarray, " G"]) -> Iterator[tuple[float, list]]:
    """Four evaluations an interval, of fourth order, by the 3/8 rule.

    It is torchdiffeq's, and so the official sampler's `rk4`. In memory: where to look, where the
    interval began, the answer as far as it is known, and h (k1 - k2) of the first two velocities.
    """
    for start, stop in itertools.pairwise(times):
        h = stop - start
        begin = [0, 1, 0, 0, 0]
        yield start, [[0, 1, 0, 0, h / 3], begin, [0, 1, 0, 0, h / 8], [0, 0, 0, 0, h]]
        further = [0, 0, 1, 0, 3 * h / 8]
        yield start + h / 3, [[0, 1, 0, -1 / 3, h], begin, further, [0, 0, 0, 1, -h]]
        yield start + 2 * h / 3, [[0, 1, 0, 1, h], begin, further, begin]
        end = [0, 0, 1, 0, h / 8]
        yield stop, [end, end, end, end]


def dpm(times: Float[np.ndarray, " G"]) -> Iterator[tuple[float, list]]:
    """One evaluation an interval, of second order: DPM-Solver++(2M) on the straight path.

    It goes by lambda = log(t / (1 - t)), and extrapolates the data x + (1 - t) v that the last two
    evaluations predict. Where lambda is infinite, and in the first step, that has no second order,
    and the first one is Euler's step. (Lu et al., arXiv 2211.01095, algorithm 2; the official
    `dpm`, Flow-DPM-Solver of Sana, arXiv 2410.10629.)

    In memory: where to look, and the data that the evaluation before predicted.
    """
    with np.errstate(divide="ignore"):
        lambdas = np.log(times) - np.log1p(-times)
    steps = np.diff(lambdas)
    for index, (start, stop) in enumerate(itertools.pairwise(times)):
        noise, weight = 1 - start, 0.0
        if index > 0 and np.isfinite(steps[index]):
            weight = (stop - start) / noise * steps[index] / (2 * steps[index - 1])
        yield start, [[1 + weight, -weight, stop - start + weight * noise], [1, 0, noise]]


SOLVERS = {"euler": euler, "midpoint": midpoint, "heun": heun, "rk4": rk4, "dpm": dpm}


def evaluations(
    solver: str, times: Sequence[float] | Float[np.ndarray, " G"]
) -> tuple[Float[np.ndarray, " E"], Float[np.ndarray, "E K K+1"]]:
    """Times and weights of a solver's evaluations on a grid, in float32; the times never fall."""
    when, weights = zip(*SOLVERS[solver](np.asarray(times, np.float64)), strict=True)
    return np.asarray(when, np.float32), np.asarray(weights, np.float32)


def mix(
    weights: Float[Array, "K K+1"], memory: Memory, velocity: Float[Array, "B h w C"]
) -> Memory:
    """The memory after an evaluation."""
    terms = (*memory, velocity)
    # Not a matrix product: on accelerators its factors would be rounded to fewer bits.
    return tuple(sum(w * x for w, x in zip(row, terms, strict=True)) for row in weights)


def solve(
    velocity: Velocity,
    latents: Float[Array, "B h w C"],
    times: Sequence[float] | Float[np.ndarray, " G"],
    *,
    solver: str = "euler",
) -> Float[Array, "B h w C"]:
    """Where the path from `latents` at times[0] is at times[-1], for any velocity."""
    when, weights = evaluations(solver, times)

    def evaluate(memory, now):
        t, weights = now
        return mix(weights, memory, velocity(memory[0], t)), None

    memory, _ = jax.lax.scan(evaluate, (latents,) * weights.shape[1], (when, weights))
    return memory[0]
