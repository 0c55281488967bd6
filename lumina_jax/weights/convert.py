"""Between files and our parameters, one tensor at a time.

A 2.6B model is 10 GB in float32 and its target may be a mesh of which no host holds the whole. So a
stack is made of zeros where it will lie and filled layer by layer: beside the target, a host holds
one tensor, and of that only the parts that its own devices need.
"""

import collections
import functools
import math
from collections.abc import Callable, Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import traverse_util
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lumina_jax.errors import InputError
from lumina_jax.weights.files import READABLE, Entry, Weights
from lumina_jax.weights.tensors import Tensor, leaf


def load(
    weights: Weights,
    tensors: Iterable[Tensor],
    abstract: Any,
    shardings: Any,
    *,
    ignored: Collection[str] | Callable[[str], bool] = (),
) -> dict:
    """Our parameters, with the types of `abstract`, laid out by `shardings`; logs what was loaded.

    Args:
      weights: Where they are.
      tensors: The model's table.
      abstract: Shapes and types of our parameters.
      shardings: One NamedSharding for each of them.
      ignored: Names of theirs, or a test of a name, that may be there and are not read.
    """
    tensors = list(tensors)
    check(weights, tensors, ignored)
    make = jax.jit(
        lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract),
        out_shardings=shardings,
    )
    flat = traverse_util.flatten_dict(make(), sep="/")
    for tensor in tensors:
        stack = flat[tensor.path]
        sharding = stack.sharding
        if tensor.layer is not None:
            sharding = NamedSharding(sharding.mesh, P(*sharding.spec[1:]))
        value = jax.make_array_from_callback(
            tensor.our_shape, sharding, functools.partial(_read, weights, tensor, stack.dtype)
        )
        if tensor.layer is not None:
            value = _set_layer(stack.sharding)(stack, value, tensor.layer)
        # Waiting keeps one tensor in memory, not a queue of them.
        flat[tensor.path] = value.block_until_ready()
    params = traverse_util.unflatten_dict(flat, sep="/")
    num_read = len({tensor.name for tensor in tensors})
    logging.info("%d tensors read from %s.\n%s", num_read, weights.path, report(params))
    return params


def check(
    weights: Weights,
    tensors: Iterable[Tensor],
    ignored: Collection[str] | Callable[[str], bool] = (),
) -> None:
    """Raises one InputError with everything that does not fit: names, shapes, types."""
    is_ignored = ignored if callable(ignored) else ignored.__contains__
    needed = their_shapes(tensors)
    faults = [f"missing    {name} {needed[name]}" for name in needed if name not in weights.shapes]
    faults += [
        f"unexpected {name} {shape}"
        for name, shape in weights.shapes.items()
        if name not in needed and not is_ignored(name)
    ]
    faults += [
        f"mis-shaped {name}: {weights.shapes[name]} there, {shape} needed"
        for name, shape in needed.items()
        if weights.shapes.get(name, shape) != shape
    ]
    faults += [
        f"unreadable {name}: its type is {weights.dtypes[name]}"
        for name in needed
        if weights.dtypes.get(name, "float32") not in READABLE
    ]
    if faults:
        raise InputError(
            f"{weights.path} does not hold the weights of this model, {len(faults)} fault(s). "
            f"Check that file and sizes belong together.\n  " + "\n  ".join(faults)
        )


def their_shapes(tensors: Iterable[Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of theirs, in order; one that holds several of ours is their sum."""
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in tensors:
        if tensor.name in shapes:
            rows, *rest = shapes[tensor.name]
            shapes[tensor.name] = (rows + tensor.shape[0], *rest)
        else:
            shapes[tensor.name] = tensor.shape
    return shapes


def entries(params: Any, tensors: Iterable[Tensor], dtype: str | None = None) -> list[Entry]:
    """What to write of our parameters; each value leaves the devices when it is written.

    Args:
      params: Nested dicts of arrays, sharded or not, all of this process's devices.
      tensors: The model's table.
      dtype: To write; each parameter's own by default.
    """
    groups: dict[str, list[Tensor]] = collections.defaultdict(list)
    for tensor in tensors:
        groups[tensor.name].append(tensor)

    def get(group):
        group = sorted(group, key=lambda tensor: tensor.first_row)
        parts = [tensor.to_theirs(_take(params, tensor)) for tensor in group]
        value = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return value if dtype is None else value.astype(jnp.dtype(dtype))

    return [
        Entry(
            name,
            shape,
            dtype or str(leaf(params, groups[name][0].path).dtype),
            functools.partial(get, groups[name]),
        )
        for name, shape in their_shapes(t for group in groups.values() for t in group).items()
    ]


def report(params: Any) -> str:
    """A line for each part of the model: arrays, numbers, Euclidean norm."""
    norms = jax.device_get(jax.jit(_squared_norms)(params))
    lines = [f"{'part':<18}{'arrays':>8}{'numbers':>16}{'norm':>14}"]
    rows = {
        part: (len(leaves := jax.tree.leaves(tree)), sum(x.size for x in leaves), norms[part])
        for part, tree in params.items()
    }
    rows["all"] = tuple(sum(column) for column in zip(*rows.values(), strict=True))
    for part, (arrays, numbers, square) in rows.items():
        lines.append(f"{part:<18}{arrays:>8}{numbers:>16,}{math.sqrt(square):>14.6g}")
    return "\n".join(lines)


def _squared_norms(params):
    return {
        part: sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree))
        for part, tree in params.items()
    }


def _read(weights, tensor, dtype, index):
    value = weights.read(tensor.name, tensor.their_index(index))
    return tensor.to_ours(value, index).astype(dtype)


@functools.lru_cache
def _set_layer(sharding):
    """set(stack, value, layer), in place."""
    return jax.jit(
        lambda stack, value, layer: jax.lax.dynamic_update_index_in_dim(stack, value, layer, 0),
        donate_argnums=0,
        out_shardings=sharding,
    )


@jax.jit
def _get_layer(stack, layer):
    return jax.lax.dynamic_index_in_dim(stack, layer, axis=0, keepdims=False)


def _take(params, tensor):
    value = leaf(params, tensor.path)
    return np.asarray(value if tensor.layer is None else _get_layer(value, tensor.layer))
