"""One tensor of somebody's file, and the place in our parameters that it fills.

PyTorch keeps a linear layer as [outputs, inputs] and a convolution as [outputs, inputs, rows,
columns]; our kernels are [inputs, outputs] and [rows, columns, inputs, outputs], with heads as dims
of their own, and equal blocks are stacked along a leading dim. A tensor of theirs may hold several
of ours, one below the other (the official q, k and v are one matrix).

A model's table is an iterable of `Tensor`s: every leaf of our parameters once, a stack once for
each layer.
"""

import dataclasses
import math
from typing import Any

import numpy as np

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Rows `first_row` onwards of the tensor `name`, which are our `path` at `layer`.

    Attributes:
      name: In their file.
      path: In our parameters, such as "layers/attention/q/kernel".
      layer: Index along the leading dim of a stack; None outside of stacks.
      our_shape: Without the dim of layers.
      layout: "same", "linear" or "conv": how theirs lies to ours, see the module.
      num_input_dims: Of a linear kernel of ours: how many of its leading dims are inputs.
      first_row: Where ours begins in theirs, along their first dim.
    """

    name: str
    path: str
    layer: int | None
    our_shape: tuple[int, ...]
    layout: str = "same"
    num_input_dims: int = 1
    first_row: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The part of theirs that is ours."""
        if self.layout == "linear":
            n = self.num_input_dims
            return math.prod(self.our_shape[n:]), math.prod(self.our_shape[:n])
        if self.layout == "conv":
            height, width, inputs, outputs = self.our_shape
            return outputs, inputs, height, width
        return self.our_shape

    def their_index(self, index: Index) -> Index:
        """Where in the tensor `name` the part `index` of ours lies."""
        bounds = [s.indices(size)[:2] for s, size in zip(index, self.our_shape, strict=True)]
        if self.layout == "linear":
            n = self.num_input_dims
            shape = self.our_shape
            theirs = [_flat(bounds[n:], shape[n:]), _flat(bounds[:n], shape[:n])]
        elif self.layout == "conv":
            theirs = [bounds[3], bounds[2], bounds[0], bounds[1]]
        else:
            theirs = bounds
        if theirs:
            theirs[0] = tuple(bound + self.first_row for bound in theirs[0])
        return tuple(slice(*bound) for bound in theirs)

    def to_ours(self, value: np.ndarray, index: Index | None = None) -> np.ndarray:
        """Our part `index` (all by default) from what lies at `their_index` of it."""
        if index is None:
            index = tuple(slice(0, size) for size in self.our_shape)
        shape = [
            len(range(*s.indices(size))) for s, size in zip(index, self.our_shape, strict=True)
        ]
        if self.layout == "linear":
            return value.T.reshape(shape)
        if self.layout == "conv":
            return value.transpose(2, 3, 1, 0)
        return value.reshape(shape)

    def to_theirs(self, value: np.ndarray) -> np.ndarray:
        """Their rows from ours."""
        if self.layout == "linear":
            return value.reshape(self.shape[::-1]).T
        if self.layout == "conv":
            return value.transpose(3, 2, 0, 1)
        return value


def _flat(bounds: list[tuple[int, int]], shape: tuple[int, ...]) -> tuple[int, int]:
    """Bounds in the product of these dims. Only the first of them is ever split over a mesh."""
    for (start, stop), size in zip(bounds[1:], shape[1:], strict=True):
        if (start, stop) != (0, size):
            raise ValueError(f"Dims {shape} can be split along the first only, not at {bounds}")
    rest = math.prod(shape[1:])
    return bounds[0][0] * rest, bounds[0][1] * rest


def leaf(tree: Any, path: str) -> Any:
    """The leaf of nested dicts at a path such as "layers/attention/q/kernel"."""
    for key in path.split("/"):
        tree = tree[key]
    return tree
