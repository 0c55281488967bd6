"""Time and memory of reading and writing a model's weights.

    python tools/benchmark_weights.py --preset=2b --dtype=bfloat16 --folder=/tmp/weights

writes a random model as a diffusers folder, reads it into parameters, writes those as an official
file, reads that into a mesh of eight devices, and compares the two in the end. Memory is what the
process holds itself (RssAnon); the pages of mapped files are the kernel's to take back. Needs twice
the model's size on the disk, and, as the devices are the processor's, twice in memory.
"""

import contextlib
import json
import pathlib
import threading
import time

import jax
import numpy as np
from absl import flags

from lumina_jax import cli, sharding
from lumina_jax.models.next_dit import PRESETS, NextDiTConfig, abstract_params
from lumina_jax.weights import convert, files, next_dit

_PRESET = flags.DEFINE_enum("preset", "2b", list(PRESETS), "Size of the model.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Of all weights.")
_FOLDER = flags.DEFINE_string("folder", None, "Where to write; it is not removed.")


@contextlib.contextmanager
def measured(what: str, num_bytes: int):
    """Prints the time and the highest memory of a block, against the size of the weights."""
    peak, done = [_anonymous_bytes()], threading.Event()
    first = peak[0]

    def watch():
        while not done.wait(0.01):
            peak[0] = max(peak[0], _anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    try:
        yield
    finally:
        seconds = time.perf_counter() - began
        done.set()
        watcher.join()
    memory = " -> ".join(f"{n / 1e9:.2f}" for n in (first, peak[0], _anonymous_bytes()))
    print(
        f"{what:<32}{seconds:>7.1f} s{num_bytes / 1e6 / seconds:>8.0f} MB/s   "
        f"memory before -> peak -> after: {memory} GB",
        flush=True,
    )


def _anonymous_bytes() -> int:
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise OSError("no RssAnon in /proc/self/status: this needs Linux")


def random_entries(cfg: NextDiTConfig, dtype: str) -> list[files.Entry]:
    """Every tensor in diffusers' names, drawn when it is written."""
    rng = np.random.default_rng(0)

    def draw(shape):
        return (rng.standard_normal(shape, np.float32) * 0.02).astype(np.dtype(dtype))

    shapes = convert.their_shapes(next_dit.tensors(cfg, "diffusers"))
    return [files.Entry(n, s, dtype, lambda s=s: draw(s)) for n, s in shapes.items()]


def read(path: pathlib.Path, cfg: NextDiTConfig, **mesh: int) -> dict:
    mesh = sharding.make_mesh(**mesh, devices=jax.devices()[: int(np.prod([*mesh.values()]))])
    with next_dit.open_transformer(path, axes_dims=cfg.axes_dims) as source:
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, source.dtype), abstract_params(source.cfg)
        )
        return source.load(abstract, sharding.tree_shardings(abstract, mesh))


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    cfg, dtype = NextDiTConfig.preset(_PRESET.value), _DTYPE.value
    folder = pathlib.Path(_FOLDER.value)
    entries = random_entries(cfg, dtype)
    size = sum(entry.num_bytes for entry in entries)
    largest = max(entry.num_bytes for entry in entries)
    print(
        f"{_PRESET.value}, {dtype}: {len(entries)} tensors, {size / 1e9:.2f} GB, the largest "
        f"{largest / 1e6:.0f} MB"
    )
    with measured("write random diffusers folder", size):
        files.write_folder(folder / "diffusers", "diffusion_pytorch_model", entries, 5 * 10**9)
        config = next_dit.to_diffusers_config(cfg)
        (folder / "diffusers" / "config.json").write_text(json.dumps(config))
    with measured("read into one device", size):
        params = read(folder / "diffusers", cfg, replica=1, data=1, model=1)
    with measured("write official .safetensors", size):
        next_dit.save(folder / "official.safetensors", params, cfg, format="official")
    with measured("read into a mesh (1, 4, 2)", size):
        again = read(folder / "official.safetensors", cfg, replica=1, data=4, model=2)
    same = all(
        np.array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True)
    )
    print("bit for bit the same" if same else "DIFFERENT")


if __name__ == "__main__":
    cli.run(main, required=("folder",))
