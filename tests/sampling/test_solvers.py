"""Solvers on fields with a known answer, and against the programs that named them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lumina_jax.sampling.solvers import SOLVERS, evaluations, mix, solve


def shifted(num_intervals, shift=6.0):
    tau = np.linspace(0, 1, num_intervals + 1)
    return tau / (tau + shift * (1 - tau))


def end(solver, velocity, start, times):
    return jax.jit(functools.partial(solve, velocity, times=times, solver=solver))(start)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_is_exact_on_the_straight_path(solver):
    """Oracle 7: with the true velocity any number of intervals returns the data."""
    data, noise = jax.random.normal(jax.random.key(0), (2, 2, 4, 4, 3))
    for intervals in (1, 7):
        found = end(solver, lambda x, t: data - noise, noise, shifted(intervals))
        np.testing.assert_allclose(found, data, atol=2e-6)


@pytest.mark.parametrize("solver", ["midpoint", "heun", "rk4"])
def test_second_order_is_exact_where_the_velocity_is_linear_in_time(solver):
    """The integral of a + 2 b t over [0, 1] is a + b; Euler, looking back, stays below it."""
    a, b, start = jax.random.uniform(jax.random.key(1), (3, 2, 4, 4, 3), minval=0.5)
    field = lambda x, t: a + 2 * b * t  # noqa: E731
    for intervals in (1, 7):
        times = shifted(intervals)
        found = end(solver, field, start, times)
        np.testing.assert_allclose(found, start + a + b, rtol=1e-6)
        assert (end("euler", field, start, times) < found - 0.05).all()


def gaussian(x, t, mean=0.7, deviation=0.4):
    """The velocity that leads unit noise to a normal distribution: all of it is known.

    The data expected at x are mean + t s^2 / (t^2 s^2 + (1 - t)^2) (x - t mean), s the deviation.
    """
    variance = t**2 * deviation**2 + (1 - t) ** 2
    return mean + (t * deviation**2 - (1 - t)) / variance * (x - t * mean)


def growing(x, t):
    """Leads x to exp(3 / 2) x."""
    return (1 + t) * x


@pytest.mark.parametrize(
    ("solver", "order", "field", "intervals"),
    [
        ("euler", 1, growing, (40, 80)),
        ("midpoint", 2, growing, (40, 80)),
        ("heun", 2, growing, (40, 80)),
        ("rk4", 4, growing, (4, 8)),  # soon its errors are those of float32
        ("dpm", 2, gaussian, (192, 384)),  # it is made for fields that predict data
    ],
)
def test_halving_the_intervals_divides_the_error_by_two_to_the_order(
    solver, order, field, intervals
):
    start = jnp.linspace(0.5, 2, 9)[:, None, None, None]
    answer = np.exp(1.5) * start if field is growing else 0.7 + 0.4 * start
    errors = [
        np.abs(end(solver, field, start, np.linspace(0, 1, num + 1)) - answer).max()
        for num in intervals
    ]
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


def test_the_solvers_of_higher_order_are_nearer_to_the_answer_for_as_many_evaluations():
    start, error = jnp.linspace(-2, 2, 9)[:, None, None, None], {}
    for solver, num in {"euler": 24, "midpoint": 12, "heun": 12, "rk4": 6, "dpm": 24}.items():
        found = end(solver, gaussian, start, np.linspace(0, 1, num + 1))
        error[solver] = np.abs(found - (0.7 + 0.4 * start)).max()
    assert max(error[name] for name in ("midpoint", "heun", "rk4", "dpm")) < error["euler"] / 5


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_loop_cut_between_any_two_evaluations_ends_at_the_same_place(solver):
    field = lambda x, t: x * jnp.cos(4 * t)  # noqa: E731
    start, grid = jax.random.normal(jax.random.key(0), (1, 2, 2, 3)), np.linspace(0, 1, 4)
    times, weights = map(jnp.asarray, evaluations(solver, grid))
    memory = (start,) * weights.shape[1]
    for t, now in zip(times, weights, strict=True):
        memory = mix(now, memory, field(memory[0], t))
    np.testing.assert_allclose(memory[0], end(solver, field, start, grid), rtol=1e-5)


@pytest.mark.parametrize("first", [0.0, 1.7e-4])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 20, 50])
def test_dpm_has_no_infinities_at_its_ends(first, num_steps):
    """Oracle 8: lambda is infinite at both ends of the path, and no gradient passes through it."""
    times = np.linspace(first, 1, num_steps + 1)
    start = jnp.full((1, 1, 1, 1), 0.5)

    def loss(start):
        return jnp.sum(solve(gaussian, start, times, solver="dpm"))

    value, gradient = jax.jit(jax.value_and_grad(loss))(start)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_the_last_step_of_dpm_ends_at_the_predicted_data():
    """Oracle 8."""
    times, weights = evaluations("dpm", shifted(5))
    look, velocity = jax.random.normal(jax.random.key(0), (2, 1, 2, 2, 1))
    last = mix(jnp.asarray(weights[-1]), (look, look), velocity)
    np.testing.assert_allclose(last[0], look + (1 - times[-1]) * velocity, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # theirs
@pytest.mark.parametrize("num_steps", [2, 5, 20])
def test_dpm_walks_the_grid_and_the_steps_of_diffusers(num_steps):
    """DPMSolverMultistepScheduler with the grid of the official program, on a field that bends."""
    diffusers = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=6.0,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(num_steps)
    start = np.random.default_rng(0).normal(size=(3, 2, 2, 1))
    x = torch.from_numpy(start)
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1], strict=True):
        # Its velocity is noise - data, and its time is that of the noise.
        field = torch.from_numpy(np.asarray(gaussian(x.numpy(), 1 - sigma.item())))
        x = scheduler.step(-field, t, x).prev_sample
    tau = np.linspace(1e-3, 1, num_steps + 1)
    grid = tau / (tau + 6.0 * (1 - tau))
    np.testing.assert_allclose(1 - scheduler.sigmas.numpy(), grid, atol=1e-6)
    found = end("dpm", gaussian, jnp.asarray(start, jnp.float32), grid)
    np.testing.assert_allclose(found, x.numpy(), atol=2e-5)
