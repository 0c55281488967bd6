"""Training with Gemma-2 and a VAE, tiny and random, read from a diffusers folder."""

import json

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

from safetensors.numpy import load_file

from lumina_jax import loop
from lumina_jax.errors import InputError
from lumina_jax.train import Trainer, train
from tests import tiny_lumina2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # Two halvings: the buckets of the data set are multiples of 8 pixels, a token is 8 of them.
    path = tmp_path_factory.mktemp("lumina2") / "pipeline"
    return tiny_lumina2.save(path, vae_channels=(8, 8, 8))


@pytest.fixture
def real_config(config, folder):
    config.text_encoder.update(kind="gemma2", path=str(folder), dtype="float32", max_tokens=24)
    config.autoencoder.update(kind="vae", path=str(folder), dtype="float32")
    config.model.patch_size = 2
    config.mesh.update(replica=1, data=4, model=2)
    return config


@pytest.mark.slow
def test_a_run_compiles_one_step_one_text_encoder_and_one_picture_encoder_a_bucket(
    real_config, tmp_path, monkeypatch
):
    """Three buckets, each met several times, on 4 x 2 devices; the frozen weights are sharded."""
    real_config.train.update(num_steps=12, checkpoint_every=12)
    trainer = Trainer(real_config, str(tmp_path))
    shapes, events = set(), []
    step, encode = trainer.step, trainer.encode

    def watched_step(*args):
        events.append("step")
        return step(*args)

    def watched_encode(host_batch, index):
        shapes.add(host_batch["images"].shape)
        events.append("encode")
        return encode(host_batch, index)

    def watched_read(report):
        if report._pending:
            events.append("read")
        read(report)

    read = loop.Report.catch_up
    monkeypatch.setattr(loop.Report, "catch_up", watched_read)
    trainer.step, trainer.encode = watched_step, watched_encode
    loop.run(trainer)
    assert len(shapes) == 3
    assert len(step.programs) == 1
    assert len(encode.encode_text.programs) == 1
    assert len(encode.encode_images.programs) == 3
    # A batch is encoded behind a step whose results nobody has asked for yet.
    assert events[:6] == ["encode", "step", "encode", "step", "read", "encode"]
    assert events[6:9] == ["step", "read", "encode"]
    q = trainer.pipeline.text_params["layers"]["attention"]["q"]["kernel"]
    assert q.sharding.shard_shape(q.shape) == (3, 40 // 4, 4 // 2, 8)
    losses = metrics_of(tmp_path)
    assert np.isfinite(losses).all()
    assert len(losses) == 12


def metrics_of(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.slow
def test_losses_agree_on_every_mesh(real_config, tmp_path):
    losses = []
    for mesh in [(1, 8, 1), (2, 2, 2), (1, 2, 4)]:
        real_config.mesh.update(dict(zip(("replica", "data", "model"), mesh, strict=True)))
        workdir = tmp_path / str(mesh)
        train(real_config, str(workdir))
        losses.append(metrics_of(workdir))
    np.testing.assert_allclose(losses[1:], [losses[0]] * 2, rtol=2e-4)


def test_released_weights_start_a_run(real_config, folder, tmp_path):
    """`init_from` takes a diffusers pipeline, and lists what does not fit."""
    with pytest.raises(InputError, match=r"is of another model: .*dim: 48 there, 64 in this run"):
        make_state(real_config, folder, tmp_path / "other")
    real_config.model.update(
        dim=48, num_layers=2, num_refiner_layers=1, num_heads=6, num_kv_heads=2, hidden_dim=192,
        axes_dims=(4, 2, 2),
    )  # fmt: skip
    state = make_state(real_config, folder, tmp_path / "run")
    theirs = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    np.testing.assert_array_equal(
        state.params["x_embedder"]["kernel"], theirs["x_embedder.weight"].T
    )
    np.testing.assert_array_equal(
        state.ema["layers"]["feed_forward"]["down"]["kernel"][1],
        theirs["layers.1.feed_forward.linear_2.weight"].T,
    )


def make_state(config, source, workdir):
    config.train.init_from = str(source)
    trainer = Trainer(config, str(workdir))
    try:
        with jax.set_mesh(trainer.mesh):
            return trainer.init_state()[0]
    finally:
        trainer.checkpointer.close()
