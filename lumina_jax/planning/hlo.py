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
import itertools
import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16,
    "s32": 32, "u32": 32, "s64": 64, "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64,
    "c64": 64, "c128": 128, "token": 0, "opaque": 0,
    "f8e4m3": 8, "f8e4m3fn": 8, "f8e4m3b11fnuz": 8, "f8e4m3fnuz": 8, "f8e5m2": 8, "f8e5m2fnuz": 8,
    "f8e3m4": 8, "f8e8m0fnu": 8, "f4e2m1fn": 4,
}  # fmt: skip

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


class ArrayType(NamedTuple):
    """The type of an array, such as bf16[2,4096]."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Without the padding of a layout."""
        return -(-math.prod(self.shape) * BITS[self.dtype] // 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


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

    name: str  # of the instruction; files of its bundles carry it
    op_name: str
    metadata: str  # what its author said of it, such as block sizes; often nothing
    operands: tuple[ArrayType, ...]
    results: tuple[ArrayType, ...]
    executions: int

    @property
    def function(self) -> str:
        """The name given to `pallas_call`: that of the instruction without its number."""
        return re.sub(r"(\.\d+|\.clone|\.remat\d*)+$", "", self.name)


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
    conditionals: int  # all branches of each are counted
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


def analyze(text: str) -> Program:
    """Reads the text of a compiled program. A loop of unknown length is a ValueError."""
    return _Walk(_Module(text)).program()


class _Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str  # the operands' text and all attributes

    def find(self, pattern: str | re.Pattern) -> str:
        """The first group of the pattern in the attributes, or nothing."""
        match = re.search(pattern, self.rest)
        return match[1] if match else ""

    @property
    def op_name(self) -> str:
        return self.find(r'op_name="([^"]*)"')

    @property
    def base(self) -> str:
        return self.opcode.removesuffix("-start")

    @property
    def called(self) -> str:
        return self.find(r"(?:calls|to_apply)=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class _Computation:
    name: str
    instructions: dict[str, _Instruction]
    root: _Instruction

    def parameter(self, instruction: _Instruction) -> int:
        return int(instruction.rest[1 : instruction.rest.index(")")])


_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_END = re.compile(r"^\}(, execution_thread=.*)?$")
_INSTRUCTION = re.compile(r"^ +(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b(" + "|".join(sorted(BITS, key=len, reverse=True)) + r")\[([\d,<=]*)\]")


class _Module:
    """The computations of a program by name, and the entry."""

    def __init__(self, text: str):
        self.computations: dict[str, _Computation] = {}
        self.entry = ""
        header, _, _ = text.partition("\n")
        count = [re.search(rf"num_{of}=(\d+)", header) for of in ("replicas", "partitions")]
        self.num_devices = math.prod(int(match[1]) for match in count if match)
        lines = iter(text.splitlines())
        for line in lines:
            match = _HEADER.match(line)
            if match:
                self.computations[match[2]] = self._computation(match[2], lines)
                self.entry = match[2] if match[1] else self.entry
        if not self.entry:
            raise ValueError(
                "The text has no ENTRY computation: it must be `compiled.as_text()` of a program."
            )

    def _computation(self, name: str, lines: Iterator[str]) -> _Computation:
        # The metadata of a Pallas kernel goes over several lines, with braces of its own: only a
        # brace alone ends a computation, or one with the thread that runs it.
        whole: list[str] = []
        for line in itertools.takewhile(lambda line: not _END.match(line), lines):
            if _INSTRUCTION.match(line):
                whole.append(line)
            elif whole:
                whole[-1] += line
        instructions, root = {}, None
        for line in whole:
            match = _INSTRUCTION.match(line)
            rest = line[match.end() - 1 :]
            operands = tuple(re.findall(r"%([\w.\-]+)", rest[: _closing(rest)]))
            instruction = _Instruction(match[2], match[3], match[4], operands, rest)
            instructions[match[2]] = instruction
            root = instruction if match[1] else root
        if root is None:
            raise ValueError(f"The computation {name} has no ROOT: the text is cut off.")
        return _Computation(name, instructions, root)


def _closing(text: str) -> int:
    """Where the parenthesis closes that opens the text."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"A parenthesis is never closed in: {text[:200]}")


def _arrays(type_text: str) -> tuple[ArrayType, ...]:
    """All arrays in the text of a type, tuples flattened."""
    return tuple(
        ArrayType(dtype, tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size))
        for dtype, sizes in _ARRAY.findall(type_text)
    )


def _elements(type_text: str) -> list[str]:
    """The types in a tuple, one level of it; a type that is no tuple is its one element."""
    if not type_text.startswith("("):
        return [type_text]
    depth, start, elements = 0, 1, []
    for i, letter in enumerate(type_text):
        if letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        if (letter == "," and depth == 1) or depth == 0:
            elements.append(type_text[start:i].strip())
            start = i + 1
        if depth == 0:
            break
    return elements


@dataclasses.dataclass(frozen=True)
class _Frame:
    """A computation where it runs: how often, and from where."""

    computation: _Computation
    executions: int
    caller: "_Frame | None" = None
    call: _Instruction | None = None  # in the caller

    @property
    def in_loop(self) -> bool:
        return self.call is not None and self.call.opcode == "while"

    @property
    def path(self) -> tuple[str, ...]:
        """The calls that lead here, but for fusions."""
        if self.call is None:
            return ()
        return self.caller.path + ((self.call.name,) if self.call.opcode != "fusion" else ())


class _Walk:
    """Goes through a program as it runs and collects what it does."""

    def __init__(self, module: _Module):
        self.module = module
        self.dot_flops = 0
        self.conditionals = 0
        self.costs: list[Cost] = []
        self.collectives: dict[tuple, Collective] = {}
        self.kernels: list[Kernel] = []
        self.host = [0, 0]
        self.buffers: dict[ArrayType, Buffer] = {}

    def program(self) -> Program:
        self.run(_Frame(self.module.computations[self.module.entry], 1))
        return Program(
            dot_flops=self.dot_flops,
            costs=tuple(self.costs),
            collectives=tuple(self.collectives.values()),
            kernels=tuple(self.kernels),
            host_bytes=HostTraffic(*self.host),
            conditionals=self.conditionals,
            largest=tuple(sorted(self.buffers.values(), key=lambda b: (-b.array.bytes, b.array))),
        )

    def run(self, frame: _Frame) -> None:
        """One computation outside fusions."""
        for instruction in frame.computation.instructions.values():
            opcode = instruction.opcode
            if opcode == "while":
                body = instruction.find(r"body=%?([\w.\-]+)")
                trips = self.trips(frame, instruction)
                self.run(self.enter(frame, instruction, body, trips))
                continue
            if opcode == "conditional":
                self.conditionals += 1
                for branch in _branches(instruction):
                    self.run(self.enter(frame, instruction, branch))
                continue
            if instruction.base == "call":
                self.run(self.enter(frame, instruction, instruction.called))
                continue

            self.note_cost(frame, instruction)
            self.note_buffers(instruction)
            self.note_host(frame, instruction)
            if opcode == "custom-call" and "tpu_custom_call" in instruction.rest:
                self.note_kernel(frame, instruction)
            elif opcode == "send" and "megascale" in instruction.rest:
                self.note_transfer(frame, instruction)
            elif opcode in ("fusion", "async-start"):
                self.fused(self.enter(frame, instruction, instruction.called), instruction)
            else:
                self.note_dot(frame, instruction)
                self.note_collective(frame, instruction, within=None)

    def fused(self, frame: _Frame, outermost: _Instruction) -> None:
        """A fusion: its products and collectives count, its other results stay in registers."""
        for instruction in frame.computation.instructions.values():
            self.note_dot(frame, instruction)
            self.note_collective(frame, instruction, within=outermost)
            if instruction.opcode in ("fusion", "call", "call-start", "async-start"):
                self.fused(self.enter(frame, instruction, instruction.called), outermost)

    def enter(self, frame: _Frame, call: _Instruction, name: str, times: int = 1) -> _Frame:
        return _Frame(self.module.computations[name], frame.executions * times, frame, call)

    def note_cost(self, frame: _Frame, instruction: _Instruction) -> None:
        cycles = instruction.find(r'"estimated_cycles":"(\d+)"')
        if cycles and int(cycles):
            self.costs.append(
                Cost(
                    name=instruction.name,
                    op_name=instruction.op_name,
                    kind=self.kind(instruction),
                    results=_arrays(instruction.type),
                    cycles=int(cycles) * frame.executions,
                    executions=frame.executions,
                )
            )

    def kind(self, instruction: _Instruction) -> str:
        # A fusion that carries a part of a gather does work of its own: that is what costs.
        opcodes = set(self.opcodes(instruction)) - set(COLLECTIVES)
        if opcodes & {"convolution", "dot"}:
            return "dots"
        if opcodes & {"reduce", "reduce-window", "sort"}:
            return "reduces"
        if opcodes - SLICES - COPIES:
            return "elementwise"
        return "slices" if opcodes & SLICES else "copies"

    def opcodes(self, instruction: _Instruction) -> Iterable[str]:
        if instruction.opcode not in ("fusion", "call", "async-start"):
            return [instruction.opcode]
        return self.opcodes_of(instruction.called)

    @functools.cache  # noqa: B019, the walk ends with the program
    def opcodes_of(self, name: str) -> frozenset[str]:
        """The operations on arrays in a computation; those on scalars compute indices."""
        found = set()
        for instruction in self.module.computations[name].instructions.values():
            if any(array.shape for array in _arrays(instruction.type)):
                found.update(self.opcodes(instruction))
        return frozenset(found)

    def note_buffers(self, instruction: _Instruction) -> None:
        if instruction.opcode in ("tuple", "get-tuple-element", "bitcast"):
            return
        for array in _arrays(instruction.type):
            if array not in self.buffers:
                self.buffers[array] = Buffer(array, instruction.name, instruction.op_name)

    def note_host(self, frame: _Frame, instruction: _Instruction) -> None:
        """Pinned host memory is memory space 5, S(5) in a layout."""
        base = instruction.base
        if base not in ("copy", "slice", "dynamic-slice", "dynamic-update-slice"):
            return
        types = [frame.computation.instructions[name].type for name in instruction.operands]
        target, source = instruction.type, types[0]
        if base == "dynamic-update-slice":
            target, source = types[0], types[1]
            moved = source
        elif instruction.opcode == "copy-start":
            target = moved = _elements(instruction.type)[0]
        elif instruction.opcode.endswith("-start"):
            target = moved = _elements(instruction.type)[1]
        else:
            moved = target
        to_host, from_host = "S(5)" in target, "S(5)" in source
        if to_host != from_host:
            size = sum(array.bytes for array in _arrays(moved))
            self.host[0 if to_host else 1] += size * frame.executions

    def note_kernel(self, frame: _Frame, instruction: _Instruction) -> None:
        types = (frame.computation.instructions[name].type for name in instruction.operands)
        self.kernels.append(
            Kernel(
                name=instruction.name,
                op_name=instruction.op_name,
                metadata=instruction.find(r"kernel_metadata=\{(.*?)\}\}, metadata="),
                operands=tuple(itertools.chain.from_iterable(map(_arrays, types))),
                results=_arrays(instruction.type),
                executions=frame.executions,
            )
        )

    def note_dot(self, frame: _Frame, instruction: _Instruction) -> None:
        if instruction.opcode in ("convolution", "dot"):
            types = (frame.computation.instructions[name].type for name in instruction.operands[:2])
            left, right = (_arrays(type_text)[0].shape for type_text in types)
            out = _arrays(instruction.type)[0].shape
            flops = _dot_flops if instruction.opcode == "dot" else _convolution_flops
            self.dot_flops += flops(instruction, left, right, out) * frame.executions

    def note_collective(
        self, frame: _Frame, instruction: _Instruction, within: _Instruction | None
    ) -> None:
        kind = instruction.base
        if kind not in COLLECTIVES:
            return
        operands = [frame.computation.instructions[name] for name in instruction.operands]
        if kind == "all-gather":
            results = _elements(instruction.type)
            started = instruction.opcode.endswith("-start")
            arrays = _arrays(results[1] if started else instruction.type)
        else:
            arrays = tuple(itertools.chain.from_iterable(_arrays(o.type) for o in operands))
        scatters = within is not None and "all-reduce-scatter" in frame.computation.name
        carried = within is not None and self.carries(frame.computation.name)
        # Other collectives may share a channel and are still several.
        key = (frame.path, instruction.find(r"channel_id=(\d+)") if carried else instruction.name)
        if key in self.collectives:
            return
        self.collectives[key] = Collective(
            kind="reduce-scatter" if scatters else kind,
            name=instruction.name,
            op_name=(within if scatters else instruction).op_name,
            arrays=arrays,
            groups=_groups(instruction, self.module.num_devices),
            executions=frame.executions,
            asynchronous=carried
            or instruction.opcode.endswith("-start")
            or (within is not None and within.opcode == "async-start"),
            fake_gather=kind == "all-reduce" and any(map(self.updates, operands)),
        )

    def note_transfer(self, frame: _Frame, send: _Instruction) -> None:
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
            arrays=_arrays(_elements((receive if kind == "all-gather" else send).type)[0]),
            groups=_groups_of_slices(send, self.module.num_devices),
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

    def updates(self, instruction: _Instruction) -> bool:
        """Whether it places a part in an array that is otherwise empty."""
        if instruction.opcode == "fusion":
            instruction = self.module.computations[instruction.called].root
        return instruction.opcode == "dynamic-update-slice"

    def trips(self, frame: _Frame, loop: _Instruction) -> int:
        """How often a loop turns: from the start, step and end of the number it counts with."""
        known = loop.find(r'known_trip_count"?[:=]\{"?n"?[:=]"?(\d+)')
        if known:
            return int(known)
        condition = self.enter(frame, loop, loop.find(r"condition=%?([\w.\-]+)"))
        body = self.enter(frame, loop, loop.find(r"body=%?([\w.\-]+)"))
        compare = condition.computation.root
        while compare.opcode == "fusion":
            condition = self.enter(condition, compare, compare.called)
            compare = condition.computation.root
        direction = compare.find(r"direction=(\w+)")
        sides = []
        for name in compare.operands:
            sides.append((self.place(condition, name), self.value(condition, name)))
        for (counter, _), (_, end), turned in (
            (
                (sides[0], sides[1], direction),
                (sides[1], sides[0], direction.translate(str.maketrans("LG", "GL"))),
            )
            if len(sides) == 2
            else ()
        ):
            if counter is None or end is None:
                continue
            start = self.element(frame, loop.operands[0], counter)
            start = start and self.value(*start)
            after = self.element(body, body.computation.root.name, counter)
            step = after and self.offset(*after, counter)
            if start is None or not step:
                continue
            span = {"LT": end - start, "LE": end - start + 1, "NE": end - start,
                    "GT": end - start, "GE": end - start - 1}[turned]  # fmt: skip
            return max(0, -(-span // step))
        raise ValueError(
            f"How often %{loop.name} turns is not in the program ({loop.op_name}): its condition "
            f"%{condition.computation.name} does not compare a counter, of known start and step, "
            f"with a constant. Only loops of a fixed length can be counted."
        )

    def element(self, frame: _Frame, name: str, index: int) -> tuple[_Frame, str] | None:
        """Where the element of a tuple was made."""
        instruction = frame.computation.instructions[name]
        if instruction.opcode == "tuple":
            return frame, instruction.operands[index]
        if instruction.opcode in ("opt-barrier", "copy", "bitcast"):
            return self.element(frame, instruction.operands[0], index)
        if instruction.opcode == "while":
            # Only what the loop hands on unchanged is known.
            body = self.enter(frame, instruction, instruction.find(r"body=%?([\w.\-]+)"))
            if self.unchanged(body, index):
                return self.element(frame, instruction.operands[0], index)
        if instruction.opcode == "parameter" and frame.in_loop and self.unchanged(frame, index):
            return self.element(frame.caller, frame.call.operands[0], index)
        return None

    def unchanged(self, frame: _Frame, index: int) -> bool:
        body = self.enter(frame.caller, frame.call, frame.call.find(r"body=%?([\w.\-]+)"))
        after = self.element(body, body.computation.root.name, index)
        return after is not None and self.place(*after) == index

    def place(self, frame: _Frame, name: str) -> int | None:
        """The index of the loop's tuple that an instruction of its body hands on."""
        instruction = frame.computation.instructions[name]
        if instruction.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
            return self.place(frame, instruction.operands[0])
        if instruction.opcode == "parameter" and frame.call and frame.call.opcode == "fusion":
            operand = frame.call.operands[frame.computation.parameter(instruction)]
            return self.place(frame.caller, operand)
        if instruction.opcode == "get-tuple-element" and frame.in_loop:
            source = frame.computation.instructions[instruction.operands[0]]
            if source.opcode == "parameter":
                return int(instruction.find(r"index=(\d+)"))
        return None

    def value(self, frame: _Frame, name: str) -> int | None:
        """The integer that an instruction gives, if it is the same in every run of it."""
        instruction = frame.computation.instructions[name]
        match instruction.opcode:
            case "constant":
                found = re.match(r"\((-?\d+)\)", instruction.rest)
                return int(found[1]) if found else None
            case "copy" | "bitcast" | "convert" | "copy-start" | "copy-done":
                return self.value(frame, instruction.operands[0])
            case "add" | "subtract" | "multiply":
                left, right = (self.value(frame, name) for name in instruction.operands)
                if left is None or right is None:
                    return None
                return {"add": left + right, "subtract": left - right, "multiply": left * right}[
                    instruction.opcode
                ]
            case "get-tuple-element":
                index = int(instruction.find(r"index=(\d+)"))
                found = self.element(frame, instruction.operands[0], index)
                return found and self.value(*found)
            case "parameter" if frame.call and frame.call.opcode == "fusion":
                operand = frame.call.operands[frame.computation.parameter(instruction)]
                return self.value(frame.caller, operand)
        return None

    def offset(self, frame: _Frame, name: str, index: int) -> int | None:
        """What is added to the element `index` of the loop's tuple."""
        if self.place(frame, name) == index:
            return 0
        instruction = frame.computation.instructions[name]
        match instruction.opcode:
            case "copy" | "bitcast":
                return self.offset(frame, instruction.operands[0], index)
            case "fusion":
                inner = self.enter(frame, instruction, instruction.called)
                return self.offset(inner, inner.computation.root.name, index)
            case "add" | "subtract":
                left, right = instruction.operands
                sign = 1 if instruction.opcode == "add" else -1
                if instruction.opcode == "add" and self.offset(frame, left, index) is None:
                    left, right = right, left
                base, added = self.offset(frame, left, index), self.value(frame, right)
                return None if base is None or added is None else base + sign * added
        return None


def _branches(conditional: _Instruction) -> list[str]:
    listed = conditional.find(r"branch_computations=\{([^}]*)\}")
    if listed:
        return re.findall(r"[\w.\-]+", listed.replace("%", ""))
    return [conditional.find(rf"{side}_computation=%?([\w.\-]+)") for side in ("true", "false")]


def _dot_flops(instruction, left, right, out) -> int:
    contracted = instruction.find(r"lhs_contracting_dims=\{([\d,]*)\}")
    return 2 * math.prod(out) * math.prod(left[int(dim)] for dim in contracted.split(",") if dim)


def _convolution_flops(instruction, left, right, out) -> int:
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


def _groups(instruction: _Instruction, num_devices: int) -> tuple[tuple[int, ...], ...]:
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


def _groups_of_slices(send: _Instruction, devices_per_slice: int) -> tuple[tuple[int, ...], ...]:
    """Device d of slice s, both from zero, has the number (s + 1) * 100000 + d in these forms."""
    product = re.search(r'_xla_megascale_target="\{([\d,]+)\}x\{(\d+):(\d+)\}"', send.rest)
    if product:
        slices = [int(number) * 100_000 for number in product[1].split(",")]
        devices = range(int(product[2]), int(product[3]) + 1)
        groups = [[first + device for first in slices] for device in devices]
    else:
        listed = send.find(r'_xla_megascale_target="?\{((?:\{[\d,>-]+\},?)+)\}').replace("->", ",")
        groups = _rows(listed)
    if not groups:
        raise ValueError(
            f"The slices of %{send.name} are written in an unknown form: "
            f"{send.find(r'(_xla_megascale_target=.{0,80})')}"
        )
    return tuple(
        tuple((n // 100_000 - 1) * devices_per_slice + n % 100_000 for n in group)
        for group in groups
    )


def _rows(text: str) -> tuple[tuple[int, ...], ...]:
    rows = re.findall(r"\{([\d,]+)\}", text)
    return tuple(tuple(int(number) for number in row.split(",")) for row in rows)


def _tuples(rows: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, rows.tolist()))
