"""A dry run finds every fault at once, and leaves nothing behind."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from lumina_jax import disk, doctor, findings
from lumina_jax.checkpoint import Checkpointer
from lumina_jax.data.records import Manifest, Record, Records
from lumina_jax.findings import ERROR, NOT_CHECKED, OK, WARNING
from lumina_jax.lease import Lease
from lumina_jax.models import vae
from lumina_jax.models.vae import VAEConfig
from lumina_jax.weights import vae as vae_weights
from tests import small_run
from tests.small_data import damage, free_address

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def config(dataset):
    config = small_run.get_config()
    config.data.directory = str(dataset)
    return config


def examine(config, workdir):
    """All checks but the last, which compiles: (check, level) -> text."""
    found = findings.examine(doctor.CHECKS, doctor.Parts(config, str(workdir)))
    texts = {}
    for each in found:
        texts.setdefault((each.check, each.level), []).append(each.text)
    return {key: "\n".join(lines) for key, lines in texts.items()}


def squeezed(text):
    """Without blanks: a long word is broken where the column ends."""
    return "".join(text.split())


def levels(found):
    return {level for _, level in found}


def tree(folder):
    """Every file below, and when it was changed."""
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


def save_checkpoint(config, workdir, step=3):
    """What the run would have written, with zeros."""
    parts = doctor.Parts(config, str(workdir))
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), parts.state)
    checkpointer = Checkpointer(str(workdir), keep_latest=9, keep_every=0)
    checkpointer.save(state, step, parts.meta)
    checkpointer.close()


def test_a_run_that_is_well_passes_and_nothing_is_written(config, tmp_path, capsys):
    before = tree(tmp_path)
    assert doctor.dry_run(config, str(tmp_path / "run")) == 0
    assert tree(tmp_path) == before
    report = capsys.readouterr().out
    assert "0 error(s)" in report
    assert "the run can start" in report
    for told in (
        "6 steps of 8 pictures",
        "8 device(s) of kind cpu",
        "mesh replica 1 x data 8 x model 1",
        "24 records in 3 bucket(s)",
        "a record of each of 3 bucket(s) was read and decoded",
        "a fresh model",
        "the step of 8 text slots was compiled",
    ):
        assert squeezed(told) in squeezed(report)


def test_a_run_that_would_go_on_is_left_as_it_is(config, tmp_path):
    save_checkpoint(config, tmp_path)
    before = tree(tmp_path)
    found = examine(config, tmp_path)
    assert "goes on from step 3 of 6" in found["start", OK]
    assert ERROR not in levels(found)
    assert tree(tmp_path) == before
    config.train.num_steps = 3
    # The schedule of the learning rate ends elsewhere; the step is all that counts here.
    assert "there is nothing to do" in examine(config, tmp_path)["start", WARNING]


def test_a_workdir_of_another_run_is_told_of_as_by_the_run_itself(config, tmp_path):
    save_checkpoint(config, tmp_path)
    config.train.batch_size = 16
    assert (
        "another data: batch_size: 8 there, 16 in this run"
        in (examine(config, tmp_path)["start", ERROR])
    )
    config.model.num_layers = 3
    assert (
        "another model: num_layers: 2 there, 3 in this run"
        in (examine(config, tmp_path)["start", ERROR])
    )


def test_all_faults_of_a_run_are_in_one_report(config, tmp_path, monkeypatch, capsys):
    # The stage before has another model.
    save_checkpoint(config, tmp_path / "before")
    config.model.num_layers = 3
    config.train.init_from = str(tmp_path / "before")
    # The autoencoder has weights of other shapes than its config says.
    cfg = vae_config()
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), vae.abstract_params(cfg))
    vae_weights.save(tmp_path / "vae", cfg, params)
    said = json.loads((tmp_path / "vae" / "config.json").read_text())
    said["block_out_channels"] = [2 * n for n in said["block_out_channels"]]
    (tmp_path / "vae" / "config.json").write_text(json.dumps(said))
    config.autoencoder.update(kind="vae", path=str(tmp_path / "vae"))
    # Numbers, data, workdir and disk.
    config.train.update(batch_size=12, log_every=0)
    config.sampling.solver = "magic"
    config.flow.auxiliary_shift = "other"
    config.data.directory = str(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: full)

    assert doctor.dry_run(config, str(tmp_path / "file" / "run")) == 2
    report = squeezed(capsys.readouterr().out)
    for fault in (
        "train.log_every=0 must be at least 1",
        "solver='magic'",
        "auxiliary_shift='other' is not main or own",
        "train.batch_size=12 does not split over 8",
        "nothing is not a finished dataset",
        "mis-shaped",
        "is of another model: num_layers: 2 there, 3 in this run",
        "Not even two fit",
        "cannot be written to",
    ):
        assert squeezed(fault) in report
    assert squeezed("the run would fail") in report


def vae_config():
    return VAEConfig(
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=3, norm_num_groups=4
    )


def test_a_disk_with_room_for_some_of_the_checkpoints_is_a_warning(config, tmp_path, monkeypatch):
    size = disk.checkpoint_bytes(doctor.Parts(config, str(tmp_path)).state)
    config.train.update(num_steps=9, checkpoint_every=1, keep_checkpoints=5)
    room = shutil.disk_usage(tmp_path)._replace(free=int(2.5 * size))
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: room)
    found = examine(config, tmp_path)
    assert "up to 6 lie side by side" in found["disk", WARNING]
    assert ("disk", ERROR) not in found


def test_a_workdir_that_a_run_holds_is_an_error(config, tmp_path):
    with Lease(tmp_path):
        assert f"process {os.getpid()}" in examine(config, tmp_path)["lock", ERROR]
    assert "nobody holds" in examine(config, tmp_path)["lock", OK]


def test_what_is_not_fetched_yet_is_a_warning_and_is_not_fetched(config, tmp_path, monkeypatch):
    import huggingface_hub

    def asked(name, *, local_files_only, **_):
        assert local_files_only
        raise huggingface_hub.errors.LocalEntryNotFoundError(name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", asked)
    config.text_encoder.update(kind="gemma2", path="nobody/nothing")
    found = examine(config, tmp_path)
    assert "nobody/nothing is no folder here" in found["text encoder", WARNING]
    assert found["data", NOT_CHECKED] == "the rest, because of what is said under 'text encoder'"
    assert "24 records" in found["data", OK]  # which needs no text encoder
    assert ERROR not in levels(found)


def test_thin_buckets_and_missing_languages_are_warnings(config, tmp_path):
    config.train.batch_size = 16
    config.data.languages = {"en": 0.5, "tlh": 0.5}
    found = examine(config, tmp_path)["data", WARNING]
    assert "have fewer records than the batch of 16" in found
    assert "has no captions of languages tlh" in found


def test_a_damaged_record_is_a_warning(config, dataset, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    split = Manifest.load(copy).splits[0]
    damage(copy, [Record(Records(copy, split)[0]).id])
    config.data.directory = str(copy)
    found = examine(config, tmp_path)
    assert f"record 0 of bucket {split.bucket} cannot be read" in found["data", WARNING]
    assert ERROR not in levels(found)


def test_every_data_set_of_a_mixture_is_looked_at(config, dataset, tmp_path):
    config.data.update(
        directory="",
        datasets={
            "here": {"directory": str(dataset)},
            "one": {"directory": str(tmp_path / "one")},
            "two": {"directory": str(tmp_path / "two")},
        },
    )
    found = examine(config, tmp_path)
    assert "24 records" in found["data", OK]
    assert f"{tmp_path / 'one'} is not a finished dataset" in found["data", ERROR]
    assert f"{tmp_path / 'two'} is not a finished dataset" in found["data", ERROR]


def test_a_step_that_no_device_has_room_for_is_an_error(config, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "host_memory", lambda: (2**20, 2**20))
    found = findings.examine({"memory": doctor.check_memory}, doctor.Parts(config, str(tmp_path)))
    assert found[-1].level == ERROR
    assert "a device has 128.0 KiB" in found[-1].text
    assert "num_microbatches" in found[-1].text


def start(dataset, workdir, *flags, **environment):
    command = [
        sys.executable, "-m", "lumina_jax.train", "--config=configs/tiny.py",
        f"--workdir={workdir}", f"--config.data.directory={dataset}",
        "--config.model.num_layers=1", "--config.model.num_refiner_layers=1",
        "--config.train.num_steps=2", "--config.preview.every=0", *flags,
    ]  # fmt: skip
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **environment}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.mark.slow
def test_the_run_finds_the_step_that_its_dry_run_compiled(dataset, tmp_path):
    environment = {"JAX_NUM_CPU_DEVICES": "1", "JAX_COMPILATION_CACHE_DIR": ""}
    dry = start(dataset, tmp_path, "--dry_run", **environment)
    report, _ = dry.communicate(timeout=300)
    assert dry.returncode == 0, report
    assert "the run will not wait for it again" in " ".join(report.split())
    assert [path.name for path in tmp_path.iterdir()] == ["compiled"]
    run = start(dataset, tmp_path, **environment)
    log, _ = run.communicate(timeout=300)
    assert run.returncode == 0, log
    assert "1 read untraced" in log


@pytest.mark.slow
def test_of_two_processes_the_one_without_data_is_named(dataset, tmp_path):
    together = {
        "JAX_COORDINATOR_ADDRESS": free_address(), "JAX_NUM_PROCESSES": "2",
        "JAX_NUM_CPU_DEVICES": "1",
    }  # fmt: skip
    processes = [
        start(directory, tmp_path / "run", "--dry_run", **together, JAX_PROCESS_ID=str(number))
        for number, directory in enumerate((dataset, tmp_path / "nothing"))
    ]
    report, log = (process.communicate(timeout=300)[0] for process in processes)
    assert [process.returncode for process in processes] == [2, 2], (report, log)
    for told in (
        f"process 1 ({socket.gethostname()}): {tmp_path / 'nothing'} is not a finished dataset",
        "24 records in 3 bucket(s)",  # of process 0
        "1 error(s)",
        "all of them see what is written in",
    ):
        assert squeezed(told) in squeezed(report)
    assert "is not a finished dataset" not in log
