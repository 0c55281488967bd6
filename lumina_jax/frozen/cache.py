"""Cached features: what the frozen programs make of a data set, made once and kept in its records.

A run that reads them needs neither the encoders' time nor their memory, and sees the same rows with
the same captions. They are rounded to bfloat16, and belong to one encoder: the manifest says which,
and `check` refuses a run that has another.

Axes: B batch, H W picture, h w C latents, S caption slots, F text features.
"""

import copy
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence

import grain
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from lumina_jax import files, sharding
from lumina_jax.data import images, records
from lumina_jax.data.buckets import Bucket
from lumina_jax.data.records import (
    CACHES,
    CapFeatsCache,
    LatentsCache,
    Manifest,
    Record,
    Records,
)
from lumina_jax.errors import InputError
from lumina_jax.frozen.autoencoder import Autoencoder
from lumina_jax.frozen.text_encoder import TextEncoder
from lumina_jax.progress import progress_bar
from lumina_jax.system_prompts import prefixed
from lumina_jax.version import __version__

MARKER = records.MARKERS[1]


def cache_features(
    source: epath.PathLike,
    output: epath.PathLike,
    features: Sequence[str] = tuple(CACHES),
    *,
    text_encoder: TextEncoder,
    autoencoder: Autoencoder,
    system_prompt: str,
    mesh: jax.sharding.Mesh,
    batch_size: int,
    sample: bool = False,
    overwrite: bool = False,
) -> Manifest:
    """Writes a copy of a data set with features in its records; returns the manifest.

    A finished copy is left as it is; one that was stopped goes on at its next shard. Records keep
    their order, and the caches they have already.

    Args:
      source: The data set to read.
      output: The directory to write.
      features: "latents", "cap_feats" or both.
      text_encoder: Of the runs to come.
      autoencoder: Likewise.
      system_prompt: Name of the text before each caption.
      mesh: Batches are split over it.
      batch_size: Pictures, or captions, encoded at a time.
      sample: Whether the autoencoder draws its latents, which is refused.
      overwrite: Whether to replace another data set at `output`.
    """
    found = Manifest.load(source)
    _check_request(
        found,
        source,
        output,
        features,
        autoencoder,
        sample,
        sharding.batch_shards(mesh),
        batch_size,
    )
    prefixed("", system_prompt)  # refuses a name that does not exist
    made_by = {}
    if "latents" in features:
        made_by["latents"] = [autoencoder.fingerprint()]
    if "cap_feats" in features:
        made_by["cap_feats"] = [text_encoder.fingerprint(), system_prompt]
    content = json.dumps([found.fingerprint, made_by], sort_keys=True).encode()
    fingerprint = hashlib.sha256(content).hexdigest()
    output = epath.Path(output)
    unfinished = output / records.UNFINISHED
    finished = records.begin_copy(
        source,
        output,
        found,
        fingerprint,
        change="features of another encoder",
        overwrite=overwrite,
    )
    if finished is not None:
        return finished

    encoders: dict[str, _Latents | _CapFeats] = {}
    if "latents" in features:
        encoders["latents"] = _Latents(autoencoder, mesh, batch_size)
    if "cap_feats" in features:
        encoders["cap_feats"] = _CapFeats(text_encoder, mesh, batch_size, system_prompt)

    def num_cut() -> int:
        return encoders["cap_feats"].num_truncated if "cap_feats" in encoders else 0

    splits, num_truncated, done = [], 0, 0
    with progress_bar("Encoding", found.num_records, unit="records") as advance:
        for split in found.splits:
            shards = []
            for shard in split.shards:
                path, counted = output / shard.name, unfinished / f"{shard.name}.json"
                if not counted.exists():  # written last: then the shard is there too
                    before = num_cut()
                    stored = Records(source, dataclasses.replace(split, shards=(shard,)))
                    with records.shard_writer(path) as write:
                        try:
                            for record in _encoded(stored, split.bucket, encoders, batch_size):
                                write(record)
                                done += 1
                                advance(done)
                        except images.Rejected as error:
                            raise InputError(
                                f"{source}/{shard.name} cannot be copied ({error}). "
                                f"{records.REMAKE}"
                            ) from error
                    files.write(counted, json.dumps(num_cut() - before))
                else:
                    done += shard.num_records
                num_truncated += json.loads(counted.read_text())
                shards.append(dataclasses.replace(shard, num_bytes=path.stat().length))
            splits.append(dataclasses.replace(split, shards=tuple(shards)))
    cache = dict(found.cache)
    if "latents" in encoders:
        cache["latents"] = encoders["latents"].describe()
    if "cap_feats" in encoders:
        cache["cap_feats"] = encoders["cap_feats"].describe(num_truncated)
    manifest = dataclasses.replace(
        found, splits=tuple(splits), cache=cache, fingerprint=fingerprint, version=__version__
    )
    records.finish(output, manifest)
    files.remove_folder(unfinished, last=MARKER)
    return manifest


