"""Checksums of what a checkpoint holds, the same on every mesh.

Of an array: each element's bits are mixed with its place, and the results are added. Sums of whole
numbers do not depend on their order, so every device adds its own part where it lies, and the hosts
add those. A single element that changed always changes the sum; several cancel with a chance of
2^-32.
"""

import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, UInt32


def make(state: Any, **contents: Mapping) -> tuple[dict, list[str]]:
    """What is written beside a state and what is said of it, and where it has NaN or infinity.

    `arrays` has for each path the checksum of its type, and for float32 also that of its numbers
    rounded to bfloat16, in which weights are often read; besides, the hash of each content.
    """
    arrays = _by_path(state)
    types = {
        path: (str(x.dtype), "bfloat16")[: 1 + (x.dtype == "float32")] for path, x in arrays.items()
    }
    checksums, strange = _checksums(arrays, types)
    digest = {"arrays": checksums} | {name: of_json(content) for name, content in contents.items()}
    return digest | {"digest": of_json(digest)}, strange


def is_sound(digest: Mapping) -> bool:
    """Whether a digest is as it was made."""
    content = dict(digest)
    return content.pop("digest", None) == of_json(content)


def differing(state: Any, digest: Mapping) -> list[str]:
    """The paths of the arrays that are not those of the digest, which may hold more of them."""
    arrays, entries = _by_path(state), digest.get("arrays", {})
    known = {path: x for path, x in arrays.items() if entries.get(path)}
    # Read in a wider type than it was written in, an array is rounded back without loss.
    types = {
        path: (dtype if (dtype := str(x.dtype)) in entries[path] else next(iter(entries[path])),)
        for path, x in known.items()
    }
    found, _ = _checksums(known, types)
    return [
        path
        for path in arrays
        if path not in known or not found[path].items() <= entries[path].items()
    ]


def of_json(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _by_path(tree: Any) -> dict[str, Array]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _checksums(
    arrays: Mapping[str, Array], types: Mapping[str, Sequence[str]]
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """The checksums of each array in its types, and which of them have NaN or infinity.

    All processes call it together.
    """
    # Begun all before any is waited for: no device waits for another one.
    parts = {path: _parts(x, tuple(types[path])) for path, x in arrays.items()}
    sums = [_own(arrays[path], part) for path, part in parts.items()]
    if sums and jax.process_count() > 1:
        numbers = multihost_utils.process_allgather(np.concatenate(sums))
        ends = np.cumsum([len(own) for own in sums])
        sums = np.split(numbers.sum(axis=0, dtype=np.uint32), ends[:-1])
    found, strange = {}, []
    for path, total in zip(arrays, sums, strict=True):
        *numbers, num_strange = total.tolist()
        found[path] = {t: f"{n:08x}" for t, n in zip(types[path], numbers, strict=True)}
        if num_strange:
            strange.append(path)
    return found, strange


def _own(x: Array, parts: Array) -> UInt32[np.ndarray, " n"]:
    """The sum over this process's devices, of equal shards only one."""
    first = {shard.device for shard in x.addressable_shards if shard.replica_id == 0}
    total = np.zeros(parts.shape[1], np.uint32)
    for part in parts.addressable_shards:
        if part.device in first:
            total += np.asarray(part.data)[0]
    return total


def _parts(x: Array, dtypes: tuple[str, ...]) -> UInt32[Array, "devices n"]:
    """What each device has of the sums, a row each, where it lies."""
    if isinstance(x.sharding, jax.sharding.NamedSharding):
        # The same program, whatever mesh the caller has set.
        with jax.set_mesh(x.sharding.mesh):
            return _sharded_parts(x, x.sharding, dtypes)
    return _parts_of_one(x, dtypes)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _sharded_parts(x: Array, sharding: jax.sharding.NamedSharding, dtypes: tuple[str, ...]):
    spec = [*sharding.spec, *[None] * (x.ndim - len(sharding.spec))]

    def of_shard(shard):
        places = [jax.lax.axis_index(axes) if axes else 0 for axes in spec]
        return _sums(shard, places, x.shape, dtypes)[None]

    every = jax.sharding.PartitionSpec(sharding.mesh.axis_names)
    return jax.shard_map(
        of_shard, mesh=sharding.mesh, in_specs=sharding.spec, out_specs=every, check_vma=False
    )(x)


@functools.partial(jax.jit, static_argnums=1)
def _parts_of_one(x: Array, dtypes: tuple[str, ...]):
    return _sums(x, [0] * x.ndim, x.shape, dtypes)[None]


def _sums(
    x: Array, places: Sequence, shape: tuple[int, ...], dtypes: tuple[str, ...]
) -> UInt32[Array, " n"]:
    """Of a shard in each of the types; the last number is how many elements are not finite.

    Args:
      x: The shard.
      places: Which it is along each dim.
      shape: Of the whole array.
      dtypes: The types.
    """
    index = jnp.ones((), jnp.uint32)
    for dim, size in enumerate(x.shape):
        stride = np.uint32(math.prod(shape[dim + 1 :]) % 2**32)
        first = jnp.uint32(places[dim]) * np.uint32(size)
        index += (jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim) + first) * stride
    place, sums = _mixed(index), []
    for dtype in dtypes:
        y = x.astype(dtype)
        bits = jax.lax.bitcast_convert_type(y, f"uint{8 * y.dtype.itemsize}").astype(jnp.uint32)
        sums.append(jnp.sum(_mixed(bits ^ place), dtype=jnp.uint32))
    is_strange = ~jnp.isfinite(x) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.uint32(0)
    return jnp.stack([*sums, jnp.sum(is_strange, dtype=jnp.uint32)])


def _mixed(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A bijection in which every bit depends on every other (the end of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
