"""How long Pallas kernels take, counted in the machine code that libtpu makes of them.

The estimates in a program's text leave kernels out (hlo.py). With `dump_flags(folder)` in
LIBTPU_INIT_ARGS before libtpu is loaded, a compilation also writes the file
`<time>-<instruction>-<pass>-final_bundles.txt` for every instruction of the program: its code, one
bundle at each address. A TensorCore runs one bundle a cycle. A kernel is found by the name of its
instruction, which is the same in the program's text.

A kernel over a grid is one loop in three stages: iteration i fetches the blocks of step i, computes
step i - 1 and writes step i - 2 back. So n steps take n + 2 iterations, of which the first and last
skip most of the code. A `pl.when(condition)` is a branch over a region. Most conditions follow from
the indices of the grid (the first step of a row initialises, the last writes out): the scalar
instructions behind a branch are evaluated, for all iterations at once, and a region counts exactly
as often as it runs.

Not included: waiting for DMA, so a kernel that is bound by memory takes longer; conflicts that only
show when it runs; its start. What depends on data cannot be told: such a region is taken to run
always, which is right for a mask that hides nothing, and a loop of such a length to turn once.
`unknown` says how many there were.
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Iterable

import numpy as np

from lumina_jax.planning.hlo import Kernel

# These follow a branch and run whether it is taken or not.
DELAY_SLOTS = 4


def dump_flags(folder: str | pathlib.Path) -> str:
    """What LIBTPU_INIT_ARGS must hold. A compilation that a cache answers writes nothing."""
    return (
        f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
        f"--xla_jf_dump_llo_pass_label_regex=final.*"
    )


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


def read(folder: str | pathlib.Path, kernels: Iterable[Kernel]) -> dict[str, Bundles]:
    """The kernels of a program by name, from the folder that its compilation was dumped to."""
    found = {}
    for kernel in kernels:
        files = [
            path
            for path in pathlib.Path(folder).glob("*-final_bundles.txt")
            if re.fullmatch(rf"\d+-{re.escape(kernel.name)}-\d+-final_bundles\.txt", path.name)
        ]
        if len(files) != 1:
            raise ValueError(
                f"{len(files)} files in {folder} hold the bundles of the kernel {kernel.name}, not "
                f"one. Compile one program for each folder, in a process that was started with "
                f"LIBTPU_INIT_ARGS={dump_flags(folder)!r} and without a compilation cache."
            )
        found[kernel.name] = parse(kernel.name, files[0].read_text())
    return found


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
_SLOT = re.compile(r"%([sp]\d+_[sp]\d+) = ([\w.]+) ?([^;]*)")
_SPILL = re.compile(r"sst \[smem:\[#(\w+_spill)\]\] %(s\w+)")
_INDEX = re.compile(r"iteration index, stage = (\d+)(?: iter bound = (\d+))?")

_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal,
}  # fmt: skip
_ARITHMETIC = {
    "sadd": np.add, "ssub": np.subtract, "smul": np.multiply, "sand": np.bitwise_and,
    "sor": np.bitwise_or, "sxor": np.bitwise_xor, "sshll": np.left_shift, "sshra": np.right_shift,
    "smin": np.minimum, "smax": np.maximum,
}  # fmt: skip


class _Code:
    """The bundles of a kernel, run once with every iteration of its grid side by side."""

    def __init__(self, text: str):
        self.definitions: dict[
            str, tuple[int, str, str, str]
        ] = {}  # address, opcode, operands, comment
        self.spills: dict[
            str, list[tuple[int, str]]
        ] = {}  # slot -> address and value of each store
        self.skips: dict[int, tuple[str, str, int]] = {}  # address -> "!" or "", predicate, target
        self.loops: dict[
            int, tuple[int, str]
        ] = {}  # first bundle -> address of the branch, predicate
        self.unknown: set[int] = set()  # addresses of their branches
        self.values: dict[str, np.ndarray | None] = {}
        self.length = 0
        self._read(text)

        bounds = re.search(r"iteration_bounds: \(([\d, ]+)\)", text)
        self.grid = tuple(int(size) for size in bounds[1].split(",")) if bounds else ()
        start, close, turns = self._grid_loop()
        self.iterations = np.arange(turns)
        alive = np.ones(turns, bool)
        self.cycles = self._run(start, close, alive)  # of each iteration
        once = self._run(0, start, alive[:1]) + self._run(close, self.length, alive[:1])
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
            for slot in bundle.split(";;"):
                if match := _SLOT.search(slot):
                    comment = " ".join(re.findall(r"/\*(.*?)\*/", slot))
                    operands = re.sub(r"/\*.*?(\*/|$)", "", match[3]).strip(" }")
                    self.definitions[match[1]] = (address, match[2], operands, comment)
                if match := _SPILL.search(slot):
                    self.spills.setdefault(match[1], []).append((address, match[2]))

    def _grid_loop(self) -> tuple[int, int, int]:
        """Begin and end of the loop over the grid, and its iterations; of all the code without."""
        if not self.grid:
            return 0, self.length, 1
        outermost = max(self.loops.items(), key=lambda loop: loop[1][0] - loop[0], default=None)
        if outermost is None:  # one step
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
        _, opcode, operands, _ = self.definitions.get(predicate, (0, "", "", ""))
        limit = re.search(r", (\d+)$", operands)
        return int(limit[1]) if opcode.startswith("scmp.ge") and limit else None

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
                cycles += self._run(inside, target, alive & self._stays(at)[: len(alive)])
                at = target
            else:
                cycles += alive
                at += 1
        return cycles

    def _stays(self, address: int) -> np.ndarray:
        """In which iterations a branch forward is not taken."""
        negated, predicate, _ = self.skips[address]
        if not predicate:
            return np.zeros(len(self.iterations), bool)
        taken = self._value(predicate)
        if taken is None:
            self.unknown.add(address)
            return np.ones(len(self.iterations), bool)
        taken = np.broadcast_to(taken, self.iterations.shape).astype(bool)
        return taken if negated else ~taken

    def _value(self, name: str) -> np.ndarray | None:
        """A scalar in every iteration; None where it comes from data or from outside the grid."""
        if name not in self.values:
            self.values[name] = None  # what depends on itself is not known
            self.values[name] = self._compute(name)
        return self.values[name]

    def _compute(self, name: str) -> np.ndarray | None:
        address, opcode, operands, comment = self.definitions.get(name, (0, "", "", ""))
        if self.grid and (index := _INDEX.search(comment)):
            return self._index(int(index[1]), index[2])
        if opcode == "sld":
            spill = re.match(r"\[smem:\[#(\w+_spill)\]\]", operands)
            return self._reload(spill[1], address) if spill else None

        guard = re.match(r"\((!?)%(\w+)(?:, (%?\w+))?\), ", operands)
        parts = operands[guard.end() if guard else 0 :].split(", ")
        values = [self._operand(part) for part in parts]
        if guard and guard[3] is not None:  # keeps another value where the guard is false
            guarded, old = self._value(guard[2]), self._operand(guard[3])
            new = _apply(opcode, values)
            if guarded is None or old is None or new is None:
                return None
            return np.where(guarded.astype(bool) ^ bool(guard[1]), new, old)
        return _apply(opcode, values)

    def _reload(self, slot: str, address: int) -> np.ndarray | None:
        """What was stored last in a slot, unless that was in the iteration before."""
        stores = self.spills.get(slot, [])
        before = [store for store in stores if store[0] < address]
        start, close, _ = self._grid_loop()
        if not before or (
            before[-1][0] < start and any(start <= store[0] < close for store in stores)
        ):
            return None
        return self._value(before[-1][1])

    def _operand(self, text: str) -> np.ndarray | None:
        text = text.strip()
        if text.startswith("%"):
            return self._value(text[1:])
        return _signed(np.int64(text)) if re.fullmatch(r"-?\d+", text) else None

    def _index(self, stage: int, dim: str | None) -> np.ndarray:
        """The step of the grid that a stage of the pipeline is at, or its index along one dim."""
        step = self.iterations - stage
        if dim is None:
            return step
        inner = math.prod(self.grid[int(dim) + 1 :])
        return step // inner % self.grid[int(dim)]


def _apply(opcode: str, values: list[np.ndarray | None]) -> np.ndarray | None:
    base = opcode.split(".")[0]
    if base in ("pand", "pnand", "por", "pnor"):
        # One operand may settle it: nothing in the grid is first if it is not first of the row.
        settles = base in ("por", "pnor")
        known = [value.astype(bool) for value in values if value is not None]
        if not known:
            return None
        result = np.logical_or.reduce(known) if settles else np.logical_and.reduce(known)
        if len(known) < len(values) and not np.all(result == settles):
            return None
        return ~result if base in ("pnand", "pnor") else result
    if any(value is None for value in values):
        return None
    if base == "scmp":
        return _COMPARE[opcode.split(".")[1]](*values)
    if base in _ARITHMETIC:
        return _signed(_ARITHMETIC[base](*values))
    match base:
        case "smov":
            return values[0]
        case "pneg":
            return ~values[0].astype(bool)
        case "pmov":
            return values[0].astype(bool)
        case "sshrl":
            return _signed((values[0] & 0xFFFFFFFF) >> values[1])
        case "smulhi":
            return _signed(((values[0] & 0xFFFFFFFF) * (values[1] & 0xFFFFFFFF)) >> 32)
        case "scalar_select":
            return np.where(values[0].astype(bool), values[1], values[2])
    return None


def _signed(value: np.ndarray) -> np.ndarray:
    """As 32 bits hold it."""
    return (value + 2**31) % 2**32 - 2**31