def check(
    manifest: Manifest,
    features: Sequence[str],
    *,
    text_encoder: TextEncoder,
    autoencoder: Autoencoder,
    system_prompt: str,
) -> None:
    """Refuses cached features that these encoders would not make."""
    faults = []
    for name, encoder, what in (
        ("latents", autoencoder, "autoencoder"),
        ("cap_feats", text_encoder, "text encoder"),
    ):
        if name not in features:
            continue
        theirs, ours = manifest.cache[name].fingerprint, encoder.fingerprint()
        if theirs != ours:
            faults.append(f"{name} were made by the {what} {theirs!r}, and this run's is {ours!r}")
    if "cap_feats" in features:
        theirs = manifest.cache["cap_feats"].system_prompt
        if theirs != system_prompt:
            faults.append(
                f"cap_feats have the system prompt {theirs!r}, and data.system_prompt is "
                f"{system_prompt!r}"
            )
    if faults:
        raise InputError(
            f"The cached features are not those of this run: {'; '.join(faults)}. Make them again "
            f"with tools/cache_features.py, change the config to what they were made with, or "
            f"leave them out of data.cached."
        )


def _check_request(
    manifest: Manifest,
    source: epath.PathLike,
    output: epath.PathLike,
    features: Sequence[str],
    autoencoder: Autoencoder,
    sample: bool,
    shards: int,
    batch_size: int,
) -> None:
    faults = []
    if not features or set(features) - set(CACHES):
        faults.append(f"--features must name {' or '.join(CACHES)}, or both; got {features!r}")
    if epath.Path(source).resolve() == epath.Path(output).resolve():
        faults.append(f"--output={output} is the data set to read; name another directory")
    if batch_size < 1 or batch_size % shards:
        low = max(batch_size // shards, 1) * shards
        faults.append(
            f"--batch_size={batch_size} does not split over {shards} part(s) of the mesh; nearest: "
            f"{low} and {low + shards}"
        )
    if "latents" in features:
        if sample:
            faults.append(
                "autoencoder.sample=True draws other latents each time, so they cannot be kept; "
                "set it to False, or name only --features=cap_feats"
            )
        unit = autoencoder.downscale
        odd = [s.bucket for s in manifest.splits if s.bucket.width % unit or s.bucket.height % unit]
        if odd:
            faults.append(
                f"buckets {', '.join(map(str, odd))} are not multiples of {unit} pixels, the "
                f"autoencoder's downscale; prepare the data with a --pixels_per_token that is"
            )
    if faults:
        raise InputError(f"The features of {source} cannot be cached: {'; '.join(faults)}.")


def _encoded(
    stored: Records,
    bucket: Bucket,
    encoders: Mapping[str, "_Latents | _CapFeats"],
    batch_size: int,
) -> Iterator[bytes]:
    """Yields the records with their features, in order."""

    def prepare(contents: Sequence[bytes]):  # in threads
        chunk = [Record(content) for content in contents]
        inputs = {name: encoder.prepare(chunk, bucket) for name, encoder in encoders.items()}
        return chunk, inputs

    chunks = iter(
        grain.MapDataset.source(stored)
        .batch(batch_size, batch_fn=prepare)
        .to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=2))
    )
    running = (
        (chunk, {name: encoders[name].start(given) for name, given in inputs.items()})
        for chunk, inputs in chunks
    )
    try:
        # In pairs, so that the device has begun with the next chunk while this one is written.
        for (chunk, results), _ in itertools.pairwise(itertools.chain(running, (None,))):
            features = {name: encoders[name].finish(result) for name, result in results.items()}
            for index, record in enumerate(chunk):
                yield record.with_caches(**{name: made[index] for name, made in features.items()})
    finally:
        chunks.close()


