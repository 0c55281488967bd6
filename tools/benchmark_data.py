"""Images a second and core: our loader, torch's DataLoader with PIL, webdataset, and the decoder.

    python tools/benchmark_data.py --resolution=256 --num_pictures=2048 --output=/tmp/benchmark
    python tools/benchmark_data.py --resolution=1024 --num_pictures=128 --output=/tmp/benchmark

All read the same JPEG files of the same size and give batches of uint8 pixels and captions, in
random order: ours from ArrayRecord shards, torch from a folder of .jpg and .txt, webdataset from
tar files, the decoders (simplejpeg, which our loader uses, and Pillow) from memory and in order.
Our loader works ahead of the training loop, in threads, and so does torch in a worker; without a
worker torch is faster on one core, but the loop stands still meanwhile.
That the pixels and captions are equal is checked first. Each has a process of its own on one and
the same core, and they take turns, so that whatever else the machine does meets all alike.

The pictures are crops of real photographs. Needs the `dev` extra: torch and webdataset.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import io
import itertools
import multiprocessing
import os
import pathlib
import statistics
import tarfile
import time
from collections.abc import Iterator, Sequence

import numpy as np
from absl import flags
from photographs import photographs  # beside this file
from PIL import Image

from lumina_jax import cli
from lumina_jax.data import images, prepare, records
from lumina_jax.data.buckets import Bucket, resize_and_crop
from lumina_jax.data.captions import Caption
from lumina_jax.data.records import Manifest, Record
from lumina_jax.data.sources.base import Item, Part
from lumina_jax.errors import InputError

_RESOLUTION = flags.DEFINE_integer("resolution", 256, "Side of the square pictures, in pixels.")
_NUM_PICTURES = flags.DEFINE_integer("num_pictures", 2048, "Different crops.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Pictures in a batch.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Turns of each.")
_SECONDS = flags.DEFINE_float("seconds", 4.0, "Length of a turn, after a warm-up.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder for the pictures; it is not removed.")

TEXT = (
    "a red fox in deep snow looks at the camera, late afternoon light, a birch forest behind it, "
    "soft shadows on the wooden table beside the window of a quiet street with tall buildings"
)
PICTURES_PER_TAR = 128

# ids, pixels [B, H, W, 3] and captions
Batches = Iterator[tuple[Sequence[str], np.ndarray, Sequence[str]]]


@dataclasses.dataclass(frozen=True)
class Crops:
    """Random crops of the photographs, with captions of eighty words."""

    resolution: int
    num_pictures: int
    name: str = "crops"
    license: str = "of the photographs"
    attribution: str = ""

    def settings(self) -> dict:
        return {"num_pictures": self.num_pictures}

    def parts(self) -> list[Part]:
        return [Part("memory", 0, self.num_pictures)]

    def read(self, part: Part) -> Iterator[Item]:
        rng = np.random.default_rng(0)
        decoded = [(name, images.decode(content)) for name, content in photographs()]
        for number in range(part.start, part.stop):
            name, photograph = decoded[number % len(decoded)]
            side = int(min(photograph.size) * rng.uniform(0.7, 1))
            left, top = (int(rng.integers(length - side + 1)) for length in photograph.size)
            crop = photograph.crop((left, top, left + side, top + side))
            crop = resize_and_crop(crop, Bucket(self.resolution, self.resolution))
            text = f"{name}, {side} pixels: {' '.join(rng.choice(TEXT.split(), 80))}"
            yield Item(f"{number:06d}", crop, (Caption(text, "long", "en"),))


def write_pictures(folder: pathlib.Path, crops: Crops) -> int:
    """Writes our data set, then its JPEG files as they are for the others; returns their bytes."""
    target = prepare.make_targets(
        folder / "lumina_jax", [crops.resolution], buckets=[Bucket(*[crops.resolution] * 2)]
    )
    prepare.prepare(crops, folder / "lumina_jax", target, prepare.Settings(keep_duplicates=True))
    found = read_records(folder)
    for name in ("files", "tars"):
        (folder / name).mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        for number, record in enumerate(found):
            if number % PICTURES_PER_TAR == 0:
                path = folder / "tars" / f"{number // PICTURES_PER_TAR:04d}.tar"
                tar = stack.enter_context(tarfile.open(path, "w"))
            for suffix, content in (
                ("jpg", record.image),
                ("txt", record.captions[0].text.encode()),
            ):
                name = f"{record.id}.{suffix}"
                (folder / "files" / name).write_bytes(content)
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return sum(len(record.image) for record in found)


def read_records(folder: pathlib.Path) -> list[Record]:
    (split,) = Manifest.load(folder / "lumina_jax").splits
    return [
        Record(content)
        for shard in split.shards
        for content in records.read_shard(
            folder / "lumina_jax" / shard.name, range(shard.num_records)
        )
    ]


def lumina_jax_batches(folder: pathlib.Path, batch_size: int) -> Batches:
    from lumina_jax.data.captions import CaptionPolicy
    from lumina_jax.data.loader import Dataset, Loader

    def no_tokens(texts: Sequence[str]):  # the others have no tokenizer either
        return np.zeros((len(texts), 1), np.int32), np.ones((len(texts), 1), np.bool_)

    loader = Loader(
        [Dataset(str(folder / "lumina_jax"))],
        batch_size=batch_size,
        seed=0,
        tokenize=no_tokens,
        policy=CaptionPolicy(dropout=0.0),
        num_threads=1,
        prefetch=2,
        process_index=0,
        process_count=1,
    )
    for batch in loader.iterate():
        yield batch["ids"], batch["images"], batch["captions"]


def torch_batches(folder: pathlib.Path, batch_size: int, num_workers: int = 0) -> Batches:
    import torch

    class Files(torch.utils.data.Dataset):
        def __init__(self):
            self.paths = [os.fspath(path) for path in sorted((folder / "files").glob("*.jpg"))]

        def __len__(self):
            return len(self.paths)

        def __getitem__(self, index):
            path = self.paths[index]
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            with open(f"{path[:-4]}.txt", encoding="utf-8") as file:
                return path[-10:-4], pixels, file.read()

    def collate(rows):
        ids, pixels, captions = zip(*rows, strict=True)
        return ids, torch.from_numpy(np.stack(pixels)), captions

    batches = torch.utils.data.DataLoader(
        Files(),
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        multiprocessing_context="fork" if num_workers else None,
    )
    while True:
        for ids, pixels, captions in batches:
            yield ids, pixels.numpy(), captions


def webdataset_batches(folder: pathlib.Path, batch_size: int) -> Batches:
    import webdataset

    tars = [os.fspath(path) for path in sorted((folder / "tars").glob("*.tar"))]
    batches = (
        webdataset.WebDataset(tars, shardshuffle=len(tars))
        .shuffle(1000)
        .decode("rgb8")
        .to_tuple("__key__", "jpg", "txt")
        .batched(batch_size, partial=False)
    )
    while True:
        yield from batches


def simplejpeg_batches(folder: pathlib.Path, batch_size: int) -> Batches:
    import simplejpeg

    def decode(content: bytes, out: np.ndarray) -> None:
        simplejpeg.decode_jpeg(content, buffer=out)

    return _decoded(folder, batch_size, decode)


def pillow_batches(folder: pathlib.Path, batch_size: int) -> Batches:
    def decode(content: bytes, out: np.ndarray) -> None:
        out[...] = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))

    return _decoded(folder, batch_size, decode)


def _decoded(folder: pathlib.Path, batch_size: int, decode) -> Batches:
    found = [(r.id, bytes(r.image), r.captions[0].text) for r in read_records(folder)]
    (split,) = Manifest.load(folder / "lumina_jax").splits
    pixels = np.empty((batch_size, split.bucket.height, split.bucket.width, 3), np.uint8)
    while True:
        for first in range(0, len(found), batch_size):
            ids, contents, captions = zip(*found[first : first + batch_size], strict=True)
            for content, out in zip(contents, pixels, strict=True):
                decode(content, out)
            yield ids, pixels, captions


CONTENDERS = {
    "lumina_jax": lumina_jax_batches,
    "torch": functools.partial(torch_batches, num_workers=1),
    "torch_no_worker": torch_batches,
    "webdataset": webdataset_batches,
    "simplejpeg": simplejpeg_batches,
    "pillow": pillow_batches,
}


@functools.cache  # each process has one
def start(name: str, folder: pathlib.Path, batch_size: int, core: int) -> Batches:
    os.sched_setaffinity(0, {core})  # before threads are started, or counted by torch
    return CONTENDERS[name](folder, batch_size)


def look(num_batches: int, *which) -> dict[str, tuple[str, str]]:
    """What comes for each id in so many batches: a digest of its pixels, and its caption."""
    found = {}
    for ids, pixels, captions in itertools.islice(start(*which), num_batches):
        for id, image, caption in zip(ids, pixels, captions, strict=True):
            found[str(id)] = hashlib.sha256(image.tobytes()).hexdigest(), caption
    return found


def measure(seconds: float, *which) -> float:
    """Returns the images a second, after a few batches that were ready or have to fill a cache."""
    batches, num = start(*which), 0
    for _ in range(8):
        next(batches)
    began = time.perf_counter()
    while (passed := time.perf_counter() - began) < seconds:
        num += len(next(batches)[0])
    return num / passed


def main() -> None:
    _check_flags()
    crops = Crops(_RESOLUTION.value, _NUM_PICTURES.value)
    folder = pathlib.Path(_OUTPUT.value) / f"{crops.resolution}px"
    num_bytes = write_pictures(folder, crops)
    print(
        f"{crops.num_pictures} crops of {crops.resolution} x {crops.resolution} px, "
        f"{num_bytes / crops.num_pictures / 1e3:.0f} kB each, batches of {_BATCH_SIZE.value}"
    )
    core = max(os.sched_getaffinity(0))
    spawn = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        processes = {
            name: stack.enter_context(concurrent.futures.ProcessPoolExecutor(1, spawn))
            for name in CONTENDERS
        }

        def run(function, name: str, *arguments):
            which = name, folder, _BATCH_SIZE.value, core
            return processes[name].submit(function, *arguments, *which).result()

        # Two epochs have every picture, however webdataset shuffles them.
        num_batches = 2 * crops.num_pictures // _BATCH_SIZE.value
        _check_same({name: run(look, name, num_batches) for name in CONTENDERS}, crops.num_pictures)
        rates = {name: [] for name in CONTENDERS}
        for turn in range(_ROUNDS.value):
            # Who goes first alternates too.
            for name in sorted(CONTENDERS, reverse=bool(turn % 2)):
                rates[name].append(run(measure, name, _SECONDS.value))
            print(
                f"round {turn + 1}: "
                + ", ".join(f"{name} {rates[name][-1]:,.0f}" for name in CONTENDERS),
                flush=True,
            )
    report(rates)


def report(rates: dict[str, list[float]]) -> None:
    """Prints the medians; ratios are those of one round, then their median."""
    print(f"{'images a second on one core':<36}{'median':>8}{'min':>10}{'max':>8}")
    for name, found in rates.items():
        median = statistics.median(found)
        print(f"{name:<36}{median:>8,.0f}{min(found):>10,.0f}{max(found):>8,.0f}")
    pairs = zip(rates["torch"], rates["webdataset"], strict=True)
    rates = rates | {"the better of the two": [max(pair) for pair in pairs]}
    print("lumina_jax is as fast as")
    for name, wanted in (
        ("torch", ""),
        ("torch_no_worker", ""),
        ("webdataset", ""),
        ("the better of the two", "wanted: 1.5"),
        ("simplejpeg", "wanted: 0.85"),
        ("pillow", ""),
    ):
        ratios = [a / b for a, b in zip(rates["lumina_jax"], rates[name], strict=True)]
        median = statistics.median(ratios)
        print(f"{name:<36}{median:>8.2f}{min(ratios):>10.2f}{max(ratios):>8.2f} {wanted}".rstrip())


def _check_flags() -> None:
    num_pictures, batch_size = _NUM_PICTURES.value, _BATCH_SIZE.value
    faults = []
    if _RESOLUTION.value <= prepare.MAX_PNG_RESOLUTION or _RESOLUTION.value % 16:
        least = prepare.MAX_PNG_RESOLUTION + 16
        faults.append(f"--resolution={_RESOLUTION.value} must be a multiple of 16 from {least} on")
    if batch_size < 1 or num_pictures < 1 or num_pictures % batch_size:
        faults.append(
            f"--num_pictures={num_pictures} must be a multiple of --batch_size={batch_size}"
        )
    if _ROUNDS.value < 1 or _SECONDS.value <= 0:
        faults.append(
            f"--rounds={_ROUNDS.value} and --seconds={_SECONDS.value} must be more than nothing"
        )
    missing = [name for name in ("torch", "webdataset") if not importlib.util.find_spec(name)]
    if missing:
        faults.append(f"{' and '.join(missing)} must be installed: pip install 'lumina-jax[dev]'")
    if faults:
        raise InputError(f"Cannot compare: {'; '.join(faults)}.")


def _check_same(found: dict[str, dict[str, tuple[str, str]]], num_pictures: int) -> None:
    ours = found["lumina_jax"]
    if len(ours) != num_pictures:
        raise ValueError(f"lumina_jax gives {len(ours)} of {num_pictures} pictures")
    for name, theirs in found.items():
        if different := sorted(id for id in ours | theirs if ours.get(id) != theirs.get(id)):
            raise ValueError(f"{name} gives others than lumina_jax: {', '.join(different[:5])}")
    print("the same pixels and captions from all", flush=True)


if __name__ == "__main__":
    cli.run(main, required=("output",))
