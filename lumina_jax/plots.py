"""The pictures of a run, drawn from the `metrics.jsonl` that it writes, and of prepared data.

`loss_curve`: the loss against the step, of the pictures trained on and of those held out, and small
panels: the learning rate, the norm of the gradient, and the loss against t (0 is noise, 1 is data),
where faults of the flow show first. `speed`: pictures a second, use of the devices, the time of a
step, and what the time of the run went into so far.
"""

import io
import json
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath
from jaxtyping import Float
from matplotlib.figure import Figure

from lumina_jax import files
from lumina_jax.data.plan import Report
from lumina_jax.data.records import Manifest
from lumina_jax.errors import InputError

_LINE, _RAW, _GRID, _FAINT = "#2563a8", "#a9c6e4", "#ececec", "#757575"
_OTHER = "#d1662a"
_CLASS_COLOURS = {
    "start": "#7fa8d1", "compile": "#2563a8", "data": "#d1662a", "save": "#3f8f5b",
    "restore": "#97c9a6", "preview": "#b79ad0", "validation": "#8a5fb0", "repeated": "#c23b3b",
    "down": "#4a4a4a", "other": "#c9c9c9",
}  # fmt: skip


def loss_curve(metrics_path: epath.PathLike, output_path: epath.PathLike) -> None:
    """Draws the run as a PNG, aside first: the path never holds half a picture."""
    metrics = read_metrics(metrics_path)
    figure = Figure(figsize=(12, 5.4), layout="constrained")
    panels = figure.subplot_mosaic(
        [["loss", "rate", "norm"], ["loss", "bins", "bins"]], width_ratios=[2.4, 1, 1]
    )
    _plot_loss(panels["loss"], metrics)
    _plot_small(panels["rate"], metrics, "learning_rate", "learning rate")
    _plot_small(panels["norm"], metrics, "grad_norm", "gradient norm")
    _plot_bins(panels["bins"], metrics)
    for panel in panels.values():
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color=_GRID)
        panel.set_axisbelow(True)
        panel.tick_params(labelsize=8)

    _save(figure, output_path)


def speed(metrics_path: epath.PathLike, output_path: epath.PathLike) -> None:
    """Draws how fast the run is, and what it lost time to, as a PNG."""
    metrics = read_metrics(metrics_path)
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    panels = figure.subplot_mosaic([["images", "steps"], ["use", "classes"]])
    _plot_smoothed(panels["images"], metrics, "images_per_second", _LINE)
    _title(panels["images"], "images a second")
    _plot_smoothed(panels["steps"], metrics, "step_seconds_median", _LINE, label="median")
    panels["steps"].plot(
        *_series(metrics, "step_seconds_max"), ".", color=_OTHER, markersize=3, label="slowest"
    )
    panels["steps"].set_yscale("log")
    _title(panels["steps"], "seconds of a step, in each line of the log")
    for name, colour, label in (
        ("mfu", _LINE, "MFU"),
        ("input_wait", _OTHER, "waiting for input"),
        ("goodput", "#3f8f5b", "goodput"),
        ("hbm_peak_share", "#8a5fb0", "peak of memory"),
    ):
        _plot_smoothed(panels["use"], metrics, name, colour, label=label)
    panels["use"].set_ylim(0, 1)
    _title(panels["use"], "shares: of the devices' peak, of time, of memory")
    _plot_classes(panels["classes"], metrics)
    for name in ("steps", "use"):
        if panels[name].get_legend_handles_labels()[1]:
            panels[name].legend(frameon=False, fontsize=8)
    for panel in panels.values():
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
        panel.set_xlabel("step", fontsize=9)
        panel.set_axisbelow(True)
        panel.grid(color=_GRID)
    _save(figure, output_path)


def _save(figure: Figure, path: epath.PathLike) -> None:
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    files.write(path, png.getvalue())


def _title(panel, text: str) -> None:
    panel.set_title(text, loc="left", fontsize=10)


def _plot_smoothed(panel, metrics, name, colour, label=None) -> None:
    """What is logged, faint, and its running median."""
    steps, values = _series(metrics, name)
    if len(steps):
        panel.plot(steps, values, color=colour, linewidth=0.7, alpha=0.35)
        smoothed = smooth(values, len(values) // 80)
        panel.plot(steps, smoothed, color=colour, linewidth=1.6, label=label)


def _plot_classes(panel, metrics) -> None:
    """What was lost so far, one class upon the other; those that never were 1 % go together."""
    lines = {step: scalars for step, scalars in metrics.items() if "goodput" in scalars}
    steps = list(lines)
    lost = {
        name.removeprefix("lost/"): np.array([scalars.get(name, 0.0) for scalars in lines.values()])
        for name in sorted({name for scalars in lines.values() for name in scalars})
        if name.startswith("lost/")
    }
    large = {n: shares for n, shares in lost.items() if n != "other" and shares.max() >= 0.01}
    small = [shares for name, shares in lost.items() if name not in large]
    if small and sum(small).max() > 0:
        large["other"] = sum(small)
    if large:
        colours = [_CLASS_COLOURS[name] for name in large]
        labels = [f"{name} {shares[-1]:.1%}" for name, shares in large.items()]
        panel.stackplot(steps, *large.values(), colors=colours, labels=labels)
        panel.legend(
            *(found[::-1] for found in panel.get_legend_handles_labels()),
            frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5),
        )  # fmt: skip
        panel.set_ylim(0, min(1.0, 1.05 * sum(large.values()).max()))
    _title(panel, "share of the time since the first start that was lost to")


