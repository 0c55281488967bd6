"""The benchmark of the sampler: its rows and sums with a stand-in for the model, then as a user."""

import collections
import json
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest
from PIL import Image

from lumina_jax.errors import InputError
from lumina_jax.sampling.caching import Record
from lumina_jax.sampling.sampler import SamplerConfig, Trace
from tools import benchmark_sampling
from tools.benchmark_sampling import Bench, make_rows

ROOT = pathlib.Path(__file__).parents[1]
DEFAULTS = dict(
    num_steps=30, guidance_scale=4.0, guidance_truncation=1.0, guidance_renorm=1.0,
    semantics="diffusers", solver="euler", time_shift=6.0,
)  # fmt: skip
ROWS = {
    row.name: row for row in make_rows("all", dpm_steps=20, cache_threshold=0.1, merge_ratio=0.25)
}


class StandIn:
    """Draws plain pictures that tell the seed, the prompt and the number of evaluations."""

    defaults = SamplerConfig(**DEFAULTS)

    def __init__(self):
        self.calls = []

    def settings(self, **given):
        given = {name: value for name, value in given.items() if value is not None}
        return SamplerConfig(**{**DEFAULTS, **given})

    def path(self, height, width, config):
        return config.path(height * width // 256, 26)

    system_prompt = "empty"

    def caption_slots(self, prompts, negatives, system_prompt, semantics):
        assert set(negatives) == {""}
        return [(len(prompt), 1) for prompt in prompts]

    def flops(self, height, width, config, *, slots, trace):
        """Ten for each evaluation, and one for each slot of a caption."""
        return 10 * self.path(height, width, config).num_evaluations + slots[0]

    def __call__(self, prompts, *, seed, height, width, output, trace, **settings):
        assert output == "uint8"
        assert trace
        path = self.path(height, width, self.settings(**settings))
        num, evaluations = len(prompts), path.num_evaluations
        self.calls.append((tuple(prompts), tuple(seed)))
        images = np.zeros((num, height, width, 3), np.uint8)
        images[..., 0] = 10 * np.reshape(seed, (num, 1, 1))
        images[..., 1] = np.reshape([len(prompt) for prompt in prompts], (num, 1, 1))
        images[..., 2] = evaluations
        if path.numbers.cache is None:
            return images, None

        def record(length):  # each picture alone would need one evaluation in `num`
            computed = np.arange(length)[:, None] % (2 * num) == np.arange(num)
            return Record(computed, computed * 0.0, computed * 0.0)

        return images, Trace(record(evaluations), record(path.program.num_guided))


def bench(num_batches=2, batch_size=2, **baseline):
    return Bench(
        StandIn(), {**benchmark_sampling.BASELINE, **baseline}, ["a", "bb", "ccc"],
        height=16, width=32, batch_size=batch_size, num_batches=num_batches,
    )  # fmt: skip


def test_the_ladder_does_what_the_paper_counts():
    """Passes of the released settings: 68, 57 and, with twenty steps of DPM, 34."""
    rows = make_rows("ladder", dpm_steps=20, cache_threshold=0.1, merge_ratio=0.25)
    assert [row.needed for row in rows] == [0, 1.18, 1.5, 1.2, 0, 1.2]
    assert [row.over for row in rows[:-1]] == [None, *(row.name for row in rows[:-2])]
    assert rows[-1].over == rows[-3].over
    assert [bench().draw(row.changes).passes for row in rows[:3]] == [68, 57, 34]
    for below, above in zip(rows[1:-1], rows, strict=False):
        assert below.changes.items() > above.changes.items()


def test_every_other_row_is_one_step_from_a_row_that_is_there():
    assert len(ROWS) == len({str((row.changes, row.all_slots)) for row in ROWS.values()})
    for row in ROWS.values():
        if row.over is not None:
            assert row.changes.items() >= ROWS[row.over].changes.items()
    for name in ("DPM, 20 steps", "Euler, 20 steps", "midpoint, 11 points"):
        assert bench().path(ROWS[name].changes).num_evaluations == 20


def test_passes_with_a_cache_are_those_that_any_picture_of_the_batch_needs():
    # Of 34 evaluations with guidance two pictures need 2 of each 4 in turn, one of 1 needs 1 of 2.
    assert bench().draw({"cache_threshold": 0.1}).passes == 2 * 18
    assert bench(batch_size=1).draw({"cache_threshold": 0.1}).passes == 2 * 17


def test_batches_repeat_and_prompts_and_seeds_can_be_exchanged():
    made = bench()
    first, _ = made.batch(0, {})
    np.testing.assert_array_equal(made.batch(2, {})[0], first)
    made.batch(1, {}, prompt_offset=1, seed_offset=100)
    assert made.pipeline.calls == [
        (("a", "bb"), (0, 1)), (("a", "bb"), (0, 1)), (("a", "a"), (102, 103)),
    ]  # fmt: skip


def test_all_slots_are_asked_for_where_a_row_says_so():
    from lumina_jax.sampling import pipeline

    seen = []
    made = bench(num_batches=1)
    draw = made.pipeline.__call__
    made.pipeline = types.SimpleNamespace(path=made.pipeline.path, settings=made.pipeline.settings)
    made.pipeline = lambda *args, **named: (
        seen.append(pipeline.caption_slots(40)) or draw(*args, **named)
    )
    made.batch(0, {}, all_slots=True)
    made.batch(0, {})
    assert seen[0] > 10_000
    assert seen[1] == 64


def test_everyone_begins_a_round_in_turn():
    order = []
    programs = {name: (lambda turn, name=name: order.append((turn, name))) for name in "abcd"}
    rounds = list(benchmark_sampling.take_turns(programs, 4))
    assert [name for _, name in order] == [*"abcd", *"bcda", *"cdab", *"dabc"]
    assert all(set(seconds) == set("abcd") for seconds in rounds)
    assert collections.Counter(turn for turn, _ in order) == {0: 4, 1: 4, 2: 4, 3: 4}


def result(name, needed, steps):
    return {"name": name, "needed": needed, "steps": steps}


def test_a_rung_that_gains_too_little_is_told(capsys):
    results = [
        result("base", 0.0, []), result("first", 1.18, [1.1, 1.2, 1.3]),
        result("second", 1.5, [1.4, 1.6, 1.4]),
    ]  # fmt: skip
    assert benchmark_sampling.check_ladder(results) == ["second"]
    told = capsys.readouterr().out
    assert "first: 1.20 times as fast as the rung above, at least 1.18" in told
    assert "second: 1.40 times as fast as the rung above, LESS THAN 1.5" in told


def test_equal_pictures_are_equal_only_if_most_are():
    def likeness(*psnr):
        return {"psnr": psnr, "ssim": [1.0, 0.9], "features": [0.0, 0.25]}

    assert benchmark_sampling.likeness_cells(likeness(None, None)) == ["equal", "0.900", "0"]
    assert benchmark_sampling.likeness_cells(likeness(None, 31.23))[0] == "31.2"


@pytest.fixture(scope="module")
def measured():
    """All rows with the stand-in; the network of the features is not asked."""
    pytest.importorskip("skimage")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            benchmark_sampling.similarity, "features",
            lambda images: [(images / 255).astype(np.float32)],
        )  # fmt: skip
        made, rows = bench(), list(ROWS.values())
        results, images = benchmark_sampling.draw_all(made, rows)
        yardsticks, limit = benchmark_sampling.measure_quality(made, rows, results, images)
        benchmark_sampling.measure_speed(made, rows, results, rounds=3)
    return results, yardsticks, limit | images


