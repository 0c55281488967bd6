"""Solvers of dx/dt = velocity(x, t) from noise (t = 0) to data (t = 1).

A solver is a list of evaluations of the velocity, known before tracing. Its memory is K arrays, all
of them the noise at first. Each evaluation looks at the first of them, then mixes them anew:

    v = velocity(memory[0], t)
    memory[i] = sum over j < K of weights[i, j] * memory[j]  +  weights[i, K] * v

So one loop, which holds the network once, runs every solver and may be cut between any two
evaluations. After the last one memory[0] is the answer.

Axes: B batch, h w latent height and width, C latent channels, G times of the grid, E evaluations,
K arrays in memory.
"""

import itertools
from collections.abc import Callable, Iterator

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


SOLVERS = {"euler": euler, "midpoint": midpoint}


def evaluations(
    solver: str, times: Float[np.ndarray, " G"]
) -> tuple[Float[np.ndarray, " E"], Float[np.ndarray, "E K K+1"]]:
    """Times and weights of a solver's evaluations on a grid, in float32; the times never fall."""
    when, weights = zip(*SOLVERS[solver](times), strict=True)
    return np.asarray(when, np.float32), np.asarray(weights, np.float32)


def integrate(
    velocity: Velocity,
    memory: Memory,
    times: Float[Array, " E"],
    weights: Float[Array, "E K K+1"],
) -> Memory:
    """The memory after these evaluations, of which there may be none."""

    def evaluate(memory, now):
        t, weights = now
        terms = (*memory, velocity(memory[0], t))
        # Not a matrix product: on accelerators its factors would be rounded to fewer bits.
        return tuple(sum(w * x for w, x in zip(row, terms, strict=True)) for row in weights), None

    memory, _ = jax.lax.scan(evaluate, memory, (times, weights))
    return memory
