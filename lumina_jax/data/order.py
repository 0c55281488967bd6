"""The order of rows: endless, shuffled, mixed by weight, and a formula.

Row k of a stream can be computed without the rows before it, by anyone who knows the seed; nothing
is stored, whatever the number of records. All functions take arrays of rows, because a batch of
them costs hardly more than one.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int64, UInt64

_NUM_ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15  # of splitmix64, as the numbers in `_hash`


def shuffled(rows: Int64[np.ndarray, " n"], size: int, seed: int) -> Int64[np.ndarray, " n"]:
    """Returns the record of each row of an endless stream: every `size` rows hold each once.

    Each epoch is a permutation of its own: a Feistel network over Z_a x Z_b, where a b is the first
    product of about equal numbers that is not below `size`; what falls outside goes in again
    (Black and Rogaway, Ciphers with arbitrary finite domains, 2002).
    """
    a = math.isqrt(size - 1) + 1
    b = -(-size // a)
    epochs, places = np.divmod(rows, size)
    keys = _hash(epochs.astype(np.uint64) + np.uint64(seed))
    records = _permute(places, keys, a, b)
    while (outside := np.flatnonzero(records >= size)).size:
        records[outside] = _permute(records[outside], keys[outside], a, b)
    return records


def _permute(
    places: Int64[np.ndarray, " n"], keys: UInt64[np.ndarray, " n"], a: int, b: int
) -> Int64[np.ndarray, " n"]:
    left, right = np.divmod(places, b)
    for number in range(_NUM_ROUNDS):
        keys = keys + np.uint64(_GOLDEN)
        if number % 2:
            right = (right + _draw(left, keys, b)) % b
        else:
            left = (left + _draw(right, keys, a)) % a
    return left * b + right


def _draw(
    values: Int64[np.ndarray, " n"], keys: UInt64[np.ndarray, " n"], bound: int
) -> Int64[np.ndarray, " n"]:
    return (_hash(values.astype(np.uint64) ^ keys) % np.uint64(bound)).astype(np.int64)


def uniforms(rows: Int64[np.ndarray, " n"], num: int, seed: int) -> Float64[np.ndarray, "n D"]:
    """Returns random numbers in [0, 1) of each row, D = `num` of them."""
    keys = _hash(rows.astype(np.uint64) ^ _hash(np.array([seed], np.uint64)))
    counters = np.arange(num, dtype=np.uint64) * np.uint64(_GOLDEN)
    # The upper 53 bits: as many as a double holds.
    return (_hash(keys[:, None] + counters[None, :]) >> np.uint64(11)) * 2.0**-53


def _hash(values: UInt64[np.ndarray, "*n"]) -> UInt64[np.ndarray, "*n"]:
    """The finalizer of splitmix64 (Steele, Lea and Flood, 2014)."""
    values = values + np.uint64(_GOLDEN)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def mixed(
    rows: Int64[np.ndarray, " n"], shares: Sequence[float]
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """Returns the stream that each row of a mixture comes from, and its row there.

    A stream has its share of any stretch of rows, but for less than one row for each time that the
    streams are halved: of the first k rows, floor(k p) are of the half with the share p.
    """
    streams = np.zeros_like(rows)
    if len(shares) == 1:
        return streams, rows
    middle = len(shares) // 2
    share = sum(shares[:middle]) / sum(shares)
    before, after = (np.floor(k * share).astype(np.int64) for k in (rows, rows + 1))
    is_left = after > before
    inner = np.where(is_left, before, rows - before)
    for half, mask, first in ((shares[:middle], is_left, 0), (shares[middle:], ~is_left, middle)):
        within, inner[mask] = mixed(inner[mask], half)
        streams[mask] = within + first
    return streams, inner


def apportioned(num: int, shares: Sequence[float], most: Sequence[int]) -> list[int]:
    """Splits `num` by shares into whole numbers, none above its `most`, whose sum must suffice.

    What rounding down leaves goes, one by one, to those that are furthest behind.
    """
    quotas = [num * share / sum(shares) for share in shares]
    counts = [min(int(quota), limit) for quota, limit in zip(quotas, most, strict=True)]
    for _ in range(num - sum(counts)):
        behind = [i for i, limit in enumerate(most) if counts[i] < limit]
        counts[max(behind, key=lambda i: (quotas[i] - counts[i], -i))] += 1
    return counts
