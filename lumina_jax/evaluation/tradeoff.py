"""A plot of what settings save against what they cost, with names that cover nothing."""

import io
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from lumina_jax import files

_LADDER, _ALONE, _FAINT, _GRID = "#d1662a", "#2563a8", "#757575", "#ececec"
_NEAREST = 1e-4  # what is equal has no place on a logarithmic axis


class Point(NamedTuple):
    """A setting.

    Attributes:
      speed_up: Over the baseline.
      distance: From where its pictures should be.
      name: Written beside it.
      ladder: Whether it goes one step beyond the ladder's point before it.
    """

    speed_up: float
    distance: float
    name: str
    ladder: bool


def plot(
    path: epath.PathLike,
    subjects: Mapping[str, Sequence[Point]],
    *,
    levels: Mapping[str, float],
    title: str,
) -> None:
    """Draws a panel for each subject as a PNG; better is to the right and upwards.

    Args:
      path: Of the PNG.
      subjects: The same settings, with other distances in each panel, by its heading.
      levels: Distances to compare with, by name.
      title: Of all.
    """
    subjects = {
        heading: [p._replace(distance=max(p.distance, _NEAREST)) for p in points]
        for heading, points in subjects.items()
    }
    figure = Figure(figsize=(7.5 * len(subjects), 7.2), dpi=130, layout="constrained")
    panels = figure.subplots(1, len(subjects), sharex=True, sharey=True, squeeze=False)[0]
    panels[0].set_xscale("log")
    panels[0].set_yscale("log")
    panels[0].invert_yaxis()
    for panel, (heading, points) in zip(panels, subjects.items(), strict=True):
        panel.set_title(heading, loc="left", fontsize=10)
        panel.set_xlabel("times as fast as the baseline", fontsize=9)
        _plot_points(panel, points)
        _draw_levels(panel, levels)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color=_GRID)
        panel.set_axisbelow(True)
        panel.tick_params(labelsize=8, labelleft=True)
        panel.margins(0.12)
        plain = FuncFormatter(lambda value, _: f"{value:g}")
        panel.xaxis.set(minor_locator=NullLocator(), major_formatter=plain)
        panel.yaxis.set_major_formatter(plain)
    low, high = panels[0].get_xlim()
    ticks = (0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24)
    panels[0].xaxis.set_major_locator(FixedLocator([x for x in ticks if low <= x <= high]))
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=_FAINT)
    figure.draw_without_rendering()  # from here on places are known
    for panel, points in zip(panels, subjects.values(), strict=True):
        _label_points(panel, points)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    files.write(path, png.getvalue())


def _plot_points(panel, points: Sequence[Point]) -> None:
    """The ladder as a line, the others as points, and those that no other beats in both."""
    front = [
        (p.speed_up, p.distance)
        for p in sorted(points)
        if not any(
            q.speed_up >= p.speed_up and q.distance <= p.distance and q[:2] != p[:2] for q in points
        )
    ]
    panel.step(
        *zip(*front, strict=True), where="pre", color="#d4d4d4", linewidth=4, zorder=1,
        label="no other is both faster and nearer",
    )  # fmt: skip
    for ladder, style, colour, label in (
        (False, "o", _ALONE, "alone"),
        (True, "o-", _LADDER, "the ladder, rung by rung"),
    ):
        if chosen := [(p.speed_up, p.distance) for p in points if p.ladder == ladder]:
            panel.plot(
                *zip(*chosen, strict=True), style, color=colour, markersize=5, label=label, zorder=4
            )


def _draw_levels(panel, levels: Mapping[str, float]) -> None:
    """A line at each distance, the worst one labelled below."""
    for name, level in levels.items():
        worst = level == max(levels.values())
        panel.axhline(level, color=_FAINT, linewidth=0.8, linestyle=(0, (2, 3)), zorder=1)
        panel.annotate(
            name, (0, level), xycoords=("axes fraction", "data"), xytext=(3, -3 if worst else 3),
            textcoords="offset points", va="top" if worst else "bottom", fontsize=8, color=_FAINT,
        )  # fmt: skip


def _label_points(panel, points: Sequence[Point]) -> None:
    """Writes names beside points, each where it covers least of what is there."""
    points = sorted(points, key=lambda point: not point.ladder)
    places = panel.transData.transform([point[:2] for point in points])
    rungs = places[: sum(point.ladder for point in points)]
    along = [
        a + (b - a) * part for a, b in itertools.pairwise(rungs) for part in np.arange(30) / 30
    ]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in places]
    taken += [(x - 3, y - 3, x + 3, y + 3) for x, y in along]
    taken += [text.get_window_extent().extents for text in panel.texts]
    reaches, directions = (
        np.array(x)
        for x in zip(*itertools.product((8, 16, 28, 42, 60, 80), _DIRECTIONS), strict=True)
    )
    for point, place in zip(points, places, strict=True):
        colour = _LADDER if point.ladder else _ALONE
        label = panel.annotate(
            point.name, point[:2], xytext=(0, 0), textcoords="offset pixels", fontsize=8,
            color=colour, path_effects=[withStroke(linewidth=2.5, foreground="white")],
            arrowprops=dict(arrowstyle="-", color=colour, linewidth=0.4, alpha=0.6),
        )  # fmt: skip
        size = label.get_window_extent().size
        # Lower left corners: the near edge is beside the point, or the middle above or below it.
        corners = reaches[:, None] * directions - size * (1 - directions * (1, 0)) / 2
        boxes = np.concatenate([place + corners, place + corners + size], axis=1)
        inside = _common_areas(boxes, [panel.get_window_extent().extents])[:, 0]
        covered = _common_areas(boxes, taken).sum(axis=1)
        best = np.argmin(covered + 10 * (size.prod() - inside) + 4 * reaches)
        label.set_position(corners[best])
        taken.append(boxes[best])


_DIRECTIONS = [d for d in itertools.product((1, -1, 0), (0, 1, -1)) if d != (0, 0)]


def _common_areas(boxes, others) -> np.ndarray:
    """Of each box with each other one, both as (left, bottom, right, top)."""
    boxes, others = boxes[:, None], np.asarray(others)[None]
    low, high = np.maximum(boxes, others)[..., :2], np.minimum(boxes, others)[..., 2:]
    return np.prod(np.clip(high - low, 0, None), axis=-1)
