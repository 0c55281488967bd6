"""A folder of drawn pictures: their names, what is written inside them, which of them are done.

A PNG holds three texts (iTXt): `Description`, the prompt; `Software`; and `lumina_jax`, one JSON
object with all that decides the pixels. By that text a picture is recognised when the same command
runs again, whatever was killed before. A panel cut from a picture holds the text of the whole.

    0003_a_red_fox.png               picture 3
    0003_a_red_fox.upper_left.png    one of its panels
"""

import contextlib
import dataclasses
import fcntl
import json
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from etils import epath
from jaxtyping import UInt8
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from lumina_jax import files
from lumina_jax.errors import InputError
from lumina_jax.sampling.sampler import SamplerConfig
from lumina_jax.version import __version__

_KEY = "lumina_jax"
_NAME = re.compile(r"(\d+)_\w*(\.\w+)?\.png")
# What does not decide the pixels: where weights lay, the rows beside it, the version.
_IRRELEVANT = ("checkpoint", "batch", "version", "panel")
# Settings that an older version did not know had these values.
_DEFAULTS = {
    field.name: field.default
    for field in dataclasses.fields(SamplerConfig)
    if field.default is not dataclasses.MISSING
}


def letters(prompt: str) -> str:
    """The prompt in a name: letters of any script, no more than 40."""
    return re.sub(r"\W+", "_", prompt).strip("_")[:40]


def file_name(index: int, prompt: str) -> str:
    """A name that sorts by index and tells the prompt."""
    return f"{index:04d}_{letters(prompt)}.png"


def panel_name(name: str, panel: str) -> str:
    """Of a panel of the picture with that name."""
    return f"{name.removesuffix('.png')}.{panel}.png"


def shared_metadata(
    config: SamplerConfig,
    *,
    system_prompt: str,
    start: Mapping[str, str],
    strength: float | None,
    checkpoint: Mapping[str, Any],
    fingerprint: str,
) -> dict[str, Any]:
    """What is written into all pictures of a command, each with its own request beside it.

    Args:
      config: Settings of the sampler.
      system_prompt: The text in front of prompts.
      start: Digests of the files that they begin from, "image" and "mask".
      strength: See `Pipeline`; None where it was not given.
      checkpoint: Where the weights lay.
      fingerprint: Of the weights.
    """
    return {
        "system_prompt": system_prompt,
        "sampling": dataclasses.asdict(config),
        **start,
        **({} if strength is None else {"strength": strength}),
        "checkpoint": checkpoint,
        "fingerprint": fingerprint,
        "version": __version__,
    }


def write_picture(path: epath.PathLike, image: Image.Image, metadata: Mapping[str, Any]) -> None:
    """Writes a PNG with its metadata inside, aside first: the path never holds half a picture."""
    texts = PngImagePlugin.PngInfo()
    texts.add_itxt("Description", metadata["prompt"])
    texts.add_itxt("Software", f"lumina_jax {__version__}")
    texts.add_itxt(_KEY, json.dumps(metadata, ensure_ascii=False))
    with files.aside(path) as local:
        image.save(local, "PNG", pnginfo=texts)


def read_metadata(path: epath.PathLike) -> dict[str, Any]:
    """What `write_picture` wrote beside the pixels."""
    try:
        with epath.Path(path).open("rb") as file, Image.open(file, formats=["PNG"]) as image:
            found = dict(json.loads(image.info[_KEY]))
            if not isinstance(found.get("sampling", {}), dict):
                raise ValueError("its settings are no object")
            return found
    except FileNotFoundError:
        raise InputError(f"{path} does not exist.") from None
    except (
        UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, KeyError, TypeError,
        ValueError, RecursionError,
    ):  # fmt: skip
        raise InputError(
            f"{path} holds no settings of lumina_jax: it was not drawn by lumina_jax.sample, or "
            f"another program has saved it anew."
        ) from None


def read_pixels(path: epath.PathLike) -> UInt8[np.ndarray, "H W 3"]:
    with epath.Path(path).open("rb") as file, Image.open(file, formats=["PNG"]) as image:
        return np.asarray(image.convert("RGB"))


class Found(NamedTuple):
    """What there is of the pictures that are wanted.

    Attributes:
      finished: Indices of those that are there.
      differing: Files that have the index of one and are not it, with what differs.
    """

    finished: set[int]
    differing: dict[epath.Path, str]


def survey(folder: epath.PathLike, wanted: Mapping[int, Mapping[str, Any]]) -> Found:
    """Compares the pictures of a folder, and their panels, with the metadata of those wanted."""
    indices = {
        name: int(match[1])
        for name in sorted(files.sizes(folder))
        if (match := _NAME.fullmatch(name)) and int(match[1]) in wanted
    }

    def compare(name):
        try:
            there = read_metadata(epath.Path(folder) / name)
        except InputError:
            return "it holds no settings of lumina_jax"
        return differences(there, wanted[indices[name]])

    with ThreadPoolExecutor(16) as pool:  # of a bucket each is a request
        faults = dict(zip(indices, pool.map(compare, indices), strict=True))
    return Found(
        finished={
            index
            for name, index in indices.items()
            if not faults[name] and name == file_name(index, wanted[index]["prompt"])
        },
        differing={epath.Path(folder) / name: fault for name, fault in faults.items() if fault},
    )


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What of two pictures' metadata differs and matters, in words; empty where nothing does."""
    old, new = _decisive(there), _decisive(now)
    return "; ".join(
        f"weights: {_weights(there)} there, {_weights(now)} now"
        if key == "fingerprint"
        else f"{key}: {old.get(key)!r} there, {new.get(key)!r} now"
        for key in dict.fromkeys((*old, *new))
        if old.get(key) != new.get(key)
    )


def _decisive(metadata):
    """What decides the pixels, as JSON returns it."""
    rest = {key: value for key, value in metadata.items() if key not in _IRRELEVANT}
    sampling = _DEFAULTS | rest.pop("sampling", {})
    if sampling["cache_threshold"] == 0 and sampling["cache_interval"] == 1:
        del sampling["cache_coefficients"]  # a calibration since then changes nothing
    return json.loads(json.dumps(rest | sampling))


def _weights(metadata):
    words = [str(word) for word in metadata.get("checkpoint", {}).values() if word is not None]
    return f"{' '.join(words)} ({str(metadata.get('fingerprint'))[:8]})"


@contextlib.contextmanager
def sole_writer(folder: epath.PathLike) -> Iterator[None]:
    """Refuses a folder into which another process draws; removes what killed ones left there.

    The system unlocks the folder when a process ends, however it ends. A bucket has no locks and no
    leftovers: there a file is put in one piece.
    """
    folder = epath.Path(folder)
    if files.is_remote(folder):
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"Another process is drawing into {folder}. Wait for it, or name another folder: "
                f"--output."
            ) from None
        except OSError as error:
            logging.warning(
                "%s has no locks (%s): see to it that no other process draws into it. What killed "
                "ones left is not removed.", folder, error,
            )  # fmt: skip
        else:
            files.remove_asides(folder)
        yield