def test_rows_are_compared_with_the_baseline_and_with_both_limits(measured):
    results, yardsticks, shown = measured
    by_name = {entry["name"]: entry for entry in results}
    # Blue of the stand-in's pictures is the number of evaluations: 34, 20 and, at the limit, 136.
    expected = {name: 10 * np.log10(255**2 / (x**2 / 3)) for name, x in (("b", 14), ("l", 116))}
    dpm = by_name["DPM, 20 steps"]
    assert dpm["baseline"]["psnr"] == pytest.approx([expected["b"]] * 4)
    assert dpm["limit"]["psnr"] == dpm["own"]["psnr"] == pytest.approx([expected["l"]] * 4)
    assert results[0]["baseline"]["psnr"] == [None] * 4
    assert list(shown) == ["limit: midpoint, 69 points", *by_name]
    assert yardsticks["the limit"]["psnr"] == results[0]["limit"]["psnr"]
    assert {"another seed", "another prompt, the same noise"} < set(yardsticks)
    json.dumps(results, allow_nan=False)


def test_times_and_ratios_are_those_of_each_round(measured):
    results, _, _ = measured
    by_name = {entry["name"]: entry for entry in results}
    assert results[0]["speed_ups"] == [1, 1, 1]
    assert "steps" not in results[0]
    for entry in results[1:]:
        above = by_name[entry["over"]]["seconds"]
        ratios = [a / b for a, b in zip(above, entry["seconds"], strict=True)]
        assert entry["steps"] == pytest.approx(ratios)


