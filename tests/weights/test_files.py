"""Files of others: read in parts, written one tensor at a time, never executed."""

import argparse
import json
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lumina_jax.errors import InputError
from lumina_jax.weights.files import (
    Entry,
    fingerprint,
    local_folder,
    open_weights,
    part_of,
    write_file,
    write_folder,
)

RNG = np.random.default_rng(0)
ARRAYS = {
    "matrix": RNG.normal(size=(6, 5)).astype(np.float32),
    "half": RNG.normal(size=(4, 3)).astype(ml_dtypes.bfloat16),
    "vector": RNG.normal(size=7).astype(np.float32),
    "kernel": RNG.normal(size=(4, 3, 2, 2)).astype(np.float32),
    "number": np.array(3.0, np.float32),
}


def entries(arrays=ARRAYS):
    return [
        Entry(name, value.shape, str(value.dtype), lambda value=value: value)
        for name, value in arrays.items()
    ]


def everything(shape):
    return tuple(slice(0, size) for size in shape)


def read_all(weights):
    return {name: weights.read(name, everything(shape)) for name, shape in weights.shapes.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)


def test_the_safetensors_library_reads_what_is_written_here(tmp_path):
    write_file(tmp_path / "x.safetensors", entries())
    assert_same(load_file(tmp_path / "x.safetensors"), ARRAYS)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_what_the_safetensors_library_writes_is_read_here(tmp_path):
    save_file(ARRAYS, tmp_path / "x.safetensors")
    with open_weights(tmp_path / "x.safetensors") as weights:
        assert weights.dtypes["half"] == "bfloat16"
        assert_same(read_all(weights), ARRAYS)


def test_part_of_a_tensor_is_read(tmp_path):
    write_file(tmp_path / "x.safetensors", entries())
    with open_weights(tmp_path) as weights:
        part = weights.read("matrix", (slice(1, 3), slice(2, 5)))
    np.testing.assert_array_equal(part, ARRAYS["matrix"][1:3, 2:5])


def test_a_large_file_becomes_shards_with_an_index(tmp_path):
    write_folder(tmp_path, "model", entries(), max_shard_bytes=200)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    index = json.loads((tmp_path / names[-1]).read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in ARRAYS.values())
    with open_weights(tmp_path) as weights:
        assert_same(read_all(weights), ARRAYS)
    (tmp_path / names[1]).unlink()
    with pytest.raises(
        InputError, match=r"lacks model-00002-of-00002\.safetensors, named by model"
    ):
        open_weights(tmp_path)


def test_a_pth_file_goes_there_and_back(tmp_path):
    torch = pytest.importorskip("torch")
    write_file(tmp_path / "x.pth", entries())
    assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]
    theirs = torch.load(tmp_path / "x.pth", weights_only=True)
    np.testing.assert_array_equal(theirs["matrix"].numpy(), ARRAYS["matrix"])
    assert theirs["half"].dtype == torch.bfloat16
    with open_weights(tmp_path / "x.pth") as weights:
        assert_same(read_all(weights), ARRAYS)


