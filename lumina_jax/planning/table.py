"""The plans of several runs on several topologies, as one table and one picture.

A plan is what tools/plan.py writes to --json for a training step.
"""

import io
from collections.abc import Sequence
from typing import Any

from etils import epath
from matplotlib.figure import Figure

from lumina_jax import files
from lumina_jax.errors import InputError
from lumina_jax.planning.describe import TIMES, number

BEGIN, END = "<!-- plans: begin -->", "<!-- plans: end -->"

# A hue for what the matrix unit does, one for the vector unit, greys for what only moves data.
_COLOURS = {
    "dots": "#2563a8",
    "kernels": "#7fb0de",
    "elementwise": "#d9822b",
    "reduces": "#f0bd84",
    "slices": "#8c8c8c",
    "copies": "#bdbdbd",
    "waiting": "#b03a48",
}
_NAMES = {
    "dots": "matrix products",
    "kernels": "attention kernels",
    "waiting": "waiting for other chips",
}
_FAINT = "#757575"

Plan = dict[str, Any]


def markdown(plans: Sequence[Plan]) -> str:
    """One row for each plan, and the versions that they were made with."""
    lines = [
        "| stage | topology | mesh | pictures a chip | remat | peak, GiB | compiled / asked FLOPs "
        "| ICI, GB (async) | DCN, GB | step, s | MFU | at most | images/s | days | chip-hours |",
        "|---|---|---|" + "---:|---|" + "---:|" * 10,
    ]
    lines += [_row(plan) for plan in plans]
    versions = sorted({tuple(sorted(plan["versions"].items())) for plan in plans})
    made = "; ".join(", ".join(f"{name} {v}" for name, v in each) for each in versions)
    return "\n".join([*lines, "", f"Compiled by {made}."])


def _row(plan: Plan) -> str:
    result = plan["programs"]["train"]
    mesh = " x ".join(map(str, plan["mesh"].values()))
    per_chip = plan["batch_size"] / plan["num_chips"]
    head = [plan["config"], plan["topology"], mesh, f"{per_chip:g}", plan["remat"]]
    if not result["fits"]:
        return "| " + " | ".join([*head, f"does not fit: {result['reason']}", *[""] * 9]) + " |"
    n = result["numbers"]
    hidden = 1 - n["ici_sync_gb"] / n["ici_gb"] if n["ici_gb"] else 1.0
    days, chip_hours = cost(plan)
    cells = [
        f"{n['peak_gib']:.2f}",
        f"{n['flops_ratio']:.3f}",
        f"{number(n['ici_gb'])} ({hidden:.0%})",
        number(n["dcn_gb"]) if n["dcn_gb"] else "–",
        number(n["step_seconds"]),
        f"{n['mfu']:.1%}",
        f"{n['roofline_mfu']:.1%}",
        number(n["images_per_second"]),
        number(days),
        number(chip_hours),
    ]
    return "| " + " | ".join([*head, *cells]) + " |"


def cost(plan: Plan) -> tuple[float, float]:
    """Days, and hours of all chips, of the whole stage by the estimate."""
    seconds = plan["programs"]["train"]["numbers"]["step_seconds"]
    hours = seconds * plan["num_steps"] / 3600
    return hours / 24, hours * plan["num_chips"]


def costs(plans: Sequence[Plan]) -> str:
    """One row for each topology: days and chip-hours of every stage, and of all."""
    topologies = list(dict.fromkeys(plan["topology"] for plan in plans))
    stages = list(dict.fromkeys(plan["config"] for plan in plans))
    lines = [
        f"| topology | chips | {' | '.join(stages)} | all |",
        "|---|---:|" + "---:|" * (len(stages) + 1),
    ]
    for topology in topologies:
        here = [plan for plan in plans if plan["topology"] == topology]
        cells = ["does not fit"] * (len(stages) + 1)
        spent = [cost(plan) if plan["programs"]["train"]["fits"] else None for plan in here]
        if None not in spent:
            spent.append(tuple(map(sum, zip(*spent, strict=True))))
        for index, each in enumerate(spent):
            if each is not None:
                cells[index] = f"{each[0]:.2f} days, {each[1]:,.0f}"
        lines.append(f"| {topology} | {here[0]['num_chips']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def insert(page: epath.PathLike, text: str) -> None:
    """Puts the text between the two marks of a page, in place of what is there."""
    page = epath.Path(page)
    old = page.read_text()
    if old.count(BEGIN) != 1 or old.count(END) != 1 or old.index(BEGIN) > old.index(END):
        raise InputError(
            f"{page} must have the line {BEGIN} once, and the line {END} once below it: the table "
            f"goes between them."
        )
    before, _, rest = old.partition(BEGIN)
    _, _, after = rest.partition(END)
    files.write(page, f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def plot(plans: Sequence[Plan], path: epath.PathLike) -> None:
    """Where the time of a step goes: a panel for each stage, a bar for each topology."""
    stages = list(dict.fromkeys(plan["config"] for plan in plans))
    rows = {stage: [p for p in plans if p["config"] == stage] for stage in stages}
    heights = [len(rows[stage]) + 1 for stage in stages]
    figure = Figure(figsize=(11, 1.0 + 0.42 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(stages), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, stage in zip(panels, stages, strict=True):
        _plot_stage(panel, stage, rows[stage])
    panels[-1].set_xlabel("estimated seconds of a step", fontsize=9)
    bars = {_NAMES.get(kind, kind): panels[0].containers[i] for i, kind in enumerate(TIMES)}
    figure.legend(
        bars.values(), bars.keys(), loc="outside upper center", ncols=len(TIMES), frameon=False,
        fontsize=9,
    )  # fmt: skip
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=130)
    files.write(path, png.getvalue())


def _plot_stage(panel, stage: str, plans: list[Plan]) -> None:
    numbers = [plan["programs"]["train"].get("numbers") for plan in plans]
    places = range(len(plans))
    left = [0.0] * len(plans)
    for kind in TIMES:
        values = [n[f"{kind}_seconds"] if n else 0.0 for n in numbers]
        panel.barh(places, values, 0.68, left=left, color=_COLOURS[kind])
        left = [a + b for a, b in zip(left, values, strict=True)]
    widest = max(left) or 1.0
    for place, plan, n, end in zip(places, plans, numbers, left, strict=True):
        label = f"does not fit: {plan['programs']['train'].get('reason')}"
        if n:
            days, chip_hours = cost(plan)
            label = f"MFU {n['mfu']:.0%} · {number(days)} days · {number(chip_hours)} chip-hours"
        panel.text(end + 0.01 * widest, place, label, va="center", fontsize=8.5, color="#333333")
    panel.set_yticks(places, [plan["topology"] for plan in plans], fontsize=9)
    panel.set_ylim(len(plans) - 0.4, -0.6)
    panel.set_xlim(0, 1.42 * widest)  # room for the labels
    panel.set_title(stage, loc="left", fontsize=10, fontweight="bold")
    panel.tick_params(axis="x", labelsize=8, colors=_FAINT)
    panel.tick_params(axis="y", length=0)
    panel.spines[["top", "right", "left"]].set_visible(False)
