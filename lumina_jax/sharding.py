"""Where every array lives. To try another layout, change the tables here and nothing else.

The mesh has three axes (a tensor has dims, a mesh has axes):

    replica   plain data parallelism, between slices that a slow network joins
    data      the batch is split, and so are parameters, EMA and moments (FSDP)
    model     heads and feed-forward width are split (tensor parallelism), tokens between them
"""

import functools
import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from lumina_jax.errors import InputError

MESH_AXES = ("replica", "data", "model")

# Logical axis -> mesh axis or axes. A logical axis that is not listed is replicated.
# Activations have names of their own (act_*): an activation is split by batch over the very mesh
# axis that splits a parameter by width.
AXIS_RULES = {
    "embed": "data",
    "cond": "data",
    "heads": "model",
    "kv_heads": "model",
    # Rows of 9216 / 32 = 288 fill whole tiles in bfloat16, which 2304 / 32 = 72 do not.
    "mlp": ("model", "data"),
    "modulation": "model",
    "matrices": ("data", "model"),
    "act_batch": ("replica", "data"),
    "act_replica": "replica",  # a batch that is whole where the features are split: a table look-up
    # Between attention and feed-forward a chip keeps its own tokens (sequence parallelism): norms
    # are worked out once, and what the backward pass keeps of them takes 1 / model of the memory.
    "act_sequence": "model",
    "act_heads": "model",
    "act_mlp": "model",
}

# Parameter path -> logical axes of its last dims. First match wins. Stacked blocks have a leading
# dim of layers besides, which is never split.
PARAM_RULES = (
    (r"attention/q/kernel", ("embed", "heads", "head_dim")),
    (r"attention/(k|v)/kernel", ("embed", "kv_heads", "head_dim")),
    (r"attention/out/kernel", ("heads", "head_dim", "embed")),
    (r"feed_forward/(gate|up)/kernel", (None, "mlp")),
    (r"feed_forward/down/kernel", ("mlp", None)),
    (r"modulation/kernel", ("cond", "modulation")),
    (r"t_embedder/(hidden|out)/kernel", (None, "cond")),
    (r"cap_embedder/linear/kernel", (None, "embed")),
    (r"x_embedder/kernel", ("patch", "embed")),
    (r"final_layer/linear/kernel", ("embed", "patch")),
    (r"(bias|scale)$", (None,)),
)

# Those of the text encoder Gemma 2. Its four key heads stay whole: a `model` axis of eight, which
# splits its eight query heads, could not divide them, and they are a sixteenth of a layer.
GEMMA2_RULES = (
    (r"embedder/table", (None, "embed")),
    (r"attention/q/kernel", ("embed", "heads", "head_dim")),
    (r"attention/(k|v)/kernel", ("embed", None, "head_dim")),
    (r"attention/out/kernel", ("heads", "head_dim", "embed")),
    (r"feed_forward/(gate|up)/kernel", (None, "mlp")),
    (r"feed_forward/down/kernel", ("mlp", None)),
    (r"scale$", (None,)),
)

# The autoencoder is whole everywhere: that of FLUX has 84 million parameters, 0.17 GB in bfloat16,
# less than its activations for one picture. The batch is split instead.
VAE_RULES = ((r"(kernel|bias|scale)$", (None,)),)

# State of an optimizer that is not shaped like a parameter and small enough to be whole everywhere:
# means over rows and columns (Adafactor), six million numbers for the 2b model.
WHOLE = r"/(v_row|v_col)/"

Rules = tuple[tuple[str, tuple[str | None, ...]], ...]


def make_mesh(*, replica: int, data: int, model: int, devices=None) -> Mesh:
    """A mesh over MESH_AXES; a size of -1 takes the devices that the other two leave.

    Args:
      replica: Size of the axis of that name.
      data: Likewise.
      model: Likewise.
      devices: Those to use, in order; all of them by default.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [replica, data, model]
    given = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) == 1 and given > 0 and len(devices) % given == 0:
        sizes[sizes.index(-1)] = len(devices) // given
    if sizes.count(-1) > 1 or min(sizes) < 1 or math.prod(sizes) != len(devices):
        fit = _nearest_mesh(len(devices), replica, model)
        asked = ", ".join(
            f"{a}={s}" for a, s in zip(MESH_AXES, (replica, data, model), strict=True)
        )
        raise InputError(
            f"mesh ({asked}) does not fit: it must multiply to the {len(devices)} devices at hand. "
            f"One that fits: "
            + " ".join(f"--config.mesh.{a}={s}" for a, s in zip(MESH_AXES, fit, strict=True))
        )
    # A plain reshape, not mesh_utils.create_device_mesh: that one refuses 32-way parameter
    # sharding on a 16x16 torus, where rows of the reshape are contiguous strips anyway.
    grid = np.asarray(devices).reshape(sizes)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def device_kind(mesh: Mesh) -> str:
    """Of the devices of a mesh, such as "TPU v6 lite"."""
    return mesh.devices.flat[0].device_kind


def platform() -> str:
    """Of the devices that a program is traced for, which need not be at hand."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return jax.default_backend() if device is None else device.platform