def cache_calibration(
    path: epath.PathLike,
    distance: Float[np.ndarray, " n"],
    change: Float[np.ndarray, " n"],
    coefficients: Sequence[float],
    thresholds: Sequence[Mapping[str, float]],
) -> None:
    """Draws the fit of a sampler's cache, and what its thresholds cost and save, as a PNG."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    fit, cost = figure.subplots(1, 2)
    fit.plot(distance, change, ".", color=_RAW, markersize=4, label="evaluations")
    line = np.linspace(0, distance.max(), 200)
    fit.plot(line, np.polyval(coefficients, line), color=_LINE, label="polynomial")
    fit.plot(line, line, ":", color=_FAINT, linewidth=1, label="as far as it moved")
    fit.set_xlabel("how far the input of the first layer moved", fontsize=9)
    fit.legend(frameon=False, fontsize=8)
    _title(fit, "how much the work of the layers changed")
    computed = [row["computed"] for row in thresholds]
    error = [row["error"] for row in thresholds]
    cost.plot(computed, error, "o-", color=_OTHER, markersize=5, linewidth=1.2)
    for row in thresholds:
        cost.annotate(
            f"{row['threshold']:g}", (row["computed"], row["error"]), textcoords="offset points",
            xytext=(6, 4), fontsize=8, color=_FAINT,
        )  # fmt: skip
    cost.set_xlim(0, 1)
    cost.set_ylim(bottom=0)
    cost.set_xlabel("share of evaluations in which the layers ran", fontsize=9)
    _title(cost, "error of the picture (root mean square, of 1), by threshold")
    for panel in (fit, cost):
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color=_GRID)
        panel.set_axisbelow(True)
        panel.tick_params(labelsize=8)
    _save(figure, path)


def prepared_data(
    manifests: Sequence[Manifest], report: Report, output_path: epath.PathLike
) -> None:
    """Draws what became of the pictures as a PNG: buckets from wide to tall, and rejections."""
    reasons = sorted({reason for rejected in report.rejected for reason in rejected})
    num_bars = max([len(reasons), *(len(manifest.splits) for manifest in manifests)])
    num_panels = len(manifests) + bool(reasons)
    figure = Figure(figsize=(4.5 * num_panels, 1.6 + 0.2 * num_bars), layout="constrained")
    panels = figure.subplots(1, num_panels, squeeze=False)[0]
    for panel, manifest in zip(panels, manifests, strict=False):
        splits = sorted(manifest.splits, key=lambda s: s.bucket.height / s.bucket.width)
        _plot_counts(panel, {str(s.bucket): {"": s.num_records} for s in splits})
        panel.set_title(
            f"{manifest.num_records:,} records at {manifest.resolution} px",
            loc="left",
            fontsize=10,
        )
    if reasons:
        columns = [
            (f"{m.resolution} px", r) for m, r in zip(manifests, report.rejected, strict=True)
        ]
        if all(rejected == report.rejected[0] for rejected in report.rejected):
            columns = columns[:1]  # resolutions differ only in what is too small
        _plot_counts(
            panels[-1],
            {reason: {name: r.get(reason, 0) for name, r in columns} for reason in reasons},
        )
        panels[-1].set_title(f"rejected, of {report.num_read:,} read", loc="left", fontsize=10)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    files.write(output_path, png.getvalue())


def _plot_counts(panel, counts: Mapping[str, Mapping[str, int]]) -> None:
    """Horizontal bars with their numbers; several for each name where there are series."""
    series = list(next(iter(counts.values())))
    height = 0.8 / len(series)
    for number, which in enumerate(series):
        values = [of_name[which] for of_name in counts.values()]
        places = np.arange(len(values)) + (number - (len(series) - 1) / 2) * height
        shade = 1 - 0.3 * number
        bars = panel.barh(places, values, height, color=_LINE, alpha=shade, label=which)
        labels = [f"{value:,}" if value else "" for value in values]
        panel.bar_label(bars, labels, padding=3, fontsize=8, color=_FAINT)
    panel.set_yticks(range(len(counts)), list(counts), fontsize=8)
    panel.set_ylim(max(len(counts), 8) - 0.4, -0.6)  # a few bars are not to fill a page
    panel.margins(x=0.15)
    panel.xaxis.set_visible(False)
    panel.spines[["top", "right", "bottom"]].set_visible(False)
    if len(series) > 1:
        panel.legend(frameon=False, fontsize=8, loc="lower right")


def read_metrics(path: epath.PathLike) -> dict[int, dict[str, float]]:
    """The scalars of each step, in order; of a step that a resumed run repeats, the last ones."""
    path = epath.Path(path)
    if not path.exists():
        raise InputError(
            f"There is no {path}. Give the workdir of a run that has logged at least one step; "
            "training writes metrics.jsonl there."
        )
    metrics = {}
    lines = path.read_text().split("\n")
    # What follows the last line break is empty, or half of a line that is being written right now.
    for number, line in enumerate(lines[:-1], start=1):
        try:
            scalars = json.loads(line)
            step = int(scalars.pop("step"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"Line {number} of {path} is not a JSON object with a step: {line[:80]!r}. "
                "Delete the line."
            ) from error
        # What has no loss was measured beside the step, such as the validation loss.
        metrics[step] = scalars if "loss" in scalars else metrics.get(step, {}) | scalars
    if not any("loss" in scalars for scalars in metrics.values()):
        raise InputError(f"{path} holds no loss yet; wait until the run has logged its first step.")
    return dict(sorted(metrics.items()))


def smooth(values: Float[np.ndarray, " N"], reach: int) -> Float[np.ndarray, " N"]:
    """The median over `reach` neighbours on each side, which one bad batch does not move."""
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return np.array([_median(window) for window in windows])


def _median(values: np.ndarray) -> float:
    """The median of what is finite: a loss can be NaN, and nothing finite is a gap in the line."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else float("nan")


