"""Checksums of what a checkpoint holds, the same on every mesh.

Of an array: each element's bits are mixed with its place, and the results are added. Sums of whole
numbers do not depend on their order, so every device adds its own part where it lies. A single
element that changed always changes the sum; several cancel with a chance of 2^-32.
"""

import contextlib
import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
    found, strange = {}, []
    for path, x in arrays.items():
        # Most arrays are of a few shapes, so few programs are compiled. Each is waited for: many at
        # once, which all devices must run together, can block emulated ones.
        with _mesh_of(x):  # the same program, whatever mesh the caller has set
            sums = np.asarray(_checksum(x, tuple(types[path])).addressable_data(0))
        *numbers, num_strange = sums.tolist()
        found[path] = {t: f"{n:08x}" for t, n in zip(types[path], numbers, strict=True)}
        if num_strange:
            strange.append(path)
    return found, strange


def _mesh_of(x: Array) -> contextlib.AbstractContextManager:
    if isinstance(x.sharding, jax.sharding.NamedSharding):
        return jax.set_mesh(x.sharding.mesh)
    return contextlib.nullcontext()


@functools.partial(jax.jit, static_argnames="dtypes")
def _checksum(x: Array, dtypes: tuple[str, ...]) -> UInt32[Array, " n"]:
    """Of an array in each of the types; the last number is how many elements are not finite."""
    strides = [math.prod(x.shape[dim + 1 :]) % 2**32 for dim in range(x.ndim)]
    iotas = [
        jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim) * np.uint32(stride)
        for dim, stride in enumerate(strides)
    ]
    place = _mixed(functools.reduce(jnp.add, iotas, jnp.ones((), jnp.uint32)))
    sums, finite = [], jnp.isfinite(x) if jnp.issubdtype(x.dtype, jnp.floating) else True
    for dtype in dtypes:
        y = x.astype(dtype)
        bits = jax.lax.bitcast_convert_type(y, f"uint{8 * y.dtype.itemsize}").astype(jnp.uint32)
        sums.append(jnp.sum(_mixed(bits ^ place), dtype=jnp.uint32))
    return jnp.stack([*sums, jnp.sum(~jnp.asarray(finite), dtype=jnp.uint32)])


def _mixed(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A bijection in which every bit depends on every other (the end of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