class _Latents:
    """Pictures of records -> the bytes of their latents; a small program for each bucket."""

    def __init__(self, autoencoder: Autoencoder, mesh: jax.sharding.Mesh, batch_size: int):
        self._autoencoder, self._batch_size = autoencoder, batch_size
        self._params = autoencoder.load_params(mesh)
        key = jax.random.key(0)  # for latents that are drawn, which these are not
        self._encode = _program(lambda p, images: autoencoder.encode(p, images, key), mesh)

    def prepare(self, chunk: Sequence[Record], bucket: Bucket):
        """The pixels of each record; None for one that cannot be decoded."""
        return [_decode(record, bucket) for record in chunk], bucket

    def start(self, inputs):
        images, bucket = inputs
        blank = np.zeros((bucket.height, bucket.width, 3), np.uint8)
        rows = np.stack([blank if image is None else image for image in images])
        return images, self._encode(self._params, _filled(rows, self._batch_size))

    def finish(self, started) -> list[bytes]:
        images, latents = started
        rows = zip(images, np.asarray(latents), strict=False)
        return [b"" if image is None else row.tobytes() for image, row in rows]

    def describe(self) -> LatentsCache:
        encoder = self._autoencoder
        return LatentsCache(encoder.fingerprint(), encoder.downscale, encoder.channels)


class _CapFeats:
    """Captions of records -> for each record, the bytes of the features of each caption."""

    def __init__(
        self,
        text_encoder: TextEncoder,
        mesh: jax.sharding.Mesh,
        batch_size: int,
        system_prompt: str,
    ):
        # A copy, which counts what it cuts itself: a call that failed may still be reading ahead.
        self._text_encoder, self._batch_size = copy.copy(text_encoder), batch_size
        self._system_prompt = system_prompt
        self._params = text_encoder.load_params(mesh)
        self._encode = _program(text_encoder.encode, mesh)

    @property
    def num_truncated(self) -> int:
        return self._text_encoder.num_truncated

    def prepare(self, chunk: Sequence[Record], bucket: Bucket):
        captions = [record.captions for record in chunk]
        texts = [prefixed(c.text, self._system_prompt) for of_one in captions for c in of_one]
        return [len(of_one) for of_one in captions], *self._text_encoder.tokenize(texts)

    def start(self, inputs):
        counts, ids, mask = inputs
        size = self._batch_size
        features = [
            self._encode(self._params, *(_filled(a[i : i + size], size) for a in (ids, mask)))
            for i in range(0, len(ids), size)
        ]
        return counts, mask.sum(axis=1), features

    def finish(self, started) -> list[list[bytes]]:
        counts, lengths, features = started
        rows = itertools.chain.from_iterable(np.asarray(batch) for batch in features)
        # The lengths come first: when they end, zip leaves the rows that only fill up.
        contents = (row[:length].tobytes() for length, row in zip(lengths, rows, strict=False))
        return [list(itertools.islice(contents, count)) for count in counts]

    def describe(self, num_truncated: int) -> CapFeatsCache:
        encoder = self._text_encoder
        ids, mask = (_filled(a, self._batch_size) for a in encoder.tokenize([""]))
        empty = np.asarray(self._encode(self._params, ids, mask))[0, : mask[0].sum()]
        return CapFeatsCache.with_empty(
            empty,
            fingerprint=encoder.fingerprint(),
            system_prompt=self._system_prompt,
            max_tokens=encoder.max_tokens,
            feature_dim=encoder.feature_dim,
            num_truncated=num_truncated,
        )


def _program(encode: Callable, mesh: jax.sharding.Mesh) -> Callable:
    """A jitted encoder from rows on the host to bfloat16 on the mesh; it does not wait."""
    rows_sharding = sharding.named(mesh, ("act_batch",))
    run = jax.jit(
        lambda params, *rows: encode(params, *rows).astype(jnp.bfloat16),
        out_shardings=rows_sharding,
    )

    def call(params, *rows):
        with jax.set_mesh(mesh):
            return run(params, *jax.device_put(rows, rows_sharding))

    return call


def _filled(rows: np.ndarray, batch_size: int) -> np.ndarray:
    """Repeats the first row up to the batch size, so that one program serves every batch."""
    return np.concatenate([rows, np.repeat(rows[:1], batch_size - len(rows), axis=0)])


def _decode(record: Record, bucket: Bucket) -> np.ndarray | None:
    pixels = np.empty((bucket.height, bucket.width, 3), np.uint8)
    try:
        images.decode_stored(record.image, pixels)
    except Exception as error:  # what a decoder raises on damaged bytes is anything
        logging.warning(
            "Record %s of bucket %s cannot be decoded (%s: %s), so it has no latents; a run puts "
            "the next record in its place, as it would without a cache.",
            record.id, bucket, type(error).__name__, error,
        )  # fmt: skip
        return None
    return pixels
