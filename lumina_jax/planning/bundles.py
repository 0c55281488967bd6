"""How long Pallas kernels take, counted in the machine code that libtpu makes of them.

The estimates in a program's text leave kernels out (hlo.py). Their code (kernels.py) has one bundle
at each address, and a TensorCore runs one bundle a cycle.

A kernel over a grid is one loop in three stages: iteration i fetches the blocks of step i, computes
step i - 1 and writes step i - 2 back. So n steps take n + 2 iterations, of which the first and last
skip most of the code. A `pl.when(condition)` is a branch over a region. Most conditions follow from
the indices of the grid (the first step of a row initialises, the last writes out), so the scalar
instructions behind each branch are run, and a region counts exactly as often as it is entered.

Not included: waiting for DMA, so a kernel that is bound by memory takes longer; conflicts that only
show when it runs; its start. What depends on data cannot be told: such a region is taken to run
always, which is right for a mask that hides nothing, and a loop of such a length to turn once.
`unknown` says how many there were.
"""

import dataclasses
import math
import operator
import re
from typing import NamedTuple

import numpy as np

# These follow a branch and run whether it is taken or not.
DELAY_SLOTS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bundles:
    """The machine code of a kernel, and how long one execution takes on one TensorCore."""

    name: str
    grid: tuple[int, ...]  # () for a kernel without blocks in HBM
    code: int  # bundles in all
    step: int  # cycles of the cheapest step, without what runs at some steps only
    cycles: int  # of the whole grid
    unknown: int  # branches and loops that depend on data

    @property
    def steps(self) -> int:
        return math.prod(self.grid)


def parse(name: str, text: str) -> Bundles:
    """Counts the bundles of one kernel."""
    code = _Code(text)
    return Bundles(
        name=name,
        grid=code.grid,
        code=code.length,
        step=code.step,
        cycles=code.total,
        unknown=len(code.unknown),
    )


_ADDRESS = re.compile(r"^ *(0x[0-9a-f]+|0) +(?:[A-Z]{2})?:")
_BRANCH = re.compile(r"sbr\.rel(?: \((!?)%(p\w+)\))? target = \$region(\d+)")
_REGION = re.compile(r"Start(?:/End empty)? region (\d+)")
_SCALAR = re.compile(r"%([sp]\d+_[sp]\d+) = ([\w.]+) ?(?:\((!?)%(\w+)(?:, ([^)]*))?\), )?([^;]*)")
_STORE = re.compile(r"sst \[smem:\[#(\w+_spill)\]\] %(s\w+)")
_SPILL = re.compile(r"\[smem:\[#(\w+_spill)\]\]")

_OPERATIONS = {
    "sadd": operator.add, "ssub": operator.sub, "smul": operator.mul, "sand": operator.and_,
    "sor": operator.or_, "sxor": operator.xor, "sshll": operator.lshift, "sshra": operator.rshift,
    "sshrl": lambda a, b: (a & 0xFFFFFFFF) >> b,
    "smulhi": lambda a, b: (a & 0xFFFFFFFF) * (b & 0xFFFFFFFF) >> 32,
    "smov": lambda a: a, "scalar_select": lambda which, a, b: a if which else b,
    "scmp.eq": operator.eq, "scmp.ne": operator.ne, "scmp.lt": operator.lt, "scmp.le": operator.le,
    "scmp.gt": operator.gt, "scmp.ge": operator.ge,
    "pmov": bool, "pneg": operator.not_, "pand": lambda a, b: a and b, "por": lambda a, b: a or b,
    "pnand": lambda a, b: not (a and b), "pnor": lambda a, b: not (a or b),
}  # fmt: skip


class _Scalar(NamedTuple):
    """An instruction that sets a scalar or a predicate."""

    address: int
    opcode: str
    operands: tuple[int | str, ...]  # numbers, and names of scalars
    guard: tuple[bool, str, int | str] | None  # where it is false the value is another one
    spill: str  # the slot that it loads