def _nearest_mesh(num_devices: int, replica: int, model: int) -> tuple[int, int, int]:
    """The layout with the asked `model` and `replica` sizes as far as they divide the devices."""
    model = math.gcd(num_devices, max(model, 1))
    replica = math.gcd(num_devices // model, max(replica, 1))
    return replica, num_devices // model // replica, model


def spec(axes) -> P:
    """Mesh axes of an array with these logical axes."""
    return P(*(AXIS_RULES.get(axis) for axis in axes))


def named(mesh: Mesh, axes) -> NamedSharding:
    """The sharding over `mesh` of an array with these logical axes; () replicates."""
    return NamedSharding(mesh, spec(axes))


def param_axes(path: str, ndim: int, rules: Rules = PARAM_RULES) -> tuple[str | None, ...]:
    """Logical axes of the parameter at `path`, such as `layers/attention/q/kernel`."""
    for pattern, axes in rules:
        if re.search(pattern, path):
            return (None,) * (ndim - len(axes)) + axes
    raise ValueError(
        f"No sharding rule matches the parameter {path!r} (rank {ndim}). Add one to its table in "
        f"lumina_jax/sharding.py."
    )


def tree_shardings(tree: Any, mesh: Mesh, rules: Rules = PARAM_RULES) -> Any:
    """A sharding for each leaf of a tree of parameters or of a whole train state.

    Moments and averages lie under the same path as their parameter and follow it. A dim that the
    mesh cannot divide is an InputError that lists every such parameter.
    """
    faults: dict[str, str] = {}

    def one(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        # A number alone is a count, or what optax leaves where it keeps no moment.
        whole = leaf.size == 1 or re.search(WHOLE, name)
        axes = (None,) * leaf.ndim if whole else param_axes(name, leaf.ndim, rules)
        for size, axis in zip(leaf.shape, axes, strict=True):
            parts = math.prod(mesh.shape[a] for a in _mesh_axes(axis))
            if size % parts:
                over = " x ".join(_mesh_axes(axis))
                faults[f"{axis}={size} over {over}={parts}"] = name
        return named(mesh, axes)

    shardings = jax.tree_util.tree_map_with_path(one, tree)
    if faults:
        listed = "; ".join(f"{fault} (as in {name})" for fault, name in faults.items())
        raise InputError(
            f"The mesh {dict(mesh.shape)} cannot split the model: {listed}. Choose mesh sizes that "
            f"divide these dims."
        )
    return shardings


def placed(tree: Any, mesh: Mesh, rules: Rules = PARAM_RULES) -> Any:
    """Shapes and types of a tree, each with its sharding."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        tree,
        tree_shardings(tree, mesh, rules),
    )


def device_bytes(tree: Any) -> int:
    """Of the part of a tree, placed or on its devices, that one device holds."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def _mesh_axes(axis: str | None) -> tuple[str, ...]:
    rule = AXIS_RULES.get(axis, ())
    return (rule,) if isinstance(rule, str) else rule


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts the mesh splits a batch."""
    return math.prod(mesh.shape[axis] for axis in _mesh_axes("act_batch"))


def gather(params: Any, dtype: str | None = None, rules: Rules = PARAM_RULES) -> Any:
    """The parameters as a computation needs them: gathered where the batch is split (FSDP).

    What `model` splits stays split. Call it as late as can be, inside a scan over layers, so that
    one layer at a time is whole. Left to itself the compiler may split activations by width instead
    of gathering a weight: slower everywhere, and on a (2, 2, 2) mesh of CPU devices plainly wrong
    (jax 0.10.2; tests/sampling/test_pipeline.py sees it).

    Args:
      params: A tree whose paths end like those in `rules`.
      dtype: Of the kernels from here on; casting first halves what travels in bfloat16.
      rules: The table of these parameters.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return params

    batch = _mesh_axes("act_batch")

    def one(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        axes = param_axes(name, leaf.ndim, rules)
        if dtype is not None and name.endswith("kernel"):
            leaf = leaf.astype(dtype)
        whole = P(*(tuple(m for m in _mesh_axes(a) if m not in batch) or None for a in axes))
        return _gathered(leaf, spec(axes), whole)

    return jax.tree_util.tree_map_with_path(one, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(x, split: P, whole: P):
    """Its gradient is scattered back: pinned whole, it would be summed on every device."""
    return jax.lax.with_sharding_constraint(x, whole)


def _scatter(split, whole, _, gradient):
    shape = gradient.shape
    if len(shape) == 3:
        # As a matrix: of those the compiler makes reduce-scatters, but a gradient with heads it
        # would sum whole and cut afterwards, for twice the traffic.
        if split[0] != whole[0]:  # [D, h, d]
            matrix, axes = (shape[0], shape[1] * shape[2]), P(split[0], split[1])
        else:  # [h, d, D]
            matrix, axes = (shape[0] * shape[1], shape[2]), P(split[0], split[2])
        gradient = jax.lax.with_sharding_constraint(gradient.reshape(matrix), axes).reshape(shape)
    return (jax.lax.with_sharding_constraint(gradient, split),)


_gathered.defvjp(lambda x, split, whole: (_gathered(x, split, whole), None), _scatter)


def spread(x):
    """Stacked matrices, each whole on one device: zeros are added until they divide."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    parts = math.prod(mesh.shape[axis] for axis in _mesh_axes("matrices"))
    x = jax.numpy.pad(x, ((0, -len(x) % parts), (0, 0), (0, 0)))
    return jax.lax.with_sharding_constraint(x, spec(("matrices", None, None)))


def split_tokens(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Each part of the tokens on its own chip of `model`; partial sums are summed and scattered."""
    return constrain(x, ("act_batch", "act_sequence", "act_embed"))


def gather_tokens(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """All tokens on every chip of `model`."""
    return constrain(x, ("act_batch", None, "act_embed"))


def constrain(x, axes):
    """Pins an activation to its logical axes; does nothing outside `jax.set_mesh`."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes))