def test_table_plot_and_sheet_show_every_row(measured, tmp_path):
    results, yardsticks, shown = measured
    table = benchmark_sampling.markdown(results).splitlines()
    assert len(table) == 2 + len(results)
    assert len({line.count("|") for line in table}) == 1
    assert "| 34 | 57 | 1.000 |" in table[3]
    assert "| 20 | 34 | 0.591 |" in table[4]  # 202.5 of 342.5: captions of two and three slots
    benchmark_sampling.plot(results, yardsticks, "title", tmp_path / "plot.png")
    benchmark_sampling.draw_sheet(results, shown, "title", tmp_path / "sheet.png")
    for name in ("plot.png", "sheet.png"):
        with Image.open(tmp_path / name) as image:
            assert min(image.size) > 400


def test_without_quality_the_table_has_times_alone():
    made, rows = bench(), list(ROWS.values())[:3]
    results, images = benchmark_sampling.draw_all(made, rows)
    benchmark_sampling.measure_speed(made, rows, results, rounds=1)
    heads = benchmark_sampling.markdown(results).splitlines()[0]
    assert heads == "| setting | evaluations | passes | FLOPs | seconds | speed-up | step |"
    assert list(images) == [row.name for row in rows]


def test_both_sides_draw_on_the_same_kind_of_device():
    def torch(has_gpu):
        cuda = types.SimpleNamespace(is_available=lambda: has_gpu)
        return types.SimpleNamespace(cuda=cuda, __version__="2.13.0")

    assert benchmark_sampling.torch_device(torch(False), "auto") == "cpu"
    assert benchmark_sampling.torch_device(torch(True), "cpu") == "cpu"
    with pytest.raises(InputError, match=r"torch has a GPU here and JAX has not.*--device=cpu"):
        benchmark_sampling.torch_device(torch(True), "auto")


def run(*arguments):
    return subprocess.run(
        [sys.executable, "tools/benchmark_sampling.py", *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parity
def test_the_ladder_is_measured_from_random_weights(tmp_path):
    for package in ("diffusers", "skimage", "efficientnet_lite_pytorch"):
        pytest.importorskip(package)
    done = run(
        "accelerations", "--size=tiny", "--side=32", "--rows=ladder", "--num_pictures=1",
        "--rounds=1", "--dpm_steps=4", f"--output={tmp_path}", "--device=cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "accelerations.json").read_text())
    assert [row["passes"] for row in found["rows"][:3]] == [68, 57, 7]
    assert found["rows"][1]["own"]["psnr"][0] > found["rows"][1]["limit"]["psnr"][0]
    assert found["command"].endswith("--device=cpu")
    assert {path.name for path in tmp_path.iterdir()} == {
        "accelerations.md", "accelerations.json", "accelerations.png", "pictures.png",
    }  # fmt: skip
    assert (tmp_path / "accelerations.md").read_text().strip() in done.stdout


@pytest.mark.slow
@pytest.mark.parity
def test_ours_and_diffusers_draw_the_same_and_are_compared(tmp_path):
    pytest.importorskip("diffusers")
    done = run(
        "diffusers", "--size=tiny", "--side=64", "--num_steps=4", "--rounds=3",
        "--guidance_truncation=0.5", f"--output={tmp_path}", "--device=cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "diffusers.json").read_text())
    assert found["psnr"][0] is None or found["psnr"][0] > 50
    assert len(found["ratios"]) == 3
    assert "median ratio" in done.stdout
