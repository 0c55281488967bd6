"""Operations of a matrix product or convolution; a multiply-add is two."""

import functools
import math
import re

import numpy as np

from lumina_jax.planning.hlo_text import Instruction

Shape = tuple[int, ...]


def dot(instruction: Instruction, left: Shape, right: Shape, out: Shape) -> int:
    contracted = instruction.find(r"lhs_contracting_dims=\{([\d,]*)\}")
    return 2 * math.prod(out) * math.prod(left[int(dim)] for dim in contracted.split(",") if dim)


def convolution(instruction: Instruction, left: Shape, right: Shape, out: Shape) -> int:
    """Two for each pair of an output and a tap that falls on the input, not on padding."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    in_labels, kernel_labels, out_labels = labels.groups()
    window = instruction.find(r"window=\{([^}]*)\}")

    def option(name, spatial, default):
        match = re.search(rf"\b{name}=([\d_x\-]+)", window)
        return match[1].split("x")[spatial] if match else default

    flops = 2 * right[kernel_labels.index("i")]
    for size, label in zip(out, out_labels, strict=True):
        if not label.isdigit():
            flops *= size
            continue
        flops *= _valid_taps(
            inputs=left[in_labels.index(label)],
            outputs=size,
            taps=right[kernel_labels.index(label)],
            stride=int(option("stride", int(label), "1")),
            padding=int(option("pad", int(label), "0_0").split("_")[0]),
            in_dilation=int(option("lhs_dilate", int(label), "1")),
            tap_dilation=int(option("rhs_dilate", int(label), "1")),
        )
    return flops


@functools.lru_cache
def _valid_taps(*, inputs, outputs, taps, stride, padding, in_dilation, tap_dilation) -> int:
    """Of all outputs along one spatial dim."""
    count = 0
    starts = np.arange(outputs) * stride - padding
    for tap in range(taps):
        at = starts + tap * tap_dilation
        inside = (at >= 0) & (at % in_dilation == 0) & (at // in_dilation < inputs)
        count += int(np.count_nonzero(inside))
    return count
