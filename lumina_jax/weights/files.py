"""Weight files on a local disk: parts of tensors in, one tensor at a time out.

Read are safetensors (one file, or a folder with an index) and PyTorch's zip archives (`.pth`), the
latter with weights-only loading: nothing that is pickled is ever executed. Nothing is read before
it is asked for, and then only the rows and columns asked for.
"""

import collections
import contextlib
import hashlib
import json
import os
import pathlib
import pickletools
import re
import struct
import tempfile
import uuid
import zipfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open

from lumina_jax import files, untrusted
from lumina_jax.errors import InputError
from lumina_jax.weights.tensors import Index

INDEX_SUFFIX = ".safetensors.index.json"
_TORCH_SUFFIXES = (".pth", ".pt")
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
    "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_SHARD_NAME = re.compile(r"[^/\\\0]+\.safetensors")
# What the pickle in a state dict may call, as "module name".
_CALLS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage"
    r"|torch\.storage (UntypedStorage|TypedStorage)"
)
READABLE = frozenset(_DTYPES.values())
_SAFETENSORS_DTYPES = {name: code for code, name in _DTYPES.items()}


class Weights:
    """The tensors of a file or a folder of files; close it, or use it in `with`.

    Attributes:
      path: Where they are.
      shapes: Of each tensor, by its name.
      dtypes: numpy's names of their types.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._stack = contextlib.ExitStack()

    def read(self, name: str, index: Index) -> np.ndarray:
        """The part `index` of a tensor: one slice for each of its dims."""
        raise NotImplementedError

    def close(self) -> None:
        self._stack.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class _Safetensors(Weights):
    def __init__(self, path: pathlib.Path, shards: Sequence[pathlib.Path]):
        super().__init__(path)
        self._files = {}
        for shard in shards:
            try:
                file = self._stack.enter_context(safe_open(shard, framework="numpy"))
                for name in file.keys():  # noqa: SIM118 (it cannot be iterated)
                    view = file.get_slice(name)
                    self.shapes[name] = tuple(view.get_shape())
                    self.dtypes[name] = _DTYPES.get(view.get_dtype(), view.get_dtype())
                    self._files[name] = file
            except (SafetensorError, OSError, ValueError) as error:
                self.close()
                raise InputError(
                    f"{shard} is not a whole safetensors file ({first_line(error)}). Copy it again."
                ) from None

    def read(self, name: str, index: Index) -> np.ndarray:
        if 0 in (self.shapes[name] or (0,)):  # what is empty, or has no dim, has no slices
            return self._files[name].get_tensor(name)
        return self._files[name].get_slice(name)[index]


class _Torch(Weights):
    def __init__(self, path: pathlib.Path):
        super().__init__(path)
        torch = _import_torch(path)
        try:
            _check_archive(path)
            tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except MemoryError:
            raise
        except Exception as error:  # what a pickle of damaged bytes raises is anything
            raise InputError(
                f"{path} is not a plain archive of tensors, and nothing else is read from a "
                f"pickle: {first_line(error)} Ask for a safetensors file instead."
            ) from None
        if not isinstance(tensors, dict):
            tensors = {"": tensors}
        odd = [name for name, value in tensors.items() if not _is_plain(torch, name, value)]
        if odd:
            raise InputError(
                f"{path} is not a state dict: {', '.join(f'{name!r:.60}' for name in odd[:5])} is "
                f"no tensor with a name and with all of its numbers in the file. Save its state "
                f"dict alone, or as safetensors."
            )
        self._tensors = tensors
        for name, tensor in tensors.items():
            self.shapes[name] = tuple(tensor.shape)
            self.dtypes[name] = str(tensor.dtype).removeprefix("torch.")

    def read(self, name: str, index: Index) -> np.ndarray:
        part = self._tensors[name].detach()[index].contiguous()
        if self.dtypes[name] == "bfloat16":  # which PyTorch does not hand to numpy
            return part.view(_import_torch(self.path).int16).numpy().view(ml_dtypes.bfloat16)
        return part.numpy()


def _check_archive(path: pathlib.Path) -> None:
    """Refuses what a state dict has no need of: compression, and any call but for tensors.

    A compressed member can be a thousand times as large as its file. Weights-only loading knows
    more calls than these, and a `bytearray` of any size is one of them.
    """
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED or member.file_size > path.stat().st_size:
                raise ValueError(f"{member.filename!r:.60} in it is compressed.")
        for name in archive.namelist():
            if name.rpartition("/")[2] == "data.pkl":
                _check_calls(archive.read(name))


def _check_calls(content: bytes) -> None:
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"):
            raise ValueError(f"it calls by {opcode.name}.")
        if opcode.name == "GLOBAL" and not _CALLS.fullmatch(argument):
            raise ValueError(f"it calls {argument!r:.60}.")


def _is_plain(torch: Any, name: Any, tensor: Any) -> bool:
    """Whether this is a named tensor, and no more numbers than there are bytes for.

    A stride of zero would make a terabyte out of one number.
    """
    if not (name and isinstance(name, str) and isinstance(tensor, torch.Tensor)):
        return False
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def open_weights(path: str | os.PathLike) -> Weights:
    """The weights at `path`: a `.safetensors` or `.pth` file, or a folder of safetensors."""
    path = local(path)
    if path.is_dir():
        return _Safetensors(path, _shards(path))
    if path.suffix == ".safetensors":
        return _Safetensors(path, [path])
    if path.suffix in _TORCH_SUFFIXES:
        return _Torch(path)
    raise InputError(
        f"{path} is not a folder with safetensors, and its suffix is not .safetensors or "
        f"{' or '.join(_TORCH_SUFFIXES)}."
    )


def local(path: str | os.PathLike) -> pathlib.Path:
    """`path` if there is a local file or folder; weights are not read from buckets."""
    if files.is_remote(path):
        raise InputError(
            f"{path} is not on a local disk. Copy it there, mount the bucket, or convert it once "
            f"with tools/convert_checkpoint.py to a checkpoint, which may lie in a bucket."
        )
    path = pathlib.Path(path)
    if not _exists(path):
        raise InputError(f"No file or folder at {path.absolute()!s:.300}.")
    return path


def _exists(path: str | os.PathLike) -> bool:
    try:
        return pathlib.Path(path).exists()
    except OSError:  # a name that is too long, a folder that may not be looked into
        return False


def _shards(folder: pathlib.Path) -> list[pathlib.Path]:
    indices = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    found = sorted(folder.glob("*.safetensors"))
    if len(indices) == 1:
        names = _shard_names(indices[0])
        if missing := [name for name in names if not (folder / name).exists()]:
            raise InputError(
                f"{folder} lacks {', '.join(missing)}, named by {indices[0].name}. Copy it again."
            )
        return [folder / name for name in names]
    if not indices and len(found) == 1:
        return found
    has = ", ".join(sorted(entry.name for entry in folder.iterdir())) or "nothing"
    raise InputError(
        f"{folder} must hold one .safetensors file, or several with one *{INDEX_SUFFIX}; it has "
        f"{has}. Name the file itself if it is another one."
    )


def _shard_names(index: pathlib.Path) -> list[str]:
    """The files that an index names: they lie beside it, and nowhere else."""
    remedy = "Copy it again."
    weight_map = untrusted.read_json(index, remedy).get("weight_map")
    names = weight_map.values() if isinstance(weight_map, dict) else [None]
    odd = [name for name in names if not (isinstance(name, str) and _SHARD_NAME.fullmatch(name))]
    if odd:
        raise InputError(
            f"{index} names {odd[0]!r:.200} as a file of weights; needed: names that end in "
            f".safetensors, of files in its own folder. {remedy}"
        )
    return sorted(set(names))


def is_hub_name(name_or_path: str) -> bool:
    """Whether this is taken for owner/name on the Hugging Face hub: there is no such path here."""
    if files.is_remote(name_or_path) or name_or_path.count("/") != 1:
        return False
    return not _exists(name_or_path)


def fetched_folder(name: str) -> pathlib.Path | None:
    """What lies on this machine of a repository of the hub, perhaps not all; None if nothing does.

    Nothing is fetched, and nobody is asked.
    """
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def local_folder(name_or_path: str, *patterns: str) -> pathlib.Path:
    """A local folder, or that of a repository of the Hugging Face hub, fetched if need be.

    Args:
      name_or_path: Such as "models/Lumina-Image-2.0" or "Alpha-VLLM/Lumina-Image-2.0".
      *patterns: What is needed of a repository, such as "vae/*"; it may have none of it.
    """
    if not is_hub_name(name_or_path):
        folder = local(name_or_path)
        if not folder.is_dir():
            raise InputError(f"{folder} is a file; give the folder that holds it.")
        return folder
    import huggingface_hub  # slow to import, and rarely needed

    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(name_or_path, allow_patterns=list(patterns))
        )
    except Exception as error:  # network, missing name, missing licence: all of its own classes
        raise InputError(
            f"{name_or_path!r} is no local folder, and the Hugging Face hub did not give it "
            f"({type(error).__name__}: {first_line(error)}) Download it and give the folder; gated "
            f"models need `hf auth login`."
        ) from None


def part_of(name_or_path: str, subfolder: str) -> pathlib.Path:
    """The folder of one part of a pipeline, or the root of a repository of that part alone."""
    folder = local_folder(name_or_path, f"{subfolder}/*") / subfolder
    if folder.is_dir():
        return folder
    return local_folder(name_or_path, "*.json", "*.safetensors", "tokenizer*")


def first_line(error: Exception) -> str:
    """What an error of another library says, without its pages."""
    return (str(error).strip() or "no reason given").splitlines()[0]


def fingerprint(weights: Weights) -> str:
    """sha256 over names, shapes, types and 4 KiB from both ends of every tensor.

    A released file is told from another without reading gigabytes at every start.
    """
    digest = hashlib.sha256()
    for name in sorted(weights.shapes):
        shape, dtype = weights.shapes[name], weights.dtypes[name]
        digest.update(json.dumps([name, shape, dtype]).encode())
        rows = tuple(slice(0, size) for size in shape)
        first, last = [rows] * 2
        if len(shape) > 1:
            first, last = (slice(0, 1), *rows[1:]), (slice(shape[0] - 1, shape[0]), *rows[1:])
        digest.update(np.ascontiguousarray(weights.read(name, first)).tobytes()[:4096])
        digest.update(np.ascontiguousarray(weights.read(name, last)).tobytes()[-4096:])
    return digest.hexdigest()


class Entry(NamedTuple):
    """A tensor to be written; `get` makes its value when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    get: Callable[[], np.ndarray]

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


