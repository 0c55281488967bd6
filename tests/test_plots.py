import json

import numpy as np
import pytest
from PIL import Image

from lumina_jax.errors import InputError
from lumina_jax.goodput import LOSSES
from lumina_jax.plots import _CLASS_COLOURS, loss_curve, read_metrics, smooth, speed


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_curve_of_a_run_is_a_picture(tmp_path):
    lines = [
        {"step": step, "loss": 1 / step, "learning_rate": 1e-4, "grad_norm": 0.5, "mfu": 0.4}
        | {"images_per_second": 100.0, "input_wait": 0.0}
        | {f"loss_bins/{i:02d}": 0.1 * i for i in range(20) if (i + step) % 3}
        for step in range(1, 100)
    ]
    output = tmp_path / "new" / "loss_curve.png"
    loss_curve(write(tmp_path / "metrics.jsonl", lines), output)
    with Image.open(output) as picture:
        assert picture.size == (1800, 810)
    assert list(output.parent.iterdir()) == [output]


@pytest.mark.parametrize("loss", [0.5, float("nan")])
def test_one_line_with_a_loss_is_enough(loss, tmp_path):
    path = write(tmp_path / "metrics.jsonl", [{"step": 1, "loss": loss}])
    loss_curve(path, tmp_path / "out.png")
    assert (tmp_path / "out.png").exists()


def test_a_repeated_step_counts_once_and_the_last_one_wins(tmp_path):
    lines = [{"step": s, "loss": v} for s, v in ((1, 5.0), (2, 4.0), (3, 3.0), (2, 2.0), (3, 1.0))]
    metrics = read_metrics(write(tmp_path / "metrics.jsonl", lines))
    assert metrics == {1: {"loss": 5.0}, 2: {"loss": 2.0}, 3: {"loss": 1.0}}


def test_what_is_measured_beside_a_step_joins_its_line(tmp_path):
    lines = [
        {"step": 1, "loss": 5.0}, {"step": 1, "validation_loss": 6.0}, {"step": 2, "loss": 4.0},
        {"step": 1, "loss": 5.5}, {"step": 1, "validation_loss": 6.5},
    ]  # fmt: skip
    metrics = read_metrics(write(tmp_path / "metrics.jsonl", lines))
    assert metrics == {1: {"loss": 5.5, "validation_loss": 6.5}, 2: {"loss": 4.0}}


@pytest.mark.parametrize("validates", [True, False])
def test_both_pictures_can_be_drawn_of_all_that_a_run_says_and_of_little(validates, tmp_path):
    lines = [{"step": step, "loss": 1 / step} for step in range(1, 50)]
    if validates:
        for line in lines:
            line |= {"goodput": 0.45, "images_per_second": 9.0, "step_seconds_median": 0.1}
            line |= {"step_seconds_max": 0.2, "mfu": 0.4, "input_wait": 0.1, "hbm_peak_share": 0.9}
            line |= {f"lost/{name}": 0.05 for name in LOSSES}
        lines.append({"step": 49, "validation_loss": 0.5, "validation_loss_raw": 0.6})
        lines[-1] |= {f"validation_loss/t{k}": 0.1 * k for k in range(8)}
    path = write(tmp_path / "metrics.jsonl", lines)
    for draw in (loss_curve, speed):
        draw(path, tmp_path / "out.png")
        with Image.open(tmp_path / "out.png") as picture:
            assert picture.width == 1800
            assert len(picture.getcolors(2**24)) > 50


def test_every_class_of_lost_time_has_a_colour():
    assert set(_CLASS_COLOURS) == set(LOSSES)


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    path = write(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 5.0}])
    path.write_text(path.read_text() + '{"step": 2, "lo')
    assert list(read_metrics(path)) == [1]


def test_smoothing_ignores_spikes_and_nan():
    values = np.array([1.0, 1.0, 50.0, np.nan, 1.0, 1.0])
    np.testing.assert_array_equal(smooth(values, 2), np.ones(6))
    np.testing.assert_array_equal(smooth(values, 0), values)


def test_a_missing_file_says_what_writes_it(tmp_path):
    with pytest.raises(InputError, match=r"There is no .*metrics\.jsonl\. Give the workdir"):
        loss_curve(tmp_path / "metrics.jsonl", tmp_path / "out.png")


@pytest.mark.parametrize("line", ["not json", "[1]", '{"loss": 1}', "7"])
def test_a_broken_line_is_named_by_its_number(line, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "loss": 1}}\n{line}\n')
    with pytest.raises(InputError, match=r"Line 2 of .* is not a JSON object with a step"):
        read_metrics(path)


def test_a_file_without_a_loss_is_refused(tmp_path):
    path = write(tmp_path / "metrics.jsonl", [{"step": 1, "fid": 3.0}])
    with pytest.raises(InputError, match="holds no loss yet"):
        read_metrics(path)
