"""Whole runs: how they are laid out and interrupted must not change what they learn."""

import json
import os
import signal

import jax
import numpy as np
import pytest
from PIL import Image

from lumina_jax import loop
from lumina_jax.data.buckets import bucket_sizes
from lumina_jax.data.captions import Caption
from lumina_jax.errors import RESTART, InputError
from lumina_jax.loop import Report
from lumina_jax.sampling.pipeline import Pipeline
from lumina_jax.train import Trainer, bucket_fault, train
from tests.small_data import make_dataset, picture


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Six uninterrupted steps on (1, 8, 1); made by the first test that needs it."""
    return tmp_path_factory.mktemp("reference"), {}


@pytest.fixture
def uninterrupted(reference, config):
    workdir, made = reference
    if not made:
        config.preview.every = 6
        made["state"] = train(config, str(workdir))
        config.preview.every = 0
    return workdir, made["state"]


@pytest.mark.parametrize(
    "mesh", [(2, 2, 2), *(pytest.param(m, marks=pytest.mark.slow) for m in [(1, 4, 2), (1, 1, 8)])]
)
def test_losses_agree_on_every_mesh(uninterrupted, config, tmp_path, mesh):
    config.mesh.update(dict(zip(("replica", "data", "model"), mesh, strict=True)))
    train(config, str(tmp_path))
    expected, found = losses(uninterrupted[0]), losses(tmp_path)
    assert found.keys() == expected.keys() == set(range(1, 7))
    np.testing.assert_allclose([*found.values()], [*expected.values()], rtol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("optim", "name", "muon"),
        ("optim", "name", "adafactor"),
        ("model", "quantization", "int8"),
    ],
)
def test_losses_of_other_settings_agree_on_every_mesh(config, tmp_path, section, key, value):
    config[section][key] = value
    runs = []
    for mesh in ((1, 8, 1), (2, 2, 2)):
        config.mesh.update(dict(zip(("replica", "data", "model"), mesh, strict=True)))
        workdir = tmp_path / "-".join(map(str, mesh))
        train(config, str(workdir))
        runs.append(losses(workdir))
    assert runs[0].keys() == runs[1].keys() == set(range(1, 7))
    np.testing.assert_allclose([*runs[1].values()], [*runs[0].values()], rtol=2e-4)


def test_the_loss_falls_and_pictures_of_the_run_are_written(uninterrupted):
    workdir, _ = uninterrupted
    values = losses(workdir)
    assert values[6] < values[1]
    with Image.open(workdir / "previews" / "0000006.png") as sheet:
        assert sheet.width > 300


def test_stop_and_resume_equals_an_uninterrupted_run_bit_for_bit(
    uninterrupted, config, tmp_path, monkeypatch
):
    """Terminated after the second step, gone on from there: same state, to the last bit."""
    read = Report.catch_up

    def read_and_terminate(report):
        if report._pending and report._pending[0] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        read(report)

    monkeypatch.setattr(Report, "catch_up", read_and_terminate)
    with pytest.raises(SystemExit) as stopped:
        train(config, str(tmp_path))
    assert stopped.value.code == RESTART
    assert max(losses(tmp_path)) < 6

    monkeypatch.undo()
    state = train(config, str(tmp_path))
    assert_equal(state, uninterrupted[1])
    assert losses(tmp_path) == losses(uninterrupted[0])


@pytest.mark.slow
def test_resume_on_another_mesh_goes_on_with_the_same_losses(uninterrupted, config, tmp_path):
    config.train.num_steps = 3
    config.optim.schedule = "constant"  # the schedule must not know where the run ends
    train(config, str(tmp_path / "whole"))
    train(config, str(tmp_path / "parts"))
    config.train.num_steps = 6
    train(config, str(tmp_path / "whole"))
    config.mesh.update(replica=2, data=2, model=2)
    train(config, str(tmp_path / "parts"))
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    np.testing.assert_allclose([*parts.values()], [*whole.values()], rtol=2e-4)


def test_a_finished_run_is_left_alone(uninterrupted, config):
    workdir, state = uninterrupted
    before = (workdir / "metrics.jsonl").read_text()
    assert_equal(train(config, str(workdir)), state)
    assert (workdir / "metrics.jsonl").read_text() == before


@pytest.mark.slow
def test_all_buckets_share_one_compiled_step(config, tmp_path):
    """Oracle of design section 3: only the small encoding program knows a picture's shape."""
    trainer = Trainer(config, str(tmp_path))
    (state, _), shapes = trainer.init_state(), set()
    key = jax.random.key(0)
    with jax.set_mesh(trainer.mesh):
        for step in range(12):
            batch = trainer.loader.batch_at(step)
            shapes.add(batch["images"].shape)
            state, _ = trainer.step(state, trainer.encode(batch, step), key)
    trainer.checkpointer.close()
    assert len(shapes) == 3
    assert len(trainer.step.programs) == 1


