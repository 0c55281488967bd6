"""What a compiled program needs and how fast it can be, on one chip of a topology.

Facts of the compiler: memory, operations, bytes of each collective. Estimates: time. No TPU was
asked, so a time is good for ranking two plans and for telling what binds, and is not a measurement.

    roofline = max(all operations / peak, all bytes between chips / link speed)
    estimate = cycles / clock                  the compiler's cost model, of all but what follows
             + bundles of Pallas kernels on one core / clock    (bundles.py)
             + bytes between chips that nothing hides / link speed
    MFU      = operations that the model asks for / (time * peak)
"""

import collections
import re
import resource
import time
from collections.abc import Mapping

import jax

from lumina_jax.planning import bundles, hlo
from lumina_jax.planning.chips import Topology
from lumina_jax.planning.programs import Lowered

GIB = 2**30


class DoesNotFitError(Exception):
    """The compiler found the program too large for the memory of a chip."""

    def __init__(self, needed: str, available: str, where: str):
        super().__init__(f"needs {needed} of {where}, has {available}")
        self.needed, self.available = needed, available


def compile_and_report(lowered: Lowered, topology: Topology, dump: str | None) -> dict[str, float]:
    """The numbers of a program; a key's unit is its last word, or it is a share or a ratio.

    Args:
      lowered: The program.
      topology: That it was lowered for.
      dump: The folder of bundles.dump_flags; None leaves the kernels' time out.
    """
    began, cpu_began = time.perf_counter(), time.process_time()
    try:
        compiled = lowered.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise (_does_not_fit(str(error)) or error) from None
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    program = hlo.analyze(compiled.as_text())
    kernels = bundles.read(dump, program.kernels) if dump and program.kernels else {}
    numbers = {
        **_memory(lowered, compiled.memory_analysis()),
        **_operations(lowered, topology, program, kernels),
        "compile_seconds": seconds,
        "compile_cpu_seconds": cpu_seconds,
        "host_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB,
    }
    return numbers


def hottest(text: str, num: int, clock: float) -> list[str]:
    """The instructions that take longest, as lines."""
    return [
        f"{1e3 * cost.cycles / clock:8.1f} ms {cost.executions:5d} x {cost.kind:<12} "
        f"{cost.name:<40} {cost.op_name[-90:]} {' '.join(map(str, cost.results))[:100]}"
        for cost in hlo.analyze(text).hottest(num)
    ]


def _does_not_fit(message: str) -> DoesNotFitError | None:
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    match = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) (\w+)", message)
    if match is None:
        match = re.search(
            r"[Ss]coped allocation with size ([\d.]+\w) and limit ([\d.]+\w)()", message
        )
    if match is None:
        return None
    return DoesNotFitError(match[1] + "iB", match[2] + "iB", match[3] or "scoped vmem")


def _memory(lowered: Lowered, memory) -> dict[str, float]:
    """By kind, in GiB."""
    inputs = {f"{name.replace(' ', '_')}_gib": n / GIB for name, n in lowered.inputs.items()}
    peak = memory.peak_memory_in_bytes
    return {
        "peak_gib": peak / GIB,
        **inputs,
        "temporaries_gib": (peak - memory.argument_size_in_bytes) / GIB,
        "code_gib": memory.generated_code_size_in_bytes / GIB,
        "pinned_host_gib": memory.host_temp_size_in_bytes / GIB,
    }


def _operations(
    lowered: Lowered,
    topology: Topology,
    program: hlo.Program,
    kernels: Mapping[str, bundles.Bundles],
) -> dict[str, float]:
    chip, num_chips = topology.chip, topology.num_chips
    asked = lowered.flops / num_chips
    kernel_flops = sum(k.executions * flops_of_kernel(k) for k in program.kernels)
    compiled = program.dot_flops + kernel_flops
    kernel_seconds = sum(
        k.executions * kernels[k.name].cycles / chip.clock
        for k in program.kernels
        if k.name in kernels
    )
    traffic = _traffic(program, topology)
    links = {"ici": chip.ici_bytes_per_second, "dcn": chip.dcn_bytes_per_second}
    seconds_on = {name: traffic[f"{name}_gb"] * 1e9 / speed for name, speed in links.items()}
    waiting = sum(traffic[f"{name}_sync_gb"] * 1e9 / speed for name, speed in links.items())
    roofline = max(compiled / chip.flops, *seconds_on.values())
    estimate = program.cycles / chip.clock + kernel_seconds + waiting
    ideal = asked / chip.flops
    return {
        "asked_tflop": asked / 1e12,
        "compiled_tflop": compiled / 1e12,
        "kernels_tflop": kernel_flops / 1e12,
        "flops_ratio": compiled / asked,
        **traffic,
        "ici_seconds": seconds_on["ici"],
        "dcn_seconds": seconds_on["dcn"],
        "host_gb": (program.host_bytes.to_host + program.host_bytes.from_host) / 1e9,
        **{f"{kind}_seconds": cycles / chip.clock for kind, cycles in program.cycles_by.items()},
        "kernels_seconds": kernel_seconds,
        "waiting_seconds": waiting,
        "roofline_seconds": roofline,
        "roofline_mfu": ideal / roofline,
        "step_seconds": estimate,
        "mfu": ideal / estimate,
        "images_per_second": lowered.num_images / estimate,
        "score_buffers": float(_num_score_buffers(program)),
    }


def _traffic(program: hlo.Program, topology: Topology) -> dict[str, float]:
    """GB that a chip receives, by network, by collective, and how much of it may be hidden."""
    found: dict[str, float] = collections.defaultdict(float)
    for name in ("ici", "dcn"):
        for part in ("", "_sync"):
            found[f"{name}{part}_gb"] = 0.0
    gathered = hidden = 0.0
    for collective in program.collectives:
        gb = collective.wire_bytes / 1e9
        network = "dcn" if collective.crosses(topology.chips_per_slice) else "ici"
        found[f"{network}_gb"] += gb
        if not collective.asynchronous:
            found[f"{network}_sync_gb"] += gb
        found[f"{network}_{collective.kind.replace('-', '_')}_gb"] += gb
        if collective.fake_gather:
            found["fake_gather_gb"] += gb
        if collective.kind == "all-gather":
            gathered += gb
            hidden += gb * collective.asynchronous
    found["fake_gather_gb"] += 0.0
    found["gather_asynchronous"] = hidden / gathered if gathered else 1.0
    return dict(found)


def flops_of_kernel(kernel: hlo.Kernel) -> int:
    """Matrix products of an attention kernel, from the shapes of its queries [.., T, d]."""
    products = {
        "flash_forward": 2, "flash_backward": 5, "splash_mha_fwd": 2, "splash_mha_dkv": 5,
    }  # fmt: skip
    for name, count in products.items():
        if name in kernel.function:
            *others, num_tokens, head_dim = max(
                (x.shape for x in kernel.operands if len(x.shape) >= 3 and x.dtype == "bf16"),
                key=lambda shape: shape[-3:] and _size(shape),
            )
            return count * 2 * _size(others) * num_tokens * num_tokens * head_dim
    return 0


def _size(shape) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _num_score_buffers(program: hlo.Program) -> int:
    """Arrays [.., T, T] in memory, T being that of any attention kernel."""
    lengths = {x.shape[-2] for k in program.kernels for x in k.operands if len(x.shape) == 4}
    return sum(
        len(b.array.shape) >= 2 and b.array.shape[-1] == b.array.shape[-2] in lengths
        for b in program.largest
    )
