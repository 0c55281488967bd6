"""The plot of speed and quality."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from lumina_jax.evaluation import tradeoff


def test_what_is_equal_has_a_place_too(tmp_path):
    points = [tradeoff.Point(1, 0.0, "equal", True), tradeoff.Point(2, 0.1, "other", False)]
    tradeoff.plot(tmp_path / "new" / "plot.png", {"a": points}, levels={"JPEG": 0.2}, title="b")
    with Image.open(tmp_path / "new" / "plot.png") as image:
        assert image.size == (975, 936)


def test_names_beside_points_do_not_cover_each_other():
    figure = Figure(figsize=(8, 6))
    panel = figure.subplots()
    panel.set(xlim=(0.5, 2), ylim=(0.01, 0.3))
    points = [
        tradeoff.Point(1 + 0.02 * i, 0.1 + 0.005 * i, f"setting {i}", ladder=i < 3)
        for i in range(8)
    ]
    figure.draw_without_rendering()
    tradeoff._label_points(panel, points)
    figure.draw_without_rendering()
    assert {text.get_text() for text in panel.texts} == {point.name for point in points}
    boxes = np.array([Text.get_window_extent(text).extents for text in panel.texts])
    common = tradeoff._common_areas(boxes, boxes)
    assert np.all(np.diagonal(common) > 0)
    assert np.all(common - np.diag(np.diagonal(common)) == 0)