@pytest.mark.slow
def test_a_mixture_with_text_slots_is_trained_on_and_gone_on_with(config, tmp_path):
    """Two data sets, two numbers of text slots, so two step programs; the run stops and goes on."""
    for name in ("photos", "drawings"):
        captions = [
            Caption("a long text of many words", "long", "en"),
            Caption(name, "short", "en"),
        ]
        items = [picture(f"{name}{n}", captions=captions) for n in range(6)]
        make_dataset(tmp_path / name, items, keep_duplicates=True)
    config.data.update(
        directory="",
        datasets={
            "photos": {"directory": str(tmp_path / "photos"), "weight": 0.7},
            "drawings": {
                "directory": str(tmp_path / "drawings"), "weight": 0.3, "system_prompt": "base",
            },
        },
        kinds={"medium": 0.0, "tags": 0.0},
        text_slots={"long": 8, "short": 4},
    )  # fmt: skip
    config.optim.schedule = "constant"  # the schedule must not know where the run ends
    config.optim.warmup_steps = 0
    trainer = Trainer(config, str(tmp_path / "whole"))
    assert trainer.loader.shares == pytest.approx((0.3, 0.7))  # by the order of the names
    slots = {trainer.loader.batch_at(k)["token_mask"].shape[1] for k in range(6)}
    assert slots == {4, 8}
    assert trainer.flops({"token_mask": np.ones((1, 4))}) < trainer.flops(
        {"token_mask": np.ones((1, 8))}
    )
    state = loop.run(trainer)
    assert len(trainer.step.programs) == 2
    config.train.num_steps = 3
    train(config, str(tmp_path / "parts"))
    config.train.num_steps = 6
    (tmp_path / "photos").rename(tmp_path / "moved")
    config.data.datasets.photos.directory = str(tmp_path / "moved")  # only the content counts
    assert_equal(train(config, str(tmp_path / "parts")), state)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")

    config.data.datasets.photos.weight = 0.5
    with pytest.raises(InputError, match="weight"):
        train(config, str(tmp_path / "parts"))


@pytest.mark.slow
def test_accumulation_gives_the_same_losses(uninterrupted, config, tmp_path):
    config.mesh.update(replica=1, data=4, model=2)
    config.train.num_microbatches = 2
    train(config, str(tmp_path))
    expected = losses(uninterrupted[0])
    np.testing.assert_allclose([*losses(tmp_path).values()], [*expected.values()], rtol=2e-4)


@pytest.mark.slow
def test_the_auxiliary_loss_of_the_high_resolution_stage_runs(config, tmp_path):
    # Patches of 2 pixels, so that a quarter of each side is a whole number of patches.
    config.model.patch_size = 2
    config.train.num_steps = 2
    config.flow.update(auxiliary_weight=1.0, auxiliary_shift="own")
    train(config, str(tmp_path))
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert np.isfinite(line["auxiliary_loss"])


def test_a_stage_starts_from_the_average_of_the_stage_before(uninterrupted, config, tmp_path):
    workdir, state = uninterrupted
    config.train.update(init_from=str(workdir), num_steps=1)
    trainer = Trainer(config, str(tmp_path))
    begun, next_batch = trainer.init_state()
    trainer.checkpointer.close()
    assert_equal(begun.params, state.ema)
    assert (int(begun.step), next_batch) == (0, 0)


def test_a_stage_may_keep_the_optimizer_of_the_stage_before(
    uninterrupted, config, tmp_path, caplog
):
    """Moments and their count go on; the schedule, the step and the data begin anew."""
    workdir, state = uninterrupted
    config.train.update(
        init_from=str(workdir), init_weights="params", init_optimizer="kept", num_steps=1,
        batch_size=16,
    )  # fmt: skip
    caplog.set_level("INFO", logger="absl")
    trainer = Trainer(config, str(tmp_path))
    begun, next_batch = trainer.init_state()
    trainer.checkpointer.close()
    (_, (adam, *_, schedule)), (_, (kept, *_, fresh)) = state.opt_state, begun.opt_state
    assert_equal((begun.params, kept), (state.params, adam))
    assert (int(adam.count), int(schedule.count), int(fresh.count)) == (6, 6, 0)
    assert (int(begun.step), next_batch) == (0, 0)
    assert "step 6 of 6" in caplog.text
    assert "train.batch_size: 8 there, 16 here" in caplog.text


def test_the_pipeline_of_a_checkpoint_draws_with_the_average(uninterrupted):
    workdir, state = uninterrupted
    pipeline = Pipeline.from_checkpoint(str(workdir))
    assert_equal(pipeline.params, state.ema)
    (picture,) = pipeline("dog face")
    assert picture.size == (32, 32)