def write_file(path: str | os.PathLike, entries: Iterable[Entry]) -> None:
    """One `.safetensors` or `.pth` file, written aside and renamed; one tensor in memory."""
    entries = list(entries)
    if files.is_remote(path):  # made here, then copied as a whole
        with tempfile.TemporaryDirectory() as folder:
            made = pathlib.Path(folder) / epath.Path(path).name
            write_file(made, entries)
            files.put(made, path)
        return
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.stem}.{uuid.uuid4().hex}{path.suffix}")
    try:
        if path.suffix == ".safetensors":
            _write_safetensors(aside, entries)
        elif path.suffix in _TORCH_SUFFIXES:
            _write_torch(aside, entries)
        else:
            raise InputError(f"{path} must end in .safetensors or {_TORCH_SUFFIXES[0]}.")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_folder(
    folder: str | os.PathLike, stem: str, entries: Iterable[Entry], max_shard_bytes: int
) -> None:
    """`<stem>.safetensors`, or shards of it and an index, as diffusers and transformers do."""
    folder = epath.Path(folder)
    shards: list[list[Entry]] = [[]]
    room = max_shard_bytes
    for entry in entries:
        if shards[-1] and entry.num_bytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(entry)
        room -= entry.num_bytes
    if len(shards) == 1:
        write_file(folder / f"{stem}.safetensors", shards[0])
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / name, shard)
        weight_map |= {entry.name: name for entry in shard}
    total = sum(entry.num_bytes for shard in shards for entry in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    files.write(folder / f"{stem}{INDEX_SUFFIX}", json.dumps(index, indent=2))


def _write_safetensors(path: pathlib.Path, entries: Sequence[Entry]) -> list[int]:
    """Returns where each tensor begins.

    The safetensors package can only write what is in memory whole; the format is a length, a JSON
    header and the bytes (https://github.com/huggingface/safetensors#format).
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end, starts = 0, []
    for entry in entries:
        starts.append(end)
        end += entry.num_bytes
        header[entry.name] = {
            "dtype": _SAFETENSORS_DTYPES[entry.dtype],
            "shape": entry.shape,
            "data_offsets": (starts[-1], end),
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            value = np.asarray(entry.get(), np.dtype(entry.dtype), order="C")
            if value.shape != entry.shape:
                raise ValueError(f"{entry.name} has shape {value.shape}, announced {entry.shape}")
            file.write(value.reshape(-1).view(np.uint8))
    return [8 + len(text) + start for start in starts]


def _write_torch(path: pathlib.Path, entries: Sequence[Entry]) -> None:
    """A state dict; torch.save reads it from a mapped file, so that it is never in memory whole."""
    torch = _import_torch(path)
    spool = path.with_suffix(".spool")
    try:
        starts = _write_safetensors(spool, entries)
        state = collections.OrderedDict()
        for entry, start in zip(entries, starts, strict=True):
            content = np.memmap(spool, np.uint8, "c", start, (entry.num_bytes,))
            state[entry.name] = (
                torch.from_numpy(content).view(getattr(torch, entry.dtype)).reshape(entry.shape)
            )
        torch.save(state, path)
    finally:
        spool.unlink(missing_ok=True)


def _import_torch(path):
    try:
        import torch
    except ImportError:
        raise InputError(
            f"{path}: .pth files need PyTorch: pip install torch. Safetensors need nothing."
        ) from None
    return torch
