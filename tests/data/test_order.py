"""Orders that are formulas: each record once in an epoch, each stream its share."""

import numpy as np
import pytest

from lumina_jax.data.order import apportioned, mixed, shuffled, uniforms


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 64, 97, 1000, 65537])
def test_every_epoch_holds_every_record_once(size):
    rows = np.arange(3 * size)
    epochs = shuffled(rows, size, seed=5).reshape(3, size)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(size))
    if size > 7:
        assert (epochs[0] != epochs[1]).any()
        assert (epochs[0] != shuffled(rows[:size], size, seed=6)).any()


def test_a_row_does_not_depend_on_the_rows_that_are_asked_for_with_it():
    rows = np.arange(1000)
    whole = shuffled(rows, 123, seed=1)
    some = np.array([999, 0, 500, 500, 122, 123])
    np.testing.assert_array_equal(shuffled(some, 123, seed=1), whole[some])


def test_any_record_may_come_at_any_place():
    # Chi-squared over 40,000 epochs: 63 degrees of freedom, mean 63, deviation 11.2.
    size, epochs = 64, 40_000
    for place in (0, 1, 31, 63):
        counts = np.bincount(shuffled(np.arange(epochs) * size + place, size, seed=0))
        assert len(counts) == size
        expected = epochs / size
        assert ((counts - expected) ** 2 / expected).sum() < 63 + 6 * 11.2


def test_neighbours_are_torn_apart():
    order = shuffled(np.arange(10_000), 10_000, seed=0)
    steps = np.abs(np.diff(order))
    assert (steps == 1).mean() < 0.002  # one in 5,000 by chance
    assert np.mean(steps) == pytest.approx(10_000 / 3, rel=0.05)
    assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.05


def test_a_hundred_million_records_are_no_trouble():
    size = 100_000_003
    rows = np.array([0, 1, size - 1, size, 10**12])
    records = shuffled(rows, size, seed=0)
    assert ((records >= 0) & (records < size)).all()
    assert len(set(records)) == 5


@pytest.mark.parametrize(
    "shares", [[1.0], [0.5, 0.5], [0.7, 0.2, 0.1], [3.0, 1.0, 1.0, 5.0, 0.001], [1e-3, 1.0]]
)
def test_every_stream_has_its_share_and_misses_no_row(shares):
    rows = np.arange(20_000)
    streams, inner = mixed(rows, shares)
    for stream, share in enumerate(shares):
        mine = streams == stream
        np.testing.assert_array_equal(inner[mine], np.arange(mine.sum()))
        counts = np.cumsum(mine)
        assert np.abs(counts - (rows + 1) * share / sum(shares)).max() < 3


def test_a_row_of_a_mixture_does_not_depend_on_the_others():
    streams, inner = mixed(np.arange(5000), [0.6, 0.3, 0.1])
    some = np.array([4999, 3, 17, 3])
    found = mixed(some, [0.6, 0.3, 0.1])
    np.testing.assert_array_equal(found[0], streams[some])
    np.testing.assert_array_equal(found[1], inner[some])


def test_far_rows_of_a_mixture_are_exact():
    rows = 2**45 + np.arange(1000)
    streams, inner = mixed(rows, [0.25, 0.75])
    for stream in (0, 1):
        mine = inner[streams == stream]
        np.testing.assert_array_equal(np.diff(mine), 1)


def test_the_random_numbers_of_a_row_are_uniform_and_its_own():
    rows = np.arange(50_000)
    numbers = uniforms(rows, 3, seed=1)
    assert numbers.shape == (50_000, 3)
    assert 0 <= numbers.min() < numbers.max() < 1
    counts = np.apply_along_axis(lambda n: np.histogram(n, 20, (0, 1))[0], 0, numbers)
    assert (((counts - 2500) ** 2 / 2500).sum(axis=0) < 19 + 6 * 6.2).all()  # chi-squared
    pairs = [(numbers[:, 0], numbers[:, 1]), (numbers[1:, 0], numbers[:-1, 0])]
    pairs.append((numbers[:, 2], uniforms(rows, 3, seed=2)[:, 2]))
    for a, b in pairs:
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.02
    np.testing.assert_array_equal(uniforms(rows[[7, 3]], 3, seed=1), numbers[[7, 3]])


@pytest.mark.parametrize(
    ("num", "shares", "most", "expected"),
    [
        (10, [0.5, 0.3, 0.2], [9, 9, 9], [5, 3, 2]),
        (7, [1.0, 1.0, 1.0], [9, 9, 9], [3, 2, 2]),
        (8, [0.9, 0.1], [3, 9], [3, 5]),  # what one cannot give the others do
        (0, [1.0, 2.0], [0, 0], [0, 0]),
    ],
)
def test_a_number_is_split_by_shares(num, shares, most, expected):
    assert apportioned(num, shares, most) == expected