def test_losses_that_are_not_finite_end_the_run_and_are_not_saved(config, tmp_path):
    config.train.max_skipped_steps = 2
    config.optim.update(learning_rate=1e30, warmup_steps=0, grad_clip=float("inf"))
    with pytest.raises(
        InputError, match=r"2 steps up to step 3 were not .*Lower config.optim.learning_rate"
    ):
        train(config, str(tmp_path))
    assert not any((tmp_path / "checkpoints").iterdir())


def test_a_checkpoint_under_way_is_finished_when_the_run_fails(config, tmp_path):
    config.train.update(checkpoint_every=1, max_skipped_steps=2)
    config.optim.update(learning_rate=1e30, warmup_steps=0, grad_clip=float("inf"))
    with pytest.raises(InputError, match="newest checkpoint is of step 1"):
        train(config, str(tmp_path))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_a_resume_that_would_change_the_data_is_refused(uninterrupted, config):
    config.train.update(batch_size=16, num_steps=8)
    with pytest.raises(InputError, match="another data: batch_size: 8 there, 16 in this run"):
        train(config, str(uninterrupted[0]))


@pytest.mark.parametrize(("resolution", "num", "pooled"), [(256, 15, False), (1024, 51, True)])
def test_every_official_bucket_can_be_trained_on(resolution, num, pooled):
    """Also with the auxiliary loss, though most sides are no multiple of four patches."""
    slots = (resolution // 16) ** 2
    buckets = bucket_sizes(slots, 16)
    assert len(buckets) == num
    assert not any(bucket_fault(b, 8, 2, slots, pooled=pooled) for b in buckets)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"batch_size": 12}}, "batch_size=12 does not split over 8.*nearest: 8 and 16"),
        ({"train": {"num_microbatches": 3}}, "must be a multiple of 24"),
        ({"mesh": {"data": 3}}, "mesh .replica=1, data=3, model=1. does not fit"),
        ({"model": {"patch_size": 5}}, "Resolution 32 is not a multiple of 5 pixels"),
        ({"model": {"patch_size": 8, "dim": 66}}, "dim=66 is not a multiple of num_heads=8"),
        ({"data": {"buckets": ("64x16",)}}, "has no bucket 64x16; it has"),
        ({"data": {"directory": "/nowhere"}}, "/nowhere is not a finished dataset"),
        ({"data": {"resolution": 16}}, "tokens; config.data.resolution has room for 16"),
        ({"data": {"kinds": {"short": 0.0}}}, "allows none of them"),
        ({"train": {"log_every": 0}}, "train.log_every=0 must be at least 1"),
        ({"preview": {"every": 1, "prompts": ()}}, "preview.prompts is empty"),
        ({"sampling": {"height": 30}}, "height=30 is not a multiple of 4 pixels"),
        ({"flow": {"time_shift": 0.0}}, "flow.time_shift=0.0 must be positive"),
        ({"data": {"directory": ""}}, "config.data.datasets name 0 data set"),
        ({"data": {"directory": "", "datasets": {"x": 1}}}, "datasets.x=1 is no section"),
        ({"train": {"max_skipped_steps": 0}}, "train.max_skipped_steps=0 must be at least 1"),
        ({"train": {"if_damaged": "newest"}}, "if_damaged='newest' is not one of stop, previous"),
        ({"train": {"keep_best_checkpoints": 1}}, "needs a validation loss of each checkpoint"),
        ({"flow": {"auxiliary_shift": "other"}}, "auxiliary_shift='other' is not main or own"),
        ({"flow": {"time_distribution": "beta"}}, "time_distribution='beta' is not one of"),
        ({"flow": {"auxiliary_weight": 1.0}}, "has 6 x 10 pooled latents, which do not cut"),
        ({"text_encoder": {"kind": "bert"}}, "'bert'"),
        ({"autoencoder": {"kind": "jpeg"}}, "autoencoder.kind='jpeg' is not one of pixels"),
        ({"train": {"init_weights": "raw"}}, "init_weights='raw' is not one of ema, params"),
        ({"train": {"init_optimizer": "old"}}, "init_optimizer='old' is not one of fresh, kept"),
        ({"train": {"init_optimizer": "kept"}}, "init_optimizer=kept needs train.init_from"),
        ({"model": {"preset": "1b"}}, "'1b' is not one of tiny, 2b"),
    ],
)
def test_a_run_that_cannot_work_is_refused_before_it_starts(config, tmp_path, changes, message):
    for section, values in changes.items():
        config[section].update(values)
    with pytest.raises(InputError, match=message):
        Trainer(config, str(tmp_path))
