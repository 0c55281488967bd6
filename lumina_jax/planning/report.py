"""What a compiled program needs and how fast it can be, on one chip of a topology.

Facts of the compiler: memory, operations, bytes of each collective. Estimates: time. No TPU was
asked, so a time is good for ranking two plans and for telling what binds, and is not a measurement.

    roofline = max(all operations / peak, all bytes between chips / link speed)
    estimate = cycles / clock                  the compiler's cost model, of all but what follows
             + bundles of Pallas kernels on one core / clock    (bundles.py)
             + bytes between chips that nothing hides / link speed
    MFU      = operations that the model asks for / (time * peak)
"""

import dataclasses
import hashlib
import importlib.metadata
import math
import re
import resource
import time
from collections.abc import Mapping

import jax

from lumina_jax.planning import bundles, hlo, kernels
from lumina_jax.planning.chips import Topology
from lumina_jax.planning.programs import Lowered

GIB = 2**30
# How libtpu says that a program is too large: needed, then available. The first counts inputs too.
_TOO_LARGE = (
    (r"total memory required for .*?\(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)", "HBM"),
    (r"Used ([\d.]+\w) of ([\d.]+\w) hbm", "HBM"),
    (r"Used ([\d.]+\w) of ([\d.]+\w) vmem", "vector memory"),
    (r"Scoped allocation with size ([\d.]+\w) and limit ([\d.]+\w)", "scoped vector memory"),
)
# Matrix products in an attention kernel, each of 2 T T d operations a head: scores and values
# forward; both again, and the gradients of queries, keys and values backward.
_PRODUCTS = {"flash_forward": 2, "flash_backward": 5, "splash_mha_fwd": 2, "splash_mha_dkv": 5}


class DoesNotFitError(Exception):
    """The compiler found the program too large for a memory of the chip; both sizes in bytes."""

    def __init__(self, needed: float, available: float, memory: str, where: str):
        at = f" in {where}" if where else ""
        super().__init__(f"needs {_size(needed)} of {memory}{at}, has {_size(available)}")
        self.needed, self.available, self.memory = needed, available, memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What was found of a program.

    Attributes:
      numbers: By name; the unit is the last word of it, else it is a share, a ratio or a count. The
        same program and the same libtpu give the same ones.
      timings: Of this compilation on this machine.
      text: The compiled program.
    """

    numbers: dict[str, float]
    timings: dict[str, float]
    text: str


def compile_and_report(lowered: Lowered, topology: Topology) -> Report:
    """Compiles a program for the topology that it was lowered for, and reads it."""
    began, cpu_began = time.perf_counter(), time.process_time()
    try:
        compiled = lowered.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if too_large := does_not_fit(str(error)):
            raise too_large from None
        raise
    timings = {
        "compile_seconds": time.perf_counter() - began,
        "compile_cpu_seconds": time.process_time() - cpu_began,
        "host_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB,
    }
    text = compiled.as_text()
    program = hlo.analyze(text, taken=lowered.taken)
    code = kernels.machine_code(program.kernels, topology, lowered.compiler_options)
    counted = {k.name: bundles.parse(k.name, code[k.code]) for k in program.kernels}
    numbers = _memory(lowered, compiled.memory_analysis())
    numbers |= operations(lowered, topology, program, counted)
    return Report(numbers=numbers, timings=timings, text=text)


def versions() -> dict[str, str]:
    """Of what decides the numbers, beside this package."""
    return {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}


def key(lowered: Lowered, topology: Topology) -> str:
    """Programs with the same key give the same numbers."""
    options = sorted(lowered.compiler_options.items())
    program = lowered.lowered.as_text(), lowered.taken
    parts = (program, str(topology), options, sorted(versions().items()))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def hottest(text: str, num: int, clock: float) -> list[str]:
    """The instructions that take longest by the compiler's estimate, as lines."""
    return [
        f"{1e3 * cost.cycles / clock:10.3f} ms {cost.executions:5d} x {cost.kind:<12} "
        f"{cost.name:<40} {cost.op_name[-90:]} {' '.join(map(str, cost.results))[:100]}"
        for cost in hlo.analyze(text).hottest(num)
    ]


def does_not_fit(message: str) -> DoesNotFitError | None:
    """What an error of the compiler says about memory, if that is what it is about."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    for pattern, memory in _TOO_LARGE:
        if match := re.search(pattern, message):
            where = re.search(r'op_name="([^"]*)"', message) if memory != "HBM" else None
            needed, available = map(_bytes, match.groups())
            return DoesNotFitError(needed, available, memory, where[1] if where else "")
    return None


def _bytes(text: str) -> float:
    return float(text[:-1]) * 1024.0 ** ("BKMGT".index(text[-1]))


def _size(num_bytes: float) -> str:
    """In GiB, or what is below one in MiB."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.2f} MiB"