def _series(metrics, name) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(step, scalars[name]) for step, scalars in metrics.items() if name in scalars]
    steps, values = np.array(pairs, dtype=float).reshape(-1, 2).T
    return steps, values


def _plot_loss(panel, metrics) -> None:
    steps, values = _series(metrics, "loss")
    smoothed = smooth(values, len(values) // 80)
    panel.plot(steps, values, color=_RAW, linewidth=0.8, label="logged")
    panel.plot(steps, smoothed, color=_LINE, linewidth=2, label="smoothed")
    for name, style, label in (
        ("validation_loss", "o-", "held out, averaged weights"),
        ("validation_loss_raw", "o:", "held out, raw weights"),
    ):
        held_out = _series(metrics, name)
        if len(held_out[0]):
            panel.plot(*held_out, style, color=_OTHER, markersize=3, linewidth=1.4, label=label)
    finite = values[np.isfinite(values)]
    if len(finite):
        # A single spike would press the rest of the curve flat.
        low, high = finite.min(), np.percentile(finite, 99.5)
        for name in ("validation_loss", "validation_loss_raw"):
            low = min([low, *_series(metrics, name)[1]])
        margin = 0.05 * (high - low) or 0.05
        panel.set_ylim(low - margin, high + margin)
    panel.set_xlabel("step")
    panel.set_ylabel("loss")
    panel.legend(frameon=False)
    panel.set_title(_summary(metrics, steps, smoothed), loc="left", fontsize=10, color=_FAINT)


def _summary(metrics, steps, smoothed) -> str:
    """Where the run stands; speeds are medians, which a pause does not move."""
    parts = [f"step {steps[-1]:,.0f}", f"loss {smoothed[-1]:.4f}"]
    for name, form in (
        ("images_per_second", "{:,.0f} images/s"),
        ("mfu", "MFU {:.1%}"),
        ("input_wait", "waiting for input {:.1%}"),
    ):
        _, values = _series(metrics, name)
        if len(values):
            parts.append(form.format(_median(values)))
    return "   ".join(parts)


def _plot_small(panel, metrics, name, title) -> None:
    panel.plot(*_series(metrics, name), color=_LINE, linewidth=1.2)
    panel.set_title(title, loc="left", fontsize=10)
    panel.locator_params(nbins=4)


def _plot_bins(panel, metrics) -> None:
    """The mean of the last tenth of the lines: one line has few pictures in each bin."""
    lines = [scalars for scalars in metrics.values() if "loss" in scalars]
    recent = lines[-max(1, len(lines) // 10) :]
    names = sorted(
        {name for scalars in metrics.values() for name in scalars if name.startswith("loss_bins/")}
    )
    means = [np.mean([s[name] for s in recent if name in s] or np.nan) for name in names]
    edges = np.linspace(0, 1, len(names) + 1)
    panel.stairs(means, edges, color=_LINE, fill=True, alpha=0.35)
    panel.stairs(means, edges, color=_LINE, linewidth=1.2)
    panel.set_xlim(0, 1)
    panel.set_xlabel("t (0 is noise, 1 is data)", fontsize=9)
    by_time = [scalars for scalars in metrics.values() if "validation_loss" in scalars]
    if by_time:
        held_out = [v for n, v in sorted(by_time[-1].items()) if n.startswith("validation_loss/t")]
        times = (np.arange(len(held_out)) + 0.5) / len(held_out)
        panel.plot(times, held_out, "o-", color=_OTHER, markersize=3, linewidth=1.2)
    panel.set_title("loss by t, last tenth of the run", loc="left", fontsize=10)
