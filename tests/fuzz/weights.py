"""The weight readers: files of others, and the configs beside them."""

import json
import pathlib
import struct
import zipfile

import numpy as np
import torch
from hypothesis import strategies as st
from safetensors.numpy import save

from lumina_jax.frozen import autoencoder, gemma2
from lumina_jax.models.vae import VAEConfig
from lumina_jax.weights import convert, diffusers, files
from lumina_jax.weights import next_dit as names
from lumina_jax.weights.files import fingerprint, open_weights
from tests.fuzz import mutations
from tests.sampling.small_pipeline import MODEL, random_params

_ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.zeros((), np.float16),
    "c": np.ones((4,), np.int64),
    "d": np.ones((0, 3), np.uint8),
}


def _read_all(path: pathlib.Path) -> None:
    with open_weights(path) as weights:
        fingerprint(weights)
        for name, shape in weights.shapes.items():
            if weights.dtypes[name] in files.READABLE:
                found = weights.read(name, tuple(slice(0, size) for size in shape))
                assert found.shape == shape


def safetensors(folder: pathlib.Path):
    """One file, with a header of other values or with damaged bytes."""
    whole = save(_ARRAYS)
    (size,) = struct.unpack("<Q", whole[:8])
    header, data = json.loads(whole[8 : 8 + size]), whole[8 + size :]
    header["__metadata__"] = {"format": "pt"}
    path = folder / "x.safetensors"

    def joined(header: bytes, wrong: int) -> bytes:
        return struct.pack("<Q", max(0, len(header) + wrong)) + header + data

    contents = st.one_of(
        st.builds(joined, mutations.json_files([header]), st.sampled_from((0, 0, 0, 1, -1, 2**40))),
        mutations.files([whole]),
    )

    def check(content: bytes) -> None:
        path.write_bytes(content)
        _read_all(path)

    return contents, check, whole


def index(folder: pathlib.Path):
    """The index of several files in a folder; what lies above it must not be opened."""
    inner = folder / "weights"
    inner.mkdir()
    shards = {"a": "m-00001-of-00002.safetensors", "c": "m-00002-of-00002.safetensors"}
    for name, shard in shards.items():
        (inner / shard).write_bytes(save({name: _ARRAYS[name]}))
    (folder / "x").write_bytes(save({"secret": _ARRAYS["a"]}))
    (folder / "x.safetensors").write_bytes(save({"secret": _ARRAYS["a"]}))
    path = inner / "m.safetensors.index.json"
    seeds = [
        {"metadata": {"total_size": 56}, "weight_map": shards},
        {"metadata": {}, "weight_map": {"a": shards["a"], "secret": "../x.safetensors"}},
    ]

    def check(content: bytes) -> None:
        path.write_bytes(content)
        _read_all(inner)
        with open_weights(inner) as weights:
            assert "secret" not in weights.shapes

    return mutations.json_files(seeds), check, json.dumps(seeds[0]).encode()


def pth(folder: pathlib.Path):
    """A state dict of PyTorch: its pickle changed inside a sound archive, or any of its bytes."""
    path = folder / "x.pth"
    torch.save({name: torch.from_numpy(value) for name, value in _ARRAYS.items()}, path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (pickle_name,) = (name for name in members if name.endswith("data.pkl"))

    def packed(content: bytes) -> bytes:
        with zipfile.ZipFile(path, "w") as archive:
            for name, member in members.items():
                archive.writestr(name, content if name == pickle_name else member)
        return path.read_bytes()

    contents = st.one_of(
        st.builds(packed, mutations.files([members[pickle_name]])), mutations.files([whole])
    )

    def check(content: bytes) -> None:
        path.write_bytes(content)
        _read_all(path)

    return contents, check, whole


def transformer(folder: pathlib.Path):
    """config.json of a transformer beside its weights."""
    params = random_params(MODEL)
    names.save(folder / "t", params, MODEL, format="diffusers")
    path = folder / "t" / "config.json"
    seed = json.loads(path.read_text())

    def check(content: bytes) -> None:
        path.write_bytes(content)
        with names.open_transformer(folder / "t") as source:
            source.check()

    return mutations.json_files([seed, seed | {"multiple_of": 32}]), check, path.read_bytes()


def lone_transformer(folder: pathlib.Path):
    """A file whose sizes follow from its shapes."""
    params = random_params(MODEL)
    seeds = []
    for format in ("diffusers", "official", "comfyui"):
        entries = convert.entries(params, names.tensors(MODEL, format), "bfloat16")
        files.write_file(folder / "whole.safetensors", entries)
        with open_weights(folder / "whole.safetensors") as weights:
            seeds.append({name: list(shape) for name, shape in weights.shapes.items()})
    path = folder / "x.safetensors"

    def written(content: bytes) -> bytes | None:
        """A file with these shapes, all of zeros; None where there is no such file."""
        try:
            shapes = json.loads(content)
            return save({k: np.zeros(v, np.uint8) for k, v in shapes.items() if np.prod(v) < 1e6})
        except Exception:
            return None

    def check(content: bytes) -> None:
        if (made := written(content)) is None:
            return
        path.write_bytes(made)
        known = {"axes_dims": (4, 2, 2), "patch_size": 4}
        with names.open_transformer(path, **known) as source:
            source.check()

    return mutations.json_files(seeds), check, json.dumps(seeds[0]).encode()


def configs(folder: pathlib.Path):
    """The other configs of a pipeline: its index, scheduler, autoencoder, text encoder."""
    parts = {
        "model_index.json": {"_class_name": "Lumina2Pipeline"},
        "scheduler/scheduler_config.json": {
            "_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 6.0,
        },
        "transformer/config.json": {"sample_size": 128},
        "vae/config.json": VAEConfig.preset("tiny").to_json(),
        "text_encoder/config.json": {
            "model_type": "gemma2", "hidden_size": 64, "num_hidden_layers": 3, "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    }  # fmt: skip
    for name, content in parts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    (folder / "tokenizer").mkdir()
    contents = st.one_of(
        [
            st.tuples(st.just(name), mutations.json_files([content]))
            for name, content in parts.items()
        ]
    )

    def check(changed: tuple[str, bytes]) -> None:
        name, content = changed
        (folder / name).write_bytes(content)
        try:
            diffusers.sampling_section(diffusers.open_folder(str(folder)))
            autoencoder.VAE(str(folder))
            gemma2._read_config(folder / "text_encoder", dtype="float32")
        finally:
            (folder / name).write_text(json.dumps(parts[name]))

    name = "vae/config.json"
    return contents, check, (name, json.dumps(parts[name]).encode())


TARGETS = {
    "safetensors": (safetensors, 20), "index": (index, 8), "pth": (pth, 12),
    "transformer": (transformer, 3), "lone_transformer": (lone_transformer, 1),
    "configs": (configs, 8),
}  # fmt: skip