def _memory(lowered: Lowered, memory) -> dict[str, float]:
    """By kind, in GiB. All but the pinned memory of the host is HBM."""
    inputs = {f"{name.replace(' ', '_')}_gib": n / GIB for name, n in lowered.inputs.items()}
    peak, arguments = peak_memory(memory), memory.argument_size_in_bytes
    return {
        "peak_gib": peak / GIB,
        **inputs,
        "padding_gib": (arguments - sum(lowered.inputs.values())) / GIB,
        "temporaries_gib": (peak - arguments) / GIB,
        "code_gib": memory.generated_code_size_in_bytes / GIB,
        "pinned_host_gib": memory.host_temp_size_in_bytes / GIB,
    }


def peak_memory(memory) -> int:
    """Bytes of HBM at the fullest moment, of what `memory_analysis` gives for a TPU.

    The compiler's own peak counts the temporaries of that memory which has more of them. That may
    be the host's, if activations are offloaded.
    """
    return min(memory.peak_memory_in_bytes, total_memory(memory))


def total_memory(memory) -> int:
    """Bytes on a device of all that a program takes, has and gives; on any platform."""
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + results + memory.temp_size_in_bytes


def operations(
    lowered: Lowered,
    topology: Topology,
    program: hlo.Program,
    counted: Mapping[str, bundles.Bundles],
) -> dict[str, float]:
    """Operations, traffic and time of a chip in one run; `counted` are the program's kernels."""
    chip = topology.chip
    asked = lowered.flops / topology.num_chips
    kernel_flops = sum(k.executions * flops_of_kernel(k) for k in program.kernels)
    compiled = program.dot_flops + kernel_flops
    kernel_seconds = sum(
        k.executions * counted[k.name].cycles / chip.clock for k in program.kernels
    )
    traffic = _traffic(program, topology)
    links = {"ici": chip.ici_bytes_per_second, "dcn": chip.dcn_bytes_per_second}
    seconds_on = {name: traffic[f"{name}_gb"] * 1e9 / speed for name, speed in links.items()}
    waiting = sum(traffic[f"{name}_sync_gb"] * 1e9 / speed for name, speed in links.items())
    roofline = max(compiled / chip.flops, *seconds_on.values())
    estimate = program.cycles / chip.clock + kernel_seconds + waiting
    ideal = asked / chip.flops
    cycles_by = {kind: program.cycles_by.get(kind, 0) for kind in hlo.KINDS}
    return {
        "asked_tflop": asked / 1e12,
        "compiled_tflop": compiled / 1e12,
        "kernels_tflop": kernel_flops / 1e12,
        "flops_ratio": compiled / asked,
        **traffic,
        "ici_seconds": seconds_on["ici"],
        "dcn_seconds": seconds_on["dcn"],
        "host_gb": (program.host_bytes.to_host + program.host_bytes.from_host) / 1e9,
        **{f"{kind}_seconds": cycles / chip.clock for kind, cycles in cycles_by.items()},
        "kernels_seconds": kernel_seconds,
        "waiting_seconds": waiting,
        "roofline_seconds": roofline,
        "roofline_mfu": ideal / roofline,
        "step_seconds": estimate,
        "mfu": ideal / estimate,
        "images_per_second": lowered.num_images / estimate,
        "score_buffers": float(_num_score_buffers(program, lowered.sequences)),
        "kernels_of_unknown_tflop": float(
            sum(flops_of_kernel(kernel) == 0 for kernel in program.kernels)
        ),
    }


def _traffic(program: hlo.Program, topology: Topology) -> dict[str, float]:
    """GB that a chip sends, by network and collective, and how much of it is waited for."""
    kinds = [kind.replace("-", "_") for kind in hlo.COLLECTIVES]
    parts = ("", "_sync", *(f"_{kind}" for kind in kinds))
    found = {f"{network}{part}_gb": 0.0 for network in ("ici", "dcn") for part in parts}
    found["fake_gather_gb"] = gathered = hidden = 0.0
    for collective in program.collectives:
        gb = collective.wire_bytes / 1e9
        network = "dcn" if collective.crosses(topology.chips_per_slice) else "ici"
        found[f"{network}_gb"] += gb
        found[f"{network}_{collective.kind.replace('-', '_')}_gb"] += gb
        found[f"{network}_sync_gb"] += gb * (not collective.asynchronous)
        found["fake_gather_gb"] += gb * collective.fake_gather
        if collective.kind == "all-gather":
            gathered += gb
            hidden += gb * collective.asynchronous
    return found | {"gather_asynchronous": hidden / gathered if gathered else 1.0}


def flops_of_kernel(kernel: hlo.Kernel) -> int:
    """Matrix products of an attention kernel, from its queries [.., T, d]; 0 of any other."""
    for name, count in _PRODUCTS.items():
        if name in kernel.function:
            shapes = [x.shape for x in kernel.operands if x.dtype in ("bf16", "f32")]
            *others, num_tokens, head_dim = max(shapes, key=math.prod)
            return count * 2 * math.prod(others) * num_tokens * num_tokens * head_dim
    return 0


def _num_score_buffers(program: hlo.Program, sequences: tuple[int, ...]) -> int:
    """Arrays [.., T, T] in memory, T being a length of sequence, perhaps filled up to lanes."""
    squares = {(t, t) for length in sequences for t in (length, -(-length // 128) * 128)}
    return sum(b.array.shape[-2:] in squares for b in program.largest)
