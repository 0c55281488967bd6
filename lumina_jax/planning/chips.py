"""The TPUs that a program can be compiled for without having one, and what each can do.

Peaks and bandwidths are those of Google's product pages and of "How to Scale Your Model"
(jax-ml.github.io/scaling-book, chapter 2); clocks follow from the compiler's own estimates of large
matrix products, which come to 90 to 98 % of the peak at them.
"""

import dataclasses
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies

from lumina_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One chip, which JAX sees as one device."""

    name: str
    libtpu_name: str
    num_dims: int  # of the torus of a slice
    largest_slice: int  # chips
    hbm_gib: float  # of it, what the compiler lets a program have
    flops: float  # a second, bfloat16
    hbm_bytes_per_second: float
    ici_bytes_per_second: float  # one way, over all of its links
    dcn_bytes_per_second: float  # to other slices
    clock: float  # cycles a second


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v5e", libtpu_name="v5e", num_dims=2, largest_slice=256, hbm_gib=15.75,
            flops=197e12, hbm_bytes_per_second=819e9,
            ici_bytes_per_second=180e9, dcn_bytes_per_second=3.1e9, clock=1.5e9,
        ),
        Chip(
            name="v5p", libtpu_name="v5", num_dims=3, largest_slice=6144, hbm_gib=95.73,
            flops=459e12, hbm_bytes_per_second=2765e9,
            ici_bytes_per_second=540e9, dcn_bytes_per_second=6.2e9, clock=1.75e9,
        ),
        Chip(
            name="v6e", libtpu_name="v6e", num_dims=2, largest_slice=256, hbm_gib=31.24,
            flops=918e12, hbm_bytes_per_second=1640e9,
            ici_bytes_per_second=360e9, dcn_bytes_per_second=12.5e9, clock=1.75e9,
        ),
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Topology:
    """Slices of chips of one kind, such as v5e:16x16 or 2*v5e:16x16."""

    chip: Chip
    shape: tuple[int, ...]
    num_slices: int = 1

    @classmethod
    def parse(cls, text: str) -> "Topology":
        match = re.fullmatch(r"(?:([1-9]\d*)\*)?(\w+):([1-9]\d*(?:x[1-9]\d*)+)", text)
        if match is None or match[2] not in CHIPS:
            raise InputError(
                f"--topology={text!r} is not one such as v5e:16x16, v5p:4x4x4, v6e:16x16, or "
                f"2*v5e:16x16 for two slices; chips: {', '.join(CHIPS)}."
            )
        topology = cls(CHIPS[match[2]], tuple(map(int, match[3].split("x"))), int(match[1] or 1))
        chip, sizes = topology.chip, len(topology.shape)
        if sizes != chip.num_dims or topology.chips_per_slice > chip.largest_slice:
            raise InputError(
                f"--topology={text!r}: a slice of {chip.name} has {chip.num_dims} sizes and at "
                f"most {chip.largest_slice} chips, not {sizes} and {topology.chips_per_slice}."
            )
        return topology

    def __str__(self) -> str:
        slices = f"{self.num_slices}*" if self.num_slices > 1 else ""
        return f"{slices}{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips_per_slice(self) -> int:
        return math.prod(self.shape)

    @property
    def num_chips(self) -> int:
        return self.num_slices * self.chips_per_slice

    def devices(self) -> list:
        """What to compile for; slice after slice."""
        if importlib.util.find_spec("libtpu") is None:
            raise InputError(
                "Compiling for TPUs needs their compiler, also where there is no TPU: "
                "pip install 'lumina-jax[plan]' (or [tpu] on a TPU machine)."
            )
        set_environment()
        name = f"{self.chip.libtpu_name}:{'x'.join(map(str, self.shape))}"
        slices = {"num_slices": self.num_slices} if self.num_slices > 1 else {}
        try:
            found = topologies.get_topology_desc(platform="tpu", topology_name=name, **slices)
        except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
            raise InputError(
                f"libtpu has no such slice: {self}. {str(error).strip().splitlines()[0]}."
            ) from None
        return list(found.devices)


def set_environment() -> None:
    """What libtpu would else ask the machine, or refuse to several processes."""
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE="v5litepod-8",
        TPU_WORKER_HOSTNAMES="localhost",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )
