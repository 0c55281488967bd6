"""Which devices exchange in a collective, out of the forms in which programs write it."""

import itertools
import math
import re

import numpy as np

from lumina_jax.planning.hlo_text import Instruction

Groups = tuple[tuple[int, ...], ...]


def groups(instruction: Instruction, num_devices: int) -> Groups:
    """The devices that exchange, in any of the four forms in which they are written."""
    pairs = instruction.find(r"source_target_pairs=\{((?:\{[\d,]*\},?)*)\}")
    if pairs:
        return _rows(pairs)
    listed = instruction.find(r"replica_groups=(\{(?:\{[\d,]*\},?)*\})")
    if listed:
        return _rows(listed[1:-1]) or (tuple(range(num_devices)),)

    # [groups,size]<=[a,b,..]T(permutation): numbers 0, 1, .. in that shape, transposed, reshaped.
    iota = re.search(
        r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", instruction.rest
    )
    if iota:
        shape = [int(size) for size in iota[3].split(",")]
        devices = np.arange(math.prod(shape)).reshape(shape)
        if iota[4]:
            devices = devices.transpose([int(axis) for axis in iota[4].split(",")])
        return _tuples(devices.reshape(int(iota[1]), int(iota[2])))

    # mesh['a'=8,'b'=32] {'b'}: along an axis, or part of one: 'b':(before)size.
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", instruction.rest)
    if mesh:
        axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        parts = [
            (name, int(before or 1), int(size or axes[name]))
            for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", mesh[2])
        ]
        shape, grouped = [], {}
        for name, size in axes.items():
            # An axis that is used in part is split where the part begins and where it ends.
            cuts = {1, size}
            for _, before, part in (p for p in parts if p[0] == name):
                cuts |= {before, before * part}
            cuts = sorted(cuts)
            for before, after in itertools.pairwise(cuts):
                grouped[name, before] = len(shape)
                shape.append(after // before)
        along = []
        for name, before, size in parts:
            along += [
                dim
                for (axis, start), dim in grouped.items()
                if axis == name and before <= start < before * size
            ]
        others = [dim for dim in range(len(shape)) if dim not in along]
        devices = np.arange(math.prod(shape)).reshape(shape).transpose([*others, *along])
        return _tuples(devices.reshape(-1, math.prod(shape[dim] for dim in along)))

    raise ValueError(
        f"The devices of %{instruction.name} are written in an unknown form: "
        f"{instruction.find(r'(replica_groups=.{0,80})') or instruction.rest[:120]}"
    )


def groups_of_slices(send: Instruction, devices_per_slice: int) -> Groups:
    """Device d of slice s, both from zero, has the number (s + 1) * 100000 + d in these forms."""
    product = re.search(r'_xla_megascale_target="\{([\d,]+)\}x\{(\d+):(\d+)\}"', send.rest)
    if product:
        slices = [int(number) * 100_000 for number in product[1].split(",")]
        devices = range(int(product[2]), int(product[3]) + 1)
        found = [[first + device for first in slices] for device in devices]
    else:
        listed = send.find(r'_xla_megascale_target="?\{((?:\{[\d,>-]+\},?)+)\}').replace("->", ",")
        found = _rows(listed)
    if not found:
        raise ValueError(
            f"The slices of %{send.name} are written in an unknown form: "
            f"{send.find(r'(_xla_megascale_target=.{0,80})')}"
        )
    return tuple(
        tuple((n // 100_000 - 1) * devices_per_slice + n % 100_000 for n in group)
        for group in found
    )


def _rows(text: str) -> Groups:
    rows = re.findall(r"\{([\d,]+)\}", text)
    return tuple(tuple(int(number) for number in row.split(",")) for row in rows)


def _tuples(rows: np.ndarray) -> Groups:
    return tuple(map(tuple, rows.tolist()))
