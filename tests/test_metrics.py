"""Scalars over several steps, and files that other programs can read."""

import json

import jax
import numpy as np
import pytest
from tensorboardX import summary
from tensorboardX.proto import event_pb2

from lumina_jax import metrics


def step_metrics(loss, bin_index):
    sums, counts = np.zeros(20), np.zeros(20)
    sums[bin_index], counts[bin_index] = 4 * loss, 4
    return {
        "loss": np.float32(loss), "grad_norm": np.float32(1), "applied": np.True_,
        "loss_bins_sum": sums, "loss_bins_count": counts,
    }  # fmt: skip


def test_a_line_averages_its_steps_and_leaves_out_empty_bins(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    meter = metrics.Meter(batch_size=4, peak=1e9)
    meter.add(step_metrics(1.0, 0), 3e9)
    meter.add(step_metrics(3.0, 0), 2e9)
    meter.add(step_metrics(5.0, 19), 4e9)
    meter.add_input_wait(3.0)
    meter.exclude(2.0)
    now[0] = 14.0
    scalars = meter.flush()
    assert scalars == pytest.approx(
        {
            "loss": 3.0,
            "grad_norm": 1.0,
            "loss_bins/00": 2.0,
            "loss_bins/19": 5.0,
            "steps_per_second": 0.25,
            "images_per_second": 1.0,
            "mfu": 0.75,
            "input_wait": 0.25,
            "slow_steps": 0,
        }
    )


def test_lines_of_a_resumed_run_follow_those_before(tmp_path):
    for step in (10, 20):
        writer = metrics.Writer(str(tmp_path))
        writer.scalars(step, {"loss": 1 / 3})
        writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 10, "loss": 0.333333}, {"step": 20, "loss": 0.333333}]


def tags_of(path):
    """The newest step of each name in a file of events."""
    content, tags, start = path.read_bytes(), {}, 0
    while start < len(content):  # length, its checksum, an event, its checksum
        length = int.from_bytes(content[start : start + 8], "little")
        event = event_pb2.Event.FromString(content[start + 12 : start + 12 + length])
        tags |= {value.tag: event.step for value in event.summary.value}
        start += 12 + length + 4
    return tags


def test_tensorboard_finds_scalars_and_pictures(tmp_path):
    writer = metrics.Writer(str(tmp_path))
    writer.scalars(5, {"loss": 0.5})
    writer.image(5, "preview", np.zeros((4, 6, 3), np.uint8))
    writer.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    assert tags_of(path) == {"loss": 5, "preview": 5}


def test_tensorboard_that_cannot_be_written_ends_nothing_and_goes_on(tmp_path, caplog):
    folder = tmp_path / "tensorboard"
    folder.write_text("no folder")
    writer = metrics.Writer(str(tmp_path))
    writer._board = metrics._Board(str(folder), flush_every=0.0)  # which tries again at once
    for step in range(1, 100):  # more than a queue holds
        writer.scalars(step, {"loss": 0.5})
    assert "lacks what could not be written" in caplog.text
    folder.unlink()
    writer.scalars(100, {"loss": 0.5})
    writer.close()
    (path,) = folder.iterdir()
    assert tags_of(path) == {"loss": 100}
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 100


def test_a_file_of_tensorboard_does_not_grow_for_ever(tmp_path):
    board = metrics._Board(str(tmp_path), max_bytes=10_000)
    noise = np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)
    for step in range(10):
        board.add(step, summary.image("preview", noise, dataformats="HWC"))
    board.close()
    paths = sorted(tmp_path.iterdir())
    assert [tags_of(path) for path in paths] == [{"preview": 3}, {"preview": 7}, {"preview": 9}]


def test_an_unknown_device_has_its_peak_measured():
    peak = metrics.peak_flops(jax.devices()[0])
    assert 1e8 < peak < 1e13