class _Code:
    """The bundles of a kernel, and what its scalar instructions give in each iteration."""

    def __init__(self, text: str):
        self.scalars: dict[str, _Scalar] = {}
        self.stores: dict[str, list[tuple[int, str]]] = {}  # slot -> address and value of each
        self.skips: dict[int, tuple[str, str, int]] = {}  # address -> "!" or "", predicate, target
        self.loops: dict[int, tuple[int, str]] = {}  # first bundle -> branch back, its predicate
        self.unknown: set[int] = set()  # addresses of their branches
        self.values: dict[tuple[str, int], int | None] = {}
        self.length = 0
        self._read(text)

        bounds = re.search(r"iteration_bounds: \(([\d, ]+)\)", text)
        self.grid = tuple(int(size) for size in bounds[1].split(",")) if bounds else ()
        self.start, self.end, turns = self._grid_loop()
        alive = np.ones(turns, bool)
        self.cycles = self._run(self.start, self.end, alive)  # of each iteration
        once = self._run(0, self.start, alive[:1]) + self._run(self.end, self.length, alive[:1])
        self.total = int(self.cycles.sum() + once.sum())
        # Before and behind the steps are the iterations that fill and empty the pipeline.
        first = (turns - math.prod(self.grid)) // 2
        self.step = int(self.cycles[first : first + math.prod(self.grid)].min())

    def _read(self, text: str) -> None:
        bundles: list[str] = []
        for line in text.splitlines():
            if _ADDRESS.match(line):
                bundles.append(line)
            elif bundles:  # a comment goes on
                bundles[-1] += line
        self.length = len(bundles)
        targets = {
            region: address
            for address, bundle in enumerate(bundles)
            for region in _REGION.findall(bundle)
        }
        for address, bundle in enumerate(bundles):
            for negated, predicate, region in _BRANCH.findall(bundle):
                if targets[region] > address:
                    self.skips[address] = negated, predicate, targets[region]
                else:
                    self.loops[targets[region]] = address, predicate
            for slot in re.sub(r"/\*.*?\*/", "", bundle).split(";;"):
                if match := _SCALAR.search(slot):
                    self.scalars[match[1]] = _scalar(address, match)
                if match := _STORE.search(slot):
                    self.stores.setdefault(match[1], []).append((address, match[2]))

    def _grid_loop(self) -> tuple[int, int, int]:
        """Begin and end of the loop over the grid, and its iterations; of all the code without."""
        loops = self.loops.items() if self.grid else ()
        outermost = max(loops, key=lambda loop: loop[1][0] - loop[0], default=None)
        if outermost is None:
            return 0, self.length, 1
        start, (branch, predicate) = outermost
        turns = self._turns(predicate)
        if turns is None or turns < math.prod(self.grid):
            raise ValueError(
                f"The outermost loop turns {turns} times, which does not fit the grid {self.grid} "
                f"of the kernel: its bundles are not laid out as libtpu 0.0.52 does it."
            )
        return start, branch + 1 + DELAY_SLOTS, turns

    def _turns(self, predicate: str) -> int | None:
        """How often a loop turns that counts from zero by one and ends at a constant."""
        match self.scalars.get(predicate):
            case _Scalar(opcode="scmp.ge", operands=(_, int(end))):
                return end
        return None

    def _run(self, start: int, end: int, alive: np.ndarray) -> np.ndarray:
        """Cycles of the bundles from start to end in each iteration that is alive.

        A loop that begins at `start` is taken to be the one whose body this is.
        """
        cycles = np.zeros(len(alive), np.int64)
        at = start
        while at < end:
            if at in self.loops and at > start and self.loops[at][0] < end:
                branch, predicate = self.loops[at]
                close = min(branch + 1 + DELAY_SLOTS, end)
                turns = self._turns(predicate)
                if turns is None:
                    self.unknown.add(branch)
                cycles += (turns or 1) * self._run(at, close, alive)
                at = close
            elif at in self.skips:
                inside = min(at + 1 + DELAY_SLOTS, end)
                cycles += alive * (inside - at)
                target = max(min(self.skips[at][2], end), inside)
                cycles += self._run(inside, target, alive & self._enters(at, len(alive)))
                at = target
            else:
                cycles += alive
                at += 1
        return cycles

    def _enters(self, address: int, iterations: int) -> np.ndarray:
        """In which iterations a branch forward is not taken, so that what it skips runs."""
        negated, predicate, _ = self.skips[address]
        if not predicate:
            return np.zeros(iterations, bool)
        values = [self._value(predicate, i) for i in range(iterations)]
        if None in values:
            self.unknown.add(address)
        return np.array([value is None or bool(value) == bool(negated) for value in values])

    def _value(self, name: int | str, i: int) -> int | None:
        """A scalar in iteration i of the grid; None where it comes from data."""
        if isinstance(name, int):
            return name
        if (name, i) not in self.values:
            self.values[name, i] = None  # until it is known
            self.values[name, i] = self._compute(name, i)
        return self.values[name, i]

    def _compute(self, name: str, i: int) -> int | None:
        scalar = self.scalars.get(name)
        if scalar is None:
            return None
        if scalar.opcode == "sphi":  # carried from one iteration to the next
            if scalar.address != self.start or len(scalar.operands) != 2:
                return None
            first, later = scalar.operands
            return self._value(later, i - 1) if i else self._value(first, 0)
        if scalar.spill:
            return self._reload(scalar, i)
        values = [self._value(operand, i) for operand in scalar.operands]
        new = _apply(scalar.opcode, values)
        if scalar.guard is None:
            return new
        negated, predicate, other = scalar.guard
        guard = self._value(predicate, i)
        return None if guard is None else new if guard != negated else self._value(other, i)

    def _reload(self, scalar: _Scalar, i: int) -> int | None:
        """What was stored last in the slot: in this iteration, the one before, or ahead of all."""
        stores = self.stores.get(scalar.spill, [])
        ahead = [value for address, value in stores if address < self.start]
        inside = [(address, value) for address, value in stores if self.start <= address < self.end]
        now = [value for address, value in inside if address < scalar.address]
        if now:
            return self._value(now[-1], i)
        if inside and i:
            return self._value(inside[-1][1], i - 1)
        return self._value(ahead[-1], 0) if ahead else None


def _scalar(address: int, match: re.Match) -> _Scalar:
    _, opcode, negated, predicate, other, operands = match.groups()
    opcode = ".".join(opcode.split(".")[: 2 if opcode.startswith("scmp") else 1])
    spill = _SPILL.match(operands) if opcode == "sld" else None
    return _Scalar(
        address=address,
        opcode=opcode,
        operands=tuple(_operand(part) for part in operands.split(",")),
        guard=(bool(negated), predicate, _operand(other)) if other else None,
        spill=spill[1] if spill else "",
    )


def _operand(text: str) -> int | str:
    text = text.strip(" }%")
    return _signed(int(text)) if re.fullmatch(r"-?\d+", text) else text


def _apply(opcode: str, values: list[int | None]) -> int | None:
    if None in values:
        # One side may settle it alone.
        decides = {"pand": 0, "pnand": 0, "por": 1, "pnor": 1}.get(opcode)
        if decides is None or decides not in values:
            return None
        return int(opcode in ("por", "pnand"))
    operation = _OPERATIONS.get(opcode)
    return None if operation is None else _signed(int(operation(*values)))


def _signed(value: int) -> int:
    """As 32 bits hold it."""
    return (value + 2**31) % 2**32 - 2**31
