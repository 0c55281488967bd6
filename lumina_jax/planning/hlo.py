"""What a compiled TPU program does: its operations, traffic, kernels and estimated cycles.

`compiled.cost_analysis()` counts the body of a loop once and a Pallas kernel as nothing, so the
program's text (`compiled.as_text()`) is read instead. Everything is of one device and one run of
the program; what stands in a loop counts as often as the loop turns, loops within loops multiply.

The text of libtpu, where it is not what one would guess:

  * A matrix product is a `convolution` with `dim_labels`, most often inside a fusion.
  * An asynchronous all-gather is repeated in every fusion that carries a part of it; all repeats
    have one `channel_id`.
  * A reduce-scatter is a fusion that calls `%all-reduce-scatter`, which holds an all-reduce.
  * Shards that do not fill a tile are "gathered" by an all-reduce of mostly zeros, made with
    dynamic-update-slice: a fake gather, of twice the bytes.
  * A small gather or reduce-scatter beside a product becomes a loop of collective-permutes.
  * What leaves a slice is a send to the host and a receive from it, for "megascale"; the groups of
    all other collectives are those of one slice.
  * A loop may start at one, or step by two: the first turn was peeled off, or two are one.
  * Cycles are the compiler's estimate for one core. They hold no collective, no wait for memory and
    no Pallas kernel (see bundles.py): good for comparing two programs, not as a promise.
"""

import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable
from typing import NamedTuple

from lumina_jax.planning import device_groups, products
from lumina_jax.planning.hlo_text import (
    ArrayType,
    Frame,
    Instruction,
    Module,
    arrays_in,
    elements_of,
)
from lumina_jax.planning.loops import trip_count

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

