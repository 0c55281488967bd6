"""The text of a compiled program, taken apart: arrays, instructions, computations."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16,
    "s32": 32, "u32": 32, "s64": 64, "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64,
    "c64": 64, "c128": 128, "token": 0, "opaque": 0,
    "f8e4m3": 8, "f8e4m3fn": 8, "f8e4m3b11fnuz": 8, "f8e4m3fnuz": 8, "f8e5m2": 8, "f8e5m2fnuz": 8,
    "f8e3m4": 8, "f8e8m0fnu": 8, "f4e2m1fn": 4,
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


class Instruction(NamedTuple):
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
class Computation:
    name: str
    instructions: dict[str, Instruction]
    root: Instruction

    def parameter(self, instruction: Instruction) -> int:
        return int(instruction.rest[1 : instruction.rest.index(")")])


_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_END = re.compile(r"^\}(, execution_thread=.*)?$")
_DEFINITION = re.compile(r"^ +(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b(" + "|".join(sorted(BITS, key=len, reverse=True)) + r")\[([\d,<=]*)\]")


class Module:
    """The computations of a program by name, and the entry."""

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
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

    def _computation(self, name: str, lines: Iterator[str]) -> Computation:
        # The metadata of a Pallas kernel goes over several lines, with braces of its own: only a
        # brace alone ends a computation, or one with the thread that runs it.
        whole: list[str] = []
        for line in itertools.takewhile(lambda line: not _END.match(line), lines):
            if _DEFINITION.match(line):
                whole.append(line)
            elif whole:
                whole[-1] += line
        instructions, root = {}, None
        for line in whole:
            match = _DEFINITION.match(line)
            rest = line[match.end() - 1 :]
            operands = tuple(re.findall(r"%([\w.\-]+)", rest[: _closing(rest)]))
            instruction = Instruction(match[2], match[3], match[4], operands, rest)
            instructions[match[2]] = instruction
            root = instruction if match[1] else root
        if root is None:
            raise ValueError(f"The computation {name} has no ROOT: the text is cut off.")
        return Computation(name, instructions, root)


def _closing(text: str) -> int:
    """Where the parenthesis closes that opens the text."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"A parenthesis is never closed in: {text[:200]}")


def arrays_in(type_text: str) -> tuple[ArrayType, ...]:
    """All arrays in the text of a type, tuples flattened."""
    return tuple(
        ArrayType(dtype, tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size))
        for dtype, sizes in _ARRAY.findall(type_text)
    )


def elements_of(type_text: str) -> list[str]:
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
class Frame:
    """A computation where it runs: how often, and from where."""

    module: Module
    computation: Computation
    executions: int
    caller: "Frame | None" = None
    call: Instruction | None = None  # in the caller

    def enter(self, call: Instruction, name: str, times: int = 1) -> "Frame":
        """The computation of this name, called from here."""
        computation = self.module.computations[name]
        return Frame(self.module, computation, self.executions * times, self, call)

    def type(self, name: str) -> str:
        return self.computation.instructions[name].type

    @property
    def in_loop(self) -> bool:
        return self.call is not None and self.call.opcode == "while"

    @property
    def path(self) -> tuple[str, ...]:
        """The calls that lead here, but for fusions."""
        if self.call is None:
            return ()
        return self.caller.path + ((self.call.name,) if self.call.opcode != "fusion" else ())
