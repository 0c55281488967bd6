"""The fit of the cache's polynomial, its file, and the pipeline that takes it."""

import numpy as np
import pytest

from lumina_jax.errors import InputError
from lumina_jax.sampling import calibration
from lumina_jax.sampling.caching import Record
from lumina_jax.sampling.calibration import Calibration
from lumina_jax.sampling.sampler import Trace
from tests.sampling.small_pipeline import make_pipeline
from tools import calibrate_cache


def test_the_fit_finds_the_polynomial_that_made_the_changes():
    distance = np.linspace(0.01, 0.4, 50)
    expected = np.array([3.0, 0.0, 1.5, 0.7, 0.0])
    found, error = calibration.fit(distance, np.polyval(expected, distance), degree=4)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert error < 1e-6


def test_the_fit_never_falls_and_begins_at_zero():
    """Whatever the points say: these fall, and a plain fit would follow them."""
    distance = np.linspace(0.05, 0.4, 50)
    change = 0.3 - distance + 0.1 * np.sin(40 * distance)
    found, error = calibration.fit(distance, np.abs(change), degree=4)
    values = np.polyval(found, np.linspace(0, 2, 100))
    assert values[0] == 0
    assert (np.diff(values) >= 0).all()
    assert 0.1 < error < 1


def record(computed, distance, change):
    return Record(np.array(computed), np.array(distance), np.array(change))


def test_the_first_evaluation_of_each_branch_had_nothing_to_move_from():
    ones = np.ones((3, 2), bool)
    numbers = np.arange(6.0).reshape(3, 2)
    trace = Trace(record(ones, numbers, 10 * numbers), record(ones[:2], -numbers[:2], numbers[:2]))
    distance, change = calibration.pairs(trace)
    assert distance.tolist() == [2, 3, 4, 5, -2, -3]
    assert change.tolist() == [20, 30, 40, 50, 2, 3]
    with pytest.raises(ValueError, match="skipped"):
        calibration.pairs(Trace(record(~ones, numbers, numbers), None))


def test_too_few_evaluations_are_refused():
    with pytest.raises(InputError, match="2 evaluations do not determine a polynomial of degree 4"):
        calibration.fit(np.ones(2), np.ones(2), degree=4)


def test_a_calibration_is_read_as_it_was_written(tmp_path):
    written = Calibration(
        coefficients=[1.0, 0.5, 0.0], largest_distance=0.3, error=0.1, fitted_to={"solver": "dpm"}
    )
    written.save(tmp_path)
    assert Calibration.load(tmp_path).coefficients == [1.0, 0.5, 0.0]
    assert Calibration.load(tmp_path / calibration.FILE_NAME).fitted_to == {"solver": "dpm"}


@pytest.mark.parametrize("content", ["", "[]", '{"coefficients": [1]}'])
def test_a_file_that_is_no_calibration_is_told(tmp_path, content):
    with pytest.raises(InputError, match="does not exist"):
        Calibration.load(tmp_path)
    (tmp_path / calibration.FILE_NAME).write_text(content)
    with pytest.raises(InputError, match="no calibration of a cache"):
        Calibration.load(tmp_path)


@pytest.mark.slow
def test_calibrating_a_model_fits_its_evaluations_and_tries_the_thresholds(tmp_path):
    """The whole tool but its flags, and the pipeline that finds its file."""
    pipeline = make_pipeline()
    found, trace = calibrate_cache.calibrate(
        pipeline, ["cat", "dog"], {"num_steps": 12}, degree=2, seed=3, thresholds=[0.05, 1e3]
    )
    distance, change = calibration.pairs(trace)
    assert found.error < 1
    np.testing.assert_allclose(
        found.error,
        np.sqrt(np.mean((np.polyval(found.coefficients, distance) - change) ** 2))
        / np.sqrt(np.mean(change**2)),
    )
    low, high = found.thresholds
    assert high["computed"] < low["computed"] <= 1
    assert high["error"] > low["error"] >= 0
    found.save(tmp_path)
    pipeline.use_calibration(tmp_path)
    assert pipeline.defaults.cache_coefficients == tuple(found.coefficients)
    pipeline("cat", cache_threshold=0.1)