# Kinds of cycles, by what an instruction does to arrays; the first that fits.
KINDS = ("dots", "reduces", "elementwise", "slices", "copies")
SLICES = {
    "slice", "dynamic-slice", "dynamic-update-slice", "pad", "concatenate", "gather", "scatter",
}  # fmt: skip
COPIES = {
    "copy", "transpose", "reshape", "broadcast", "bitcast", "tuple", "get-tuple-element",
    "parameter", "constant", "custom-call",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """An instruction with an estimate. `cycles` are those of all its executions."""

    name: str
    op_name: str  # where in the model's code it comes from
    kind: str  # one of KINDS
    results: tuple[ArrayType, ...]
    cycles: int
    executions: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """An exchange between devices.

    `arrays` are whole: results of a gather, operands of anything else. Devices are numbered as in
    the mesh, so the numbers of a slice are contiguous if the mesh was made from devices in order.
    In a program for several slices an exchange within a slice shows the numbers of the first.
    """

    kind: str  # one of COLLECTIVES
    name: str
    op_name: str
    arrays: tuple[ArrayType, ...]
    groups: tuple[tuple[int, ...], ...]  # of devices; (source, target) of a collective-permute
    executions: int
    asynchronous: bool  # other work may hide it
    fake_gather: bool  # an all-reduce that only gathers

    @property
    def largest(self) -> ArrayType:
        return max(self.arrays, key=lambda array: array.bytes)

    @property
    def dtype(self) -> str:
        return self.largest.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.largest.shape

    @property
    def bytes(self) -> int:
        """Of the whole arrays, once."""
        return sum(array.bytes for array in self.arrays)

    @property
    def group_size(self) -> int:
        return max(map(len, self.groups))

    @property
    def wire_bytes(self) -> float:
        """What one chip sends, in all executions, as a ring does it."""
        size = self.group_size
        passes = {"collective-permute": 1.0, "all-reduce": 2 * (size - 1) / size}.get(
            self.kind, (size - 1) / size
        )
        return self.bytes * self.executions * passes

    def crosses(self, devices_per_slice: int) -> bool:
        """Whether it leaves a slice, and so takes the slow network."""
        return any(len({i // devices_per_slice for i in group}) > 1 for group in self.groups)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """A Pallas kernel. Its time is in no estimate of the program's text."""

    name: str  # of the instruction
    op_name: str
    metadata: str  # what its author said of it, such as block sizes; often nothing
    code: str  # a digest of what it computes
    config: str  # what libtpu is given to compile it, as JSON
    operands: tuple[ArrayType, ...]
    results: tuple[ArrayType, ...]
    executions: int

    @property
    def function(self) -> str:
        """The name given to `pallas_call`: that of the instruction without its number."""
        return re.sub(r"(\.\d+|\.clone|\.remat\d*)+$", "", self.name)


# In the configuration of a compiled kernel, what the compiler itself has added.
_FOUND = ("used_scoped_memory_configs", "retry_config", "aliasing_operands")


class HostTraffic(NamedTuple):
    """Bytes between the device and pinned host memory."""

    to_host: int
    from_host: int


class Buffer(NamedTuple):
    """A result that is written to memory, and one instruction that does so."""

    array: ArrayType
    name: str
    op_name: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """One run of a program on one device."""

    dot_flops: int  # of matrix products and convolutions; a multiply-add is two
    costs: tuple[Cost, ...]
    collectives: tuple[Collective, ...]
    kernels: tuple[Kernel, ...]
    host_bytes: HostTraffic
    conditionals: int  # see `analyze` for what is counted of them
    largest: tuple[Buffer, ...]  # every distinct array outside fusions, largest first

    @property
    def cycles(self) -> int:
        return sum(cost.cycles for cost in self.costs)

    @property
    def cycles_by(self) -> dict[str, int]:
        """Estimated cycles of each kind of work, most first."""
        cycles = collections.Counter()
        for cost in self.costs:
            cycles[cost.kind] += cost.cycles
        return dict(cycles.most_common())

    def hottest(self, n: int) -> list[Cost]:
        """The n most expensive instructions, all executions together."""
        return sorted(self.costs, key=lambda cost: -cost.cycles)[:n]


def analyze(text: str, *, taken: float = 1.0) -> Program:
    """Reads the text of a compiled program. A loop of unknown length is a ValueError.

    Of a condition all branches are counted, those that hold a loop in so many of the executions:
    the layers of a sampler, which its cache may skip.
    """
    return _Walk(Module(text), taken).program()


class _Walk:
    """Goes through a program as it runs and collects what it does."""

    def __init__(self, module: Module, taken: float):
        self.module, self.taken = module, taken
        self.dot_flops = 0
        self.conditionals = 0
        self.costs: list[Cost] = []
        self.collectives: dict[tuple, Collective] = {}
        self.kernels: list[Kernel] = []
        self.host = [0, 0]
        self.buffers: dict[ArrayType, Buffer] = {}

    def program(self) -> Program:
        self.run(Frame(self.module, self.module.computations[self.module.entry], 1))
        return Program(
            dot_flops=self.dot_flops,
            costs=tuple(self.costs),
            collectives=tuple(self.collectives.values()),
            kernels=tuple(self.kernels),
            host_bytes=HostTraffic(*self.host),
            conditionals=self.conditionals,
            largest=tuple(sorted(self.buffers.values(), key=lambda b: (-b.array.bytes, b.array))),
        )

    def run(self, frame: Frame) -> None:
        """One computation outside fusions."""
        for instruction in frame.computation.instructions.values():
            opcode = instruction.opcode
            if opcode == "while":
                body = instruction.find(r"body=%?([\w.\-]+)")
                trips = trip_count(frame, instruction)
                self.run(frame.enter(instruction, body, trips))
                continue
            if opcode == "conditional":
                self.conditionals += 1
                for branch in _branches(instruction):
                    inside = frame.enter(instruction, branch)
                    if _holds_loop(inside):
                        share = max(round(inside.executions * self.taken), 1)
                        inside = dataclasses.replace(inside, executions=share)
                    self.run(inside)
                continue
            if instruction.base == "call":
                self.run(frame.enter(instruction, instruction.called))
                continue

            self.note_cost(frame, instruction)
            self.note_buffers(instruction)
            self.note_host(frame, instruction)
            if opcode == "custom-call" and "tpu_custom_call" in instruction.rest:
                self.note_kernel(frame, instruction)
            elif opcode == "send" and "megascale" in instruction.rest:
                self.note_transfer(frame, instruction)
            elif opcode in ("fusion", "async-start"):
                self.fused(frame.enter(instruction, instruction.called), instruction)
            else:
                self.note_dot(frame, instruction)
                self.note_collective(frame, instruction, within=None)

    def fused(self, frame: Frame, outermost: Instruction) -> None:
        """A fusion: products, collectives and kernels count, other results stay in registers."""
        for instruction in frame.computation.instructions.values():
            if instruction.opcode == "custom-call" and "tpu_custom_call" in instruction.rest:
                self.note_kernel(frame, instruction)
            self.note_dot(frame, instruction)
            self.note_collective(frame, instruction, within=outermost)
            if instruction.opcode in ("fusion", "call", "call-start", "async-start"):
                self.fused(frame.enter(instruction, instruction.called), outermost)

    def note_cost(self, frame: Frame, instruction: Instruction) -> None:
        cycles = instruction.find(r'"estimated_cycles":"(\d+)"')
        if cycles and int(cycles):
            self.costs.append(
                Cost(
                    name=instruction.name,
                    op_name=instruction.op_name,
                    kind=self.kind(instruction),
                    results=arrays_in(instruction.type),
                    cycles=int(cycles) * frame.executions,
                    executions=frame.executions,
                )
            )

    def kind(self, instruction: Instruction) -> str:
        # A fusion that carries a part of a gather does work of its own: that is what costs.
        opcodes = set(self.opcodes(instruction)) - set(COLLECTIVES)
        if opcodes & {"convolution", "dot"}:
            return "dots"
        if opcodes & {"reduce", "reduce-window", "sort"}:
            return "reduces"
        if opcodes - SLICES - COPIES:
            return "elementwise"
        return "slices" if opcodes & SLICES else "copies"

    def opcodes(self, instruction: Instruction) -> Iterable[str]:
        if instruction.opcode not in ("fusion", "call", "async-start"):
            return [instruction.opcode]
        return self.opcodes_of(instruction.called)

    @functools.cache  # noqa: B019, the walk ends with the program
    def opcodes_of(self, name: str) -> frozenset[str]:
        """The operations on arrays in a computation; those on scalars compute indices."""
        found = set()
        for instruction in self.module.computations[name].instructions.values():
            if any(array.shape for array in arrays_in(instruction.type)):
                found.update(self.opcodes(instruction))
        return frozenset(found)

    def note_buffers(self, instruction: Instruction) -> None:
        if instruction.opcode in ("tuple", "get-tuple-element", "bitcast"):
            return
        for array in arrays_in(instruction.type):
            if array not in self.buffers:
                self.buffers[array] = Buffer(array, instruction.name, instruction.op_name)

    def note_host(self, frame: Frame, instruction: Instruction) -> None:
        """Pinned host memory is memory space 5, S(5) in a layout."""
        base = instruction.base
        if base not in ("copy", "slice", "dynamic-slice", "dynamic-update-slice"):
            return
        types = [frame.type(name) for name in instruction.operands]
        target, source = instruction.type, types[0]
        if base == "dynamic-update-slice":
            target, source = types[0], types[1]
            moved = source
        elif instruction.opcode == "copy-start":
            target = moved = elements_of(instruction.type)[0]
        elif instruction.opcode.endswith("-start"):
            target = moved = elements_of(instruction.type)[1]
        else:
            moved = target
        to_host, from_host = "S(5)" in target, "S(5)" in source
        if to_host != from_host:
            size = sum(array.bytes for array in arrays_in(moved))
            self.host[0 if to_host else 1] += size * frame.executions

    def note_kernel(self, frame: Frame, instruction: Instruction) -> None:
        types = [frame.type(name) for name in instruction.operands]
        _, _, after = instruction.rest.partition("backend_config=")
        config, _ = json.JSONDecoder().raw_decode(after)
        body = config.get("custom_call_config", {}).get("body", "")
        self.kernels.append(
            Kernel(
                name=instruction.name,
                op_name=instruction.op_name,
                metadata=instruction.find(r"kernel_metadata=\{(.*?)\}\}, metadata="),
                code=hashlib.sha256(repr((instruction.type, types, body)).encode()).hexdigest(),
                config=json.dumps({n: v for n, v in config.items() if n not in _FOUND}),
                operands=tuple(itertools.chain.from_iterable(map(arrays_in, types))),
                results=arrays_in(instruction.type),
                executions=frame.executions,
            )
        )

    def note_dot(self, frame: Frame, instruction: Instruction) -> None:
        if instruction.opcode in ("convolution", "dot"):
            types = (frame.type(name) for name in instruction.operands[:2])
            left, right = (arrays_in(type_text)[0].shape for type_text in types)
            out = arrays_in(instruction.type)[0].shape
            flops = products.dot if instruction.opcode == "dot" else products.convolution
            self.dot_flops += flops(instruction, left, right, out) * frame.executions

    def note_collective(
        self, frame: Frame, instruction: Instruction, within: Instruction | None
    ) -> None:
        kind = instruction.base
        if kind not in COLLECTIVES:
            return
        operands = [frame.computation.instructions[name] for name in instruction.operands]
        if kind == "all-gather":
            results = elements_of(instruction.type)
            started = instruction.opcode.endswith("-start")
            arrays = arrays_in(results[1] if started else instruction.type)
        else:
            arrays = tuple(itertools.chain.from_iterable(arrays_in(o.type) for o in operands))
        scatters = within is not None and "all-reduce-scatter" in frame.computation.name
        carried = within is not None and self.carries(frame.computation.name)
        # An asynchronous gather is repeated in all that carries a part of it, loops inside its own
        # among them, and known by its chain: where the first turn of a loop was moved ahead of it,
        # two gathers have one channel. Other collectives may share a channel and are still several.
        chain = instruction.find(r'chain_id="(\d+)"') or instruction.find(r"channel_id=(\d+)")
        key = ("carried", chain) if carried else (frame.path, instruction.name)
        if key in self.collectives and self.collectives[key].executions <= frame.executions:
            return
        self.collectives[key] = Collective(
            kind="reduce-scatter" if scatters else kind,
            name=instruction.name,
            op_name=(within if scatters else instruction).op_name,
            arrays=arrays,
            groups=device_groups.groups(instruction, self.module.num_devices),
            executions=frame.executions,
            asynchronous=carried
            or instruction.opcode.endswith("-start")
            or (within is not None and within.opcode == "async-start"),
            fake_gather=kind == "all-reduce" and self.mostly_updates(operands),
        )

    def note_transfer(self, frame: Frame, send: Instruction) -> None:
        """A collective between slices, over the network of the hosts."""
        of = re.compile(r'_xla_host_transfer_rendezvous="([^"]*)"')
        [receive] = (
            other
            for other in frame.computation.instructions.values()
            if other.opcode == "recv" and other.find(of) == send.find(of)
        )
        kind = send.find(r'_xla_megascale_transfer_type="(\w+)"').lower().replace("_", "-")
        kind = "collective-permute" if kind == "one-to-one" else kind
        if kind not in COLLECTIVES:
            raise ValueError(f"%{send.name} is an unknown transfer between slices: {kind}.")
        self.collectives[frame.path, send.name] = Collective(
            kind=kind,
            name=send.name,
            op_name=send.op_name,
            arrays=arrays_in(elements_of((receive if kind == "all-gather" else send).type)[0]),
            groups=device_groups.groups_of_slices(send, self.module.num_devices),
            executions=frame.executions,
            asynchronous=True,
            fake_gather=False,
        )

    @functools.cache  # noqa: B019
    def carries(self, name: str) -> bool:
        """Whether a fusion starts, moves on or ends an asynchronous gather."""
        instructions = self.module.computations[name].instructions.values()
        return name.startswith("async_collective_fusion") or any(
            "AsyncCollective" in instruction.find(r'custom_call_target="(\w+)"')
            for instruction in instructions
        )

    def mostly_updates(self, operands: list[Instruction]) -> bool:
        """By bytes: the compiler puts many small sums into one all-reduce, some made by updates."""
        sizes = [sum(array.bytes for array in arrays_in(o.type)) for o in operands]
        updated = sum(size for size, o in zip(sizes, operands, strict=True) if self.updates(o))
        return 2 * updated > sum(sizes)

    def updates(self, instruction: Instruction) -> bool:
        """Whether it places a part in an array that is otherwise empty."""
        if instruction.opcode == "fusion":
            instruction = self.module.computations[instruction.called].root
        return instruction.opcode == "dynamic-update-slice"


def _holds_loop(frame: Frame) -> bool:
    return any(i.opcode == "while" for i in frame.computation.instructions.values())


def _branches(conditional: Instruction) -> list[str]:
    listed = conditional.find(r"branch_computations=\{([^}]*)\}")
    if listed:
        return re.findall(r"[\w.\-]+", listed.replace("%", ""))
    return [conditional.find(rf"{side}_computation=%?([\w.\-]+)") for side in ("true", "false")]
