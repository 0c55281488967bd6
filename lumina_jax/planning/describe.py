"""The numbers of a plan in words, for a person."""

from lumina_jax.planning.chips import Topology

NETWORKS = ("ici", "dcn")
TIMES = ("dots", "kernels", "elementwise", "reduces", "slices", "copies", "waiting")
# Of all traffic; the names of hlo.COLLECTIVES.
COLLECTIVES = (
    "all_gather", "reduce_scatter", "all_reduce", "all_to_all", "collective_permute",
)  # fmt: skip
_NOT_KINDS = ("peak_gib", "pinned_host_gib")


def describe(
    name: str,
    numbers: dict[str, float],
    timings: dict[str, float],
    topology: Topology,
) -> str:
    """All that was found of a program, as an indented list; see docs/planning.md."""
    n = numbers
    memory = ", ".join(
        f"{key.removesuffix('_gib').replace('_', ' ')} {number(value)}"
        for key, value in n.items()
        if key.endswith("_gib") and key not in _NOT_KINDS and value >= 0.0005
    )
    host = f"; pinned on the host {number(n['pinned_host_gib'])}" if n["pinned_host_gib"] else ""
    times = ", ".join(
        f"{kind} {number(n[f'{kind}_seconds'])}" for kind in TIMES if n[f"{kind}_seconds"]
    )
    lines = [
        f"{name}, on each chip:",
        f"  memory     {number(n['peak_gib'])} of {topology.chip.hbm_gib} GiB: {memory}{host}",
        f"  operations {number(n['compiled_tflop'])} TFLOP compiled, {number(n['kernels_tflop'])} "
        f"of them in kernels; {number(n['asked_tflop'])} asked for, so "
        f"{n['flops_ratio'] - 1:+.1%} for recomputing and padding",
        *(_traffic(n, network) for network in NETWORKS if n[f"{network}_gb"]),
        f"  estimate   {number(n['step_seconds'])} s, MFU {n['mfu']:.1%}: {times}",
        f"  roofline   {number(n['roofline_seconds'])} s, MFU {n['roofline_mfu']:.1%}",
        f"  speed      {number(n['images_per_second'])} images/s on all {topology.num_chips} chips "
        f"by the estimate",
        f"  compiled   in {timings['compile_seconds']:.0f} s "
        f"({timings['compile_cpu_seconds']:.0f} s of CPU), "
        f"{timings['host_memory_gib']:.1f} GiB of this machine",
    ]
    if n["host_gb"]:
        lines.insert(4, f"  host       {number(n['host_gb'])} GB to and from its memory")
    if n["kernels_of_unknown_tflop"]:
        lines.append(
            f"  beware     {n['kernels_of_unknown_tflop']:.0f} kernel(s) whose operations "
            f"report.py does not know count as none"
        )
    return "\n".join(lines)


def _traffic(n: dict[str, float], network: str) -> str:
    kinds = ", ".join(
        f"{kind.replace('_', '-')} {number(n[f'{network}_{kind}_gb'])}"
        for kind in COLLECTIVES
        if n[f"{network}_{kind}_gb"]
    )
    total = n[f"{network}_gb"]
    fakes = f", {number(n['fake_gather_gb'])} of it fake gathers" if n["fake_gather_gb"] else ""
    return (
        f"  {network.upper()}        {number(total)} GB ({kinds}{fakes}), "
        f"{number(n[f'{network}_seconds'])} s at link speed; "
        f"{1 - n[f'{network}_sync_gb'] / total:.0%} asynchronous"
    )


def stage(seconds: float, num_steps: int, num_chips: int, price: float | None = None) -> str:
    """How long a stage of so many steps takes, and what it costs."""
    hours = seconds * num_steps / 3600
    cost = f", {number(hours * num_chips * price)} at {price} a chip-hour" if price else ""
    return (
        f"  the stage  {num_steps:,} steps: {number(hours / 24)} days, "
        f"{number(hours * num_chips)} chip-hours{cost}"
    )


def number(value: float) -> str:
    """Three digits that count, and no power of ten that a person must move."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.{1 if value >= 10 else 2}f}" if value >= 1 else f"{value:.3g}"
