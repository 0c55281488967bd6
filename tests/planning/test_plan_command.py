"""tools/plan.py and tools/plan_table.py, as one calls them."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from lumina_jax.errors import InputError
from lumina_jax.planning import hlo, table
from tests import tiny_lumina2
from tests.planning.conftest import ENVIRONMENT, ROOT, SMALL, run_plan


def test_a_plan_says_what_holds_and_what_does_not(small_plan):
    planned, _ = small_plan
    assert planned.status == 4
    assert planned.err.strip().splitlines()[-1].startswith("train: mfu>=0.99 does not hold: it is")
    assert "peak_gib" not in planned.err
    assert planned.json["config"] == "stage1"
    assert planned.json["topology"] == "v5e:2x4"
    assert planned.json["mesh"] == {"replica": 1, "data": 8, "model": 1}
    train = planned.json["programs"]["train"]
    assert train["fits"]
    assert train["timings"].keys() == {"compile_seconds", "compile_cpu_seconds", "host_memory_gib"}
    assert f"MFU {train['numbers']['mfu']:.1%}" in planned.out
    assert "the stage  144,000 steps" in planned.out
    assert planned.out.count(" x ") >= 3  # --hottest


def test_the_numbers_of_a_plan_belong_together(small_plan):
    n = small_plan[0].json["programs"]["train"]["numbers"]
    parts = ("parameters", "average", "optimizer", "batch", "padding", "temporaries")
    assert sum(n[f"{part}_gib"] for part in parts) == pytest.approx(n["peak_gib"])
    kinds = ("dots", "reduces", "elementwise", "slices", "copies", "kernels", "waiting")
    assert sum(n[f"{kind}_seconds"] for kind in kinds) == pytest.approx(n["step_seconds"])
    assert n["roofline_mfu"] > n["mfu"] > 0
    assert n["kernels_of_unknown_tflop"] == 0
    # Nothing is computed again but projections of attention, and kernels fill 336 tokens to 384.
    assert 1 < n["flops_ratio"] < 1.25


def test_weights_are_gathered_and_scattered_and_nothing_else_travels(small_plan):
    """Goals 5 and 6 of a layout: 336 tokens, 144 of the picture and 192 of the text."""
    planned, text = small_plan
    check_layout(planned, text, lengths={336, 144, 192})


def check_layout(planned, text, lengths):
    n = planned.json["programs"]["train"]["numbers"]
    assert n["fake_gather_gb"] == 0
    assert n["score_buffers"] == 0
    program = hlo.analyze(text)
    with_tokens = [c for c in program.collectives if lengths & set(c.shape)]
    assert not with_tokens, with_tokens
    gathers = [c for c in program.collectives if c.kind == "all-gather" and c.bytes > 1e5]
    # The embedding of t is float32 by choice.
    assert {c.dtype for c in gathers if "t_embedder" not in c.op_name} == {"bf16"}
    # Two bytes of each parameter, as a ring sends them to eight chips: gathered forward and again
    # backward, scattered once; shards that do not fill tiles are filled up.
    once = 2 * (n["parameters_gib"] * 2**30 * 8 / 4) / 1e9 * 7 / 8
    assert n["ici_all_gather_gb"] < 2.1 * once
    # Kernels of modulations, a ninth of a layer of the large model, are not gathered.
    assert 2.2 * once < n["ici_gb"] < 3.35 * once


@pytest.mark.slow
def test_a_known_program_is_not_compiled_again(small_plan, tmp_path):
    (tmp_path / "known.json").write_text(json.dumps(small_plan[0].json))
    (tmp_path / "out").mkdir()
    again = run_plan(
        tmp_path / "out", *SMALL, "--topology=v5e:2x4", f"--reuse={tmp_path}",
        "--config.train.num_steps=7",
    )  # fmt: skip
    assert again.status == 0
    assert again.json["num_steps"] == 7
    train = again.json["programs"]["train"]
    assert train.pop("same_as") == "known"
    assert train == small_plan[0].json["programs"]["train"]


def test_what_does_not_fit_has_a_status_of_its_own(libtpu, tmp_path):
    planned = run_plan(
        tmp_path, *SMALL, "--topology=v5e:2x2", "--config.train.batch_size=1048576",
        "--config.model.attention=xla",
    )  # fmt: skip
    assert planned.status == 3, planned.err
    found = planned.json["programs"]["train"]
    assert not found["fits"]
    assert found["needed_gib"] > found["available_gib"] == 15.75
    assert f"train: does not fit: needs {found['needed_gib']:.2f} GiB of HBM" in planned.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v5e:2x4", "--assert=mfu=1"], "is not NAME<=NUMBER or NAME>=NUMBER"),
        (["--topology=v5e:2x4", "--sweep=remat"], "is not key=value,value"),
        (["--topology=v5e:2x4", "--sweep=a=b", "--what=encode"], "has two: sweep another"),
    ],
)
def test_wrong_input_is_told(libtpu, tmp_path, arguments, message):
    planned = run_plan(tmp_path, *SMALL, *arguments)
    assert planned.status == 2
    assert "Traceback" not in planned.err
    assert message in planned.err.strip().splitlines()[-1]


@pytest.mark.slow
def test_two_compilations_give_the_same_numbers(small_plan, tmp_path):
    again = run_plan(tmp_path, *SMALL, "--topology=v5e:2x4")
    first, second = small_plan[0].json, again.json
    for plan in (first, second):
        plan["programs"]["train"].pop("timings")
    assert first == second


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["2*v5e:2x2", "v5p:2x2x1", "v6e:2x4"])
def test_other_chips_and_several_slices(libtpu, tmp_path, topology):
    planned = run_plan(
        tmp_path, *SMALL, f"--topology={topology}", "--config.mesh.data=4",
        f"--config.mesh.replica={1 if 'v5p' in topology else 2}",
    )  # fmt: skip
    assert planned.status == 0, planned.err
    n = planned.json["programs"]["train"]["numbers"]
    assert (n["dcn_gb"] > 0) == topology.startswith("2*")
    assert n["ici_gb"] > n["dcn_gb"]
    assert n["kernels_seconds"] > 0


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="needs diffusers")
def test_the_sampler_and_the_frozen_encoders_are_planned(libtpu, tmp_path):
    folder = tiny_lumina2.save(tmp_path / "pipeline")
    of_folder = (
        "--config=configs/tiny.py", "--topology=v5e:2x2", "--config.model.patch_size=1",
        "--config.text_encoder.kind=gemma2", f"--config.text_encoder.path={folder}",
        "--config.autoencoder.kind=vae", f"--config.autoencoder.path={folder}",
    )  # fmt: skip
    sample = run_plan(tmp_path, *of_folder, "--what=sample", "--batch_size=8")
    assert sample.status == 0, sample.err
    assert sample.json["batch_size"] == 8
    n = sample.json["programs"]["sample"]["numbers"]
    # All forwards of the grid: a loop that was counted once would be far below.
    assert 0.9 < n["flops_ratio"] < 1.5
    encode = run_plan(tmp_path, *of_folder, "--what=encode", f"--hlo={tmp_path / 'e.hlo'}")
    assert encode.json["programs"].keys() == {"encode text", "encode images"}
    assert (tmp_path / "e-text.hlo").exists()
    assert (tmp_path / "e-images.hlo").exists()


@pytest.mark.slow
def test_a_sweep_ranks_what_fits(libtpu, tmp_path):
    done = run_plan(
        tmp_path, *SMALL, "--topology=v5e:2x2", "--config.model.attention=xla",
        "--sweep=train.batch_size=3,16,1048576",
    )  # fmt: skip
    assert done.status == 0, done.err
    assert "train.batch_size=3: error: train.batch_size=3 does not split" in done.out
    assert "train.batch_size=1048576: does not fit: needs" in done.out
    ranking = done.out.split("change\n")[1].splitlines()
    assert [line.split()[-1] for line in ranking] == ["train.batch_size=16"]


@pytest.mark.slow
def test_the_layout_of_the_released_width(libtpu, tmp_path):
    """Goals 5 and 6 on two layers of the 2b model; lengths that are no size of it."""
    planned = run_plan(
        tmp_path, "--config=configs/stage1.py", "--config.mesh.replica=1", "--config.mesh.data=-1",
        "--topology=v5e:2x4",
        "--config.model.num_layers=2", "--config.model.num_refiner_layers=1",
        "--config.data.resolution=192", "--config.text_encoder.max_tokens=192",
        "--config.train.batch_size=16", f"--hlo={tmp_path / 'program.hlo'}",
    )  # fmt: skip
    assert planned.status == 0, planned.err
    check_layout(planned, (tmp_path / "program.hlo").read_text(), lengths={336, 144, 192})


def made_up(config, topology, **changes):
    """A plan with the numbers that a table shows."""
    kinds = ("dots", "reduces", "elementwise", "slices", "copies", "kernels", "waiting")
    numbers = {
        "peak_gib": 14.1, "flops_ratio": 1.067, "ici_gb": 14.0, "ici_sync_gb": 3.5, "dcn_gb": 0.0,
        "step_seconds": 1.26, "mfu": 0.58, "roofline_mfu": 0.93, "images_per_second": 406.3,
        **{f"{kind}_seconds": 0.18 for kind in kinds},
    }  # fmt: skip
    return {
        "config": config, "topology": topology, "mesh": {"replica": 8, "data": 32, "model": 1},
        "batch_size": 512, "num_chips": 256, "remat": "names", "num_steps": 40_000,
        "versions": {"jax": "1", "libtpu": "2"},
        "programs": {"train": {"fits": True, "numbers": numbers} | changes},
    }  # fmt: skip


def test_the_table_goes_between_its_marks_and_can_be_renewed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"above\n\n{table.BEGIN}\nold\n{table.END}\n\nbelow\n")
    small = made_up("stage2", "v6e:8x8", fits=False, reason="needs 54.00 GiB of HBM, has 31.24 GiB")
    text = table.markdown([made_up("stage2", "v5e:16x16"), small])
    for _ in range(2):
        table.insert(page, text)
    lines = page.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("above", "below")
    rows = [line for line in lines if line.startswith("| stage2")]
    assert rows[0] == (
        "| stage2 | v5e:16x16 | 8 x 32 x 1 | 2 | names | 14.10 | 1.067 | 14.0 (75%) | – | 1.26 | "
        "58.0% | 93.0% | 406 | 0.583 | 3,584 |"
    )
    assert "does not fit: needs 54.00 GiB" in rows[1]
    assert {line.count("|") for line in lines if line.startswith("|")} == {16}
    assert "old" not in page.read_text()


def test_costs_of_all_stages_are_added_up_for_each_topology():
    plans = [made_up(stage, "v5e:16x16") for stage in ("stage1", "stage2")]
    plans += [made_up("stage1", "v6e:8x8"), made_up("stage2", "v6e:8x8", fits=False)]
    header, _, *rows = table.costs(plans).splitlines()
    assert header == "| topology | chips | stage1 | stage2 | all |"
    days, hours = 1.26 * 40_000 / 3600 / 24, 1.26 * 40_000 / 3600 * 256
    one, both = f"{days:.2f} days, {hours:,.0f}", f"{2 * days:.2f} days, {2 * hours:,.0f}"
    assert rows[0] == f"| v5e:16x16 | 256 | {one} | {one} | {both} |"
    assert rows[1] == f"| v6e:8x8 | 256 | {one} | does not fit | does not fit |"


def test_the_costs_that_are_shown_are_those_of_the_plans():
    plans = [
        json.loads((ROOT / f"docs/plans/stage{stage}-{topology}.json").read_text())
        for stage in (1, 2, 3)
        for topology in ("v5e-16x16", "2xv5e-16x16", "v5p-4x4x4", "v6e-8x8", "v6e-16x16")
    ]
    assert table.costs(plans) in (ROOT / "docs/launch.md").read_text()


def test_a_page_without_the_marks_is_told(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(table.END + table.BEGIN)
    with pytest.raises(InputError, match="must have the line <!-- plans: begin -->"):
        table.insert(page, "")


def test_the_plot_has_a_panel_for_each_stage(tmp_path):
    plans = [made_up(c, t) for c in ("stage1", "stage2") for t in ("v5e:16x16", "v6e:8x8")]
    table.plot(plans[:2], tmp_path / "one.png")
    table.plot(plans, tmp_path / "two.png")
    sizes = []
    for name in ("one", "two"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            sizes.append(picture.size)
    (width, one), (same_width, two) = sizes
    assert width == same_width
    assert two > one


@pytest.mark.slow
def test_one_command_makes_the_table_and_computes_nothing_twice(libtpu, tmp_path):
    page = tmp_path / "page.md"
    costs = tmp_path / "costs.md"
    for each in (page, costs):
        each.write_text(f"{table.BEGIN}\n{table.END}\n")
    command = [
        sys.executable, ROOT / "tools/plan_table.py", "--configs=stage2,stage3",
        "--topologies=v5e:2x2", f"--plans={tmp_path / 'plans'}", f"--page={page}",
        f"--costs_page={costs}", f"--plot={tmp_path / 'plans.png'}", "--change=model.preset=tiny",
        "--change=data.resolution=256", "--change=train.batch_size=16",
        "--change=model.attention=xla", "--change=text_encoder.max_tokens=64",
    ]  # fmt: skip
    run = dict(check=True, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT)
    subprocess.run(command, **run)
    plans = sorted((tmp_path / "plans").glob("*.json"))
    assert [path.stem for path in plans] == ["stage2-v5e-2x2", "stage3-v5e-2x2"]
    assert json.loads(plans[1].read_text())["programs"]["train"]["same_as"] == "stage2-v5e-2x2"
    assert page.read_text().count("| v5e:2x2 |") == 2
    assert "](plans.png)" in page.read_text()
    assert costs.read_text().count("| v5e:2x2 |") == 1
    made = [os.stat(path).st_mtime_ns for path in plans]
    assert "is in " in subprocess.run(command, **run).stdout
    assert [os.stat(path).st_mtime_ns for path in plans] == made