class Trap:
    """Unpickled by a loader that obeys, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_is_refused_and_not_executed(tmp_path):
    torch = pytest.importorskip("torch")
    trap = {"layers.0.attention.qkv.weight": Trap(tmp_path / "executed")}
    torch.save(trap, tmp_path / "zip.pth")
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(trap))
    torch.save(argparse.Namespace(model="2b"), tmp_path / "model_args.pth")
    for name in ("zip.pth", "bare.pth", "model_args.pth"):
        with pytest.raises(InputError, match="not a plain archive of tensors, and nothing else"):
            open_weights(tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_a_state_dict_with_something_else_in_it_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"weight": torch.ones(2), "epoch": 3}, tmp_path / "x.pth")
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    for name, odd in (("x.pth", "'epoch'"), ("list.pth", "''")):
        with pytest.raises(InputError, match=f"is not a state dict: {odd} is no tensor"):
            open_weights(tmp_path / name)


def test_a_damaged_file_is_refused(tmp_path):
    write_file(tmp_path / "x.safetensors", entries())
    content = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(content[:-9])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        open_weights(tmp_path / "x.safetensors")


def test_a_failure_while_writing_leaves_nothing(tmp_path):
    def fail():
        raise OSError("disk full")

    for name in ("x.safetensors", "x.pth"):
        if name.endswith("pth"):
            pytest.importorskip("torch")
        with pytest.raises(OSError, match="disk full"):
            write_file(tmp_path / name, [*entries(), Entry("last", (1,), "float32", fail)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "No file or folder at"),
        ("gs://bucket/x.safetensors", "is not on a local disk"),
        ("x" * 5000, "No file or folder at"),  # found by fuzzing
        ("x.bin", "not a folder with safetensors, and its suffix is not"),
        ("", "must hold one .safetensors file, or several with one"),
    ],
)
def test_a_path_that_cannot_be_read_is_refused(tmp_path, path, message):
    (tmp_path / "x.bin").touch()
    with pytest.raises(InputError, match=message):
        open_weights(path if "://" in path else tmp_path / path)


def test_a_name_that_is_neither_here_nor_on_the_hub_is_refused(tmp_path, monkeypatch):
    import huggingface_hub

    def offline(name, **_):
        raise ConnectionError(f"cannot reach the hub for {name}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(InputError, match=r"'team/model' is no local folder.*cannot reach the hub"):
        local_folder("team/model")
    with pytest.raises(InputError, match="No file or folder at"):
        local_folder(str(tmp_path / "missing"))


def test_a_part_that_a_repository_of_the_hub_lacks_is_looked_for_at_its_root(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def fetch(name, *, allow_patterns):
        asked.append(allow_patterns)
        root = tmp_path / "snapshot"
        if "config.json" in allow_patterns or "*.json" in allow_patterns:
            root.mkdir()
        return str(root)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert part_of("google/gemma-2-2b", "text_encoder") == tmp_path / "snapshot"
    assert asked[0] == ["text_encoder/*"]
    (tmp_path / "snapshot" / "vae").mkdir()
    assert part_of("google/gemma-2-2b", "vae") == tmp_path / "snapshot" / "vae"


def test_the_fingerprint_knows_values_and_names_but_not_the_place(tmp_path):
    def of(folder, arrays):
        write_file(tmp_path / folder / "x.safetensors", entries(arrays))
        with open_weights(tmp_path / folder) as weights:
            return fingerprint(weights)

    original = of("a", ARRAYS)
    assert of("b", ARRAYS) == original
    for name, value in ARRAYS.items():
        changed = value.copy()
        changed[(-1,) * value.ndim] += 1
        assert of("c", {**ARRAYS, name: changed}) != original
    assert of("d", {("x" + name): value for name, value in ARRAYS.items()}) != original


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "x.pth", "", 3, None, ["x"]],
)
def test_an_index_names_no_file_outside_its_folder(tmp_path, name):
    write_file(tmp_path / "x.safetensors", entries())  # what must not be opened
    folder = tmp_path / "folder"
    folder.mkdir()
    write_file(folder / "y.safetensors", entries())
    content = {"weight_map": {"vector": "y.safetensors", "matrix": name}}
    (folder / "y.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="as a file of weights; needed: names that end in"):
        open_weights(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": []}', "{}", "[" * 100_000])
def test_an_index_of_another_form_is_refused(tmp_path, text):
    write_file(tmp_path / "y.safetensors", entries())
    (tmp_path / "y.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match=r"is damaged|as a file of weights"):
        open_weights(tmp_path)


def test_a_link_beside_an_index_is_followed(tmp_path):
    """The cache of the Hugging Face hub is made of links."""
    write_folder(tmp_path / "blobs", "model", entries(), max_shard_bytes=200)
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    with open_weights(tmp_path / "snapshot") as weights:
        assert_same(read_all(weights), ARRAYS)


def test_a_header_that_promises_gigabytes_is_refused(tmp_path):
    for size in (2**40, 2**63, 2**64 - 1):
        (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", size) + b"{}")
        with pytest.raises(InputError, match="not a whole safetensors file"):
            open_weights(tmp_path / "x.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(InputError, match="must hold one"):
        open_weights(tmp_path / "folder.safetensors")


def test_an_empty_tensor_is_read_and_has_a_fingerprint(tmp_path):
    """Found by fuzzing: safetensors cannot slice what is empty."""
    save_file({"none": np.zeros((0, 3), np.float32)}, tmp_path / "x.safetensors")
    with open_weights(tmp_path / "x.safetensors") as weights:
        assert weights.read("none", everything((0, 3))).shape == (0, 3)
        assert fingerprint(weights)


class Room:
    """Unpickled by weights-only loading, it is so many bytes."""

    def __reduce__(self):
        return bytearray, (10**12,)


def test_a_pickle_that_asks_for_a_terabyte_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"weight": torch.ones(2), "room": Room()}, tmp_path / "x.pth")
    with pytest.raises(InputError, match=r"it calls .*bytearray"):
        open_weights(tmp_path / "x.pth")


def test_a_tensor_that_repeats_one_number_a_billion_times_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"weight": torch.ones(1).expand(10**9)}, tmp_path / "x.pth")
    with pytest.raises(InputError, match=r"'weight' is no tensor .* all of its numbers"):
        open_weights(tmp_path / "x.pth")


def test_odd_tensors_of_pytorch_are_read_or_refused(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"weight": torch.nn.Parameter(torch.ones(2, 3)).t()}, tmp_path / "good.pth")
    with open_weights(tmp_path / "good.pth") as weights:
        assert weights.read("weight", everything((3, 2))).tolist() == [[1, 1]] * 3
    for number, odd in enumerate((torch.ones(2, 2).to_sparse(), torch.ones(2, device="meta"))):
        torch.save({"weight": odd}, tmp_path / f"{number}.pth")
        with pytest.raises(InputError, match=r"is no tensor|it calls"):
            open_weights(tmp_path / f"{number}.pth")
    torch.save({3: torch.ones(2)}, tmp_path / "x.pth")
    with pytest.raises(InputError, match="3 is no tensor with a name"):
        open_weights(tmp_path / "x.pth")


def test_a_compressed_archive_of_tensors_is_refused(tmp_path):
    """A few kilobytes of it may be gigabytes."""
    torch = pytest.importorskip("torch")
    torch.save({"weight": torch.zeros(10**6)}, tmp_path / "x.pth")
    with (
        zipfile.ZipFile(tmp_path / "x.pth") as whole,
        zipfile.ZipFile(tmp_path / "y.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    with pytest.raises(InputError, match="in it is compressed"):
        open_weights(tmp_path / "y.pth")
