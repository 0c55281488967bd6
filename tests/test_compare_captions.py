"""The runs that are compared differ in their captions alone; what is told of them is measured."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lumina_jax import plots, train
from lumina_jax.data import prepare
from lumina_jax.data.sources.openmoji import OpenMojiSource
from lumina_jax.errors import InputError
from lumina_jax.frozen.autoencoder import make_autoencoder
from lumina_jax.frozen.text_encoder import make_text_encoder
from tests import small_run
from tests.conftest import BUCKETS, EMOJIS
from tools import compare_captions

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """24 emojis with captions of all kinds."""
    directory = tmp_path_factory.mktemp("data") / "described"
    targets = prepare.make_targets(directory, [32], 4, BUCKETS)
    source = OpenMojiSource(EMOJIS, resolution=32, describe=True)
    prepare.prepare(source, directory, targets, prepare.Settings(fit="pad"))
    return str(directory)


@pytest.fixture
def configs(described):
    return compare_captions.make_configs(small_run.get_config(), described, 4, 6)


def loader_of(config):
    text_encoder = make_text_encoder(**config.text_encoder)
    return train.make_loader(config, text_encoder, make_autoencoder(**config.autoencoder))


def test_the_runs_differ_in_the_kinds_of_captions_alone(configs):
    kinds = {name: dict(config.data.kinds) for name, config in configs.items()}
    assert kinds == {
        "short": {"short": 1.0},
        "long": {"long": 1.0},
        "mixed": {"long": 1.0, "medium": 1.0, "short": 1.0, "tags": 1.0},
    }
    rest = []
    for config in configs.values():
        config = copy.deepcopy(config)
        del config.data.kinds
        rest.append(config.to_dict())
    assert rest[0] == rest[1] == rest[2]
    # Names are in 14 languages, what is measured in two: the others would be of one run only.
    assert dict(configs["short"].data.languages) == {"en": 1.0, "zh": 1.0}


def test_the_runs_take_the_same_pictures_in_the_same_order(configs):
    loaders = {name: loader_of(config) for name, config in configs.items()}
    for step in range(12):
        batches = {name: loader.batch_at(step) for name, loader in loaders.items()}
        for batch in batches.values():
            assert batch["ids"].tolist() == batches["short"]["ids"].tolist()
            np.testing.assert_array_equal(batch["images"], batches["short"]["images"])
        pairs = zip(batches["short"]["captions"], batches["long"]["captions"], strict=True)
        assert all(not short or len(long) > 2 * len(short) for short, long in pairs)


def test_no_caption_is_cut_and_all_runs_have_as_many_slots(configs, described):
    (slots,) = {config.text_encoder.max_tokens for config in configs.values()}
    assert slots % 16 == 0
    encoder = make_text_encoder("use", max_tokens=slots)
    longest = 0
    for picture in compare_captions.read_pictures(described):
        texts = [c.text for c in picture["captions"] if c.language in ("en", "zh")]
        longest = max(longest, encoder.tokenize(texts)[1].sum(axis=1).max())
    assert encoder.num_truncated == 0
    assert longest > slots - 16


def test_data_without_long_captions_is_refused(dataset):
    with pytest.raises(InputError, match=r"has no long captions; it has short\. Prepare one"):
        compare_captions.make_configs(small_run.get_config(), str(dataset), 4, 6)


def test_a_curve_ends_with_the_mean_of_its_last_tenth():
    metrics = {step: {"loss": float(step)} for step in range(1, 41)}
    metrics[41] = {"validation_loss": 1000.0}
    assert compare_captions.final_loss(metrics) == pytest.approx(38.5)


def test_the_picture_and_the_table_show_every_run(tmp_path, capsys):
    def run(loss):
        scores = {"short": 0.25, "long": 0.5}
        return {
            "loss": loss,
            "validation_loss": {"short": 0.6, "long": 0.5},
            "retrieval": {p: {"num_pictures": 8, **scores} for p in compare_captions.PARTS},
        }

    runs = {"short": run(0.4), "long": run(0.3), "mixed": run(0.35)}
    curves = {
        name: {
            step: {"loss": of_run["loss"] + 1 / step}
            | ({"validation_loss": 0.5} if step % 20 == 0 else {})
            for step in range(1, 101)
        }
        for name, of_run in runs.items()
    }
    compare_captions.plot(tmp_path / "comparison.png", curves, runs)
    with Image.open(tmp_path / "comparison.png") as picture:
        assert picture.size == (1690, 806)
    results = {"num_steps": 100, "text_slots": 96, "languages": ["en", "zh"], "runs": runs}
    compare_captions.print_results(results)
    printed = capsys.readouterr().out
    rows = [
        line.split() for line in printed.splitlines() if line.split()[:1] in ([n] for n in runs)
    ]
    scores = ["0.6000", "0.5000", "0.250", "0.500", "0.250", "0.500"]
    assert [row for row in rows if len(row) > 2] == [
        ["short", "0.4000", *scores],
        ["long", "0.3000", *scores],
        ["mixed", "0.3500", *scores],
    ]
    assert "100 steps, 96 text slots, captions in en, zh." in printed


@pytest.mark.slow
def test_three_runs_are_compared_once_and_not_trained_again(described, tmp_path):
    command = [
        sys.executable, "tools/compare_captions.py", "--config=tests/small_run.py",
        f"--data={described}", f"--output={tmp_path}", "--num_steps=4", "--num_held_out=8",
        "--num_prompts=4", "--batch_size=4",
    ]  # fmt: skip

    def compare(*more):
        return subprocess.run(
            [*command, *more], cwd=ROOT, capture_output=True, text=True, check=False
        )

    done = compare()
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["runs"]) == ["short", "long", "mixed"]
    for name, run in results["runs"].items():
        metrics = plots.read_metrics(tmp_path / name / "metrics.jsonl")
        assert list(metrics) == [1, 2, 3, 4]
        assert run["loss"] == metrics[4]["loss"]
        if name in compare_captions.ASKED:  # what the run itself measured at its end
            measured = metrics[4]["validation_loss"]
            assert run["validation_loss"][name] == pytest.approx(measured, rel=1e-5)
        assert [part["num_pictures"] for part in run["retrieval"].values()] == [8, 8]
    assert (tmp_path / "comparison.png").exists()

    logged = {name: (tmp_path / name / "metrics.jsonl").stat() for name in results["runs"]}
    again = compare()
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "results.json").read_text()) == results
    for name, before in logged.items():
        assert (tmp_path / name / "metrics.jsonl").stat().st_mtime_ns == before.st_mtime_ns

    other = compare("--num_steps=5")
    assert other.returncode == 2
    assert "holds a run of other settings: train.num_steps: 4 there, 5 here" in other.stderr
