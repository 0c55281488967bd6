"""Gemma 2, the text encoder of Lumina-Image 2.0, from the files of transformers or diffusers.

The network is `models/gemma2.py`, the names of its weights are in `weights/gemma2.py`; here are the
tokenizer and what a `TextEncoder` has to offer besides.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, PyTree

from lumina_jax import sharding
from lumina_jax.errors import InputError
from lumina_jax.models import gemma2
from lumina_jax.untrusted import read_json
from lumina_jax.weights import convert, files
from lumina_jax.weights import gemma2 as names
from lumina_jax.weights.tensors import Tensor

_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model")
# What decides over the ids of a caption, as far as a folder has it.
_TOKENIZER_FILES = (
    *_VOCABULARY_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)

# Of the module, not of the encoder: a lock cannot be copied or pickled with it.
_count_lock = threading.Lock()


class Folders(NamedTuple):
    """Where config and weights are, and where the tokenizer is; they may be one folder."""

    text_encoder: pathlib.Path
    tokenizer: pathlib.Path


class Gemma2TextEncoder:
    """The `TextEncoder` of the released model.

    Args:
      path: A folder of diffusers (with text_encoder/ and tokenizer/) or of transformers (all files
        side by side), or the name of such a repository on the Hugging Face hub.
      max_tokens: See `TextEncoder`. The released model saw at most 256.
      dtype: Of weights, computation and features, "bfloat16" as in training or "float32".
      soft_cap: Whether attention bounds its logits, as Gemma 2 was trained. Some attention kernels
        of PyTorch leave it out.
    """

    def __init__(
        self, path: str, *, max_tokens: int, dtype: str = "bfloat16", soft_cap: bool = True
    ):
        if not path:
            raise InputError(
                "text_encoder.path is empty. The text encoder 'gemma2' needs a local folder or a "
                "name on the Hugging Face hub, such as Alpha-VLLM/Lumina-Image-2.0 or "
                "google/gemma-2-2b."
            )
        if max_tokens < 2:
            raise InputError(
                f"max_tokens={max_tokens} leaves no room for a word: Gemma 2 puts a token before "
                "each caption. Give 2 or more; the released model has 256."
            )
        self.folders = _find_folders(path)
        changes = {} if soft_cap else {"attn_logit_softcapping": None}
        self.cfg = _read_config(self.folders.text_encoder, dtype=dtype, **changes)
        self._tokenizer, self._pad_id = _load_tokenizer(self.folders.tokenizer, self.cfg)
        self.feature_dim = self.cfg.hidden_size
        self.max_tokens = max_tokens
        self.num_truncated = 0

    @classmethod
    def of_released_sizes(cls, *, max_tokens: int, dtype: str, soft_cap: bool):
        """One without files, whose programs can be compiled: it cannot tokenize or read weights."""
        encoder = cls.__new__(cls)
        changes = {} if soft_cap else {"attn_logit_softcapping": None}
        encoder.cfg = gemma2.Gemma2Config(dtype=dtype, **changes)
        encoder.feature_dim, encoder.max_tokens = encoder.cfg.hidden_size, max_tokens
        encoder.num_truncated = 0
        return encoder

    def abstract_params(self) -> PyTree:
        """Shapes and types of the weights."""
        return gemma2.abstract_params(self.cfg)

    def placed_params(self, mesh: jax.sharding.Mesh) -> PyTree:
        return sharding.placed(self.abstract_params(), mesh, sharding.GEMMA2_RULES)

    def load_params(self, mesh: jax.sharding.Mesh) -> PyTree:
        abstract = self.abstract_params()
        shardings = sharding.tree_shardings(abstract, mesh, sharding.GEMMA2_RULES)
        with files.open_weights(self.folders.text_encoder) as weights:
            tensors, ignored = self._tensors(weights)
            return convert.load(weights, tensors, abstract, shardings, ignored=ignored)

    def check_weights(self) -> None:
        with files.open_weights(self.folders.text_encoder) as weights:
            convert.check(weights, *self._tensors(weights))

    def _tensors(self, weights: files.Weights) -> tuple[list[Tensor], Callable[[str], bool]]:
        """The table of what is read, and a test of the names of what may be there besides."""
        prefix = names.find_prefix(weights.shapes)
        ignored = functools.partial(names.is_ignored, cfg=self.cfg, prefix=prefix)
        return list(names.tensors(self.cfg, prefix)), ignored

    def fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps(dataclasses.asdict(self.cfg)).encode())
        for name in _TOKENIZER_FILES:
            if (file := self.folders.tokenizer / name).exists():
                digest.update(f"{name} {file.stat().st_size} ".encode() + file.read_bytes())
        with files.open_weights(self.folders.text_encoder) as weights:
            digest.update(files.fingerprint(weights).encode())
        return f"gemma2 {digest.hexdigest()} max_tokens={self.max_tokens}"

    def tokenize(
        self, captions: Sequence[str], num_slots: int | None = None
    ) -> tuple[Int32[np.ndarray, "n S"], Bool[np.ndarray, "n S"]]:
        num_slots = num_slots or self.max_tokens
        token_ids = np.full((len(captions), num_slots), self._pad_id, np.int32)
        token_mask = np.zeros((len(captions), num_slots), bool)
        num_truncated = 0
        for row, encoded in enumerate(self._tokenizer.encode_batch(list(captions))):
            ids = encoded.ids
            num_truncated += len(ids) > num_slots
            ids = ids[:num_slots]
            token_ids[row, : len(ids)] = ids
            token_mask[row, : len(ids)] = True
        with _count_lock:
            self.num_truncated += num_truncated
        return token_ids, token_mask

    def encode(
        self, params: PyTree, token_ids: Int32[Array, "B S"], token_mask: Bool[Array, "B S"]
    ) -> Float[Array, "B S F"]:
        return gemma2.make_encode(self.cfg)(params, token_ids, token_mask)


def _find_folders(path: str) -> Folders:
    folder = files.part_of(path, "text_encoder")
    if folder.name != "text_encoder":
        return Folders(folder, folder)
    return Folders(folder, files.part_of(path, "tokenizer"))


def _read_config(folder: pathlib.Path, **changes) -> gemma2.Gemma2Config:
    file = folder / "config.json"
    if not file.exists():
        has = ", ".join(sorted(entry.name for entry in folder.iterdir())) or "nothing"
        raise InputError(
            f"{folder} is no text encoder: it has no config.json but {has}. Give a folder with "
            f"text_encoder/ and tokenizer/ in it, or one with config.json, safetensors and "
            f"tokenizer files."
        )
    return gemma2.Gemma2Config.from_json(read_json(file, "Copy it again."), **changes)


def _load_tokenizer(folder: pathlib.Path, cfg: gemma2.Gemma2Config):
    """The tokenizer of a folder and the id that fills up a row.

    transformers keeps truncation and padding as state of the tokenizer and sets both at each call,
    so calls from several threads would disturb each other. The backend inside it, with both off for
    good, is only read from then on; it can be pickled too, and is all that is kept.
    """
    import transformers  # here, because it takes seconds and other encoders need none of it

    if not any((folder / name).exists() for name in _VOCABULARY_FILES):
        # transformers would make an empty tokenizer out of a config.json alone.
        raise InputError(
            f"{folder} has no tokenizer: none of {', '.join(_VOCABULARY_FILES)} is there. Copy the "
            f"tokenizer files of the text encoder into it."
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder.absolute(),
            local_files_only=True,
            trust_remote_code=False,  # else it asks whether to run what the folder brings
        )
        backend = tokenizer.backend_tokenizer
    except Exception as error:  # of many classes, down to the bare Exception of its Rust part
        raise InputError(
            f"transformers cannot load the tokenizer in {folder} ({type(error).__name__}: "
            f"{str(error).strip().splitlines()[0]}). Copy its files again."
        ) from None
    backend.no_truncation()
    backend.no_padding()
    if (empty := backend.encode("").ids) != [tokenizer.bos_token_id]:
        raise InputError(
            f"The tokenizer in {folder} turns an empty caption into the ids {empty}. Gemma 2 was "
            f"trained with its <bos> before a caption and nothing after it: give its own tokenizer."
        )
    if (size := backend.get_vocab_size()) > cfg.vocab_size:
        raise InputError(
            f"The tokenizer in {folder} has {size} tokens and the text encoder only "
            f"{cfg.vocab_size}: they do not belong together."
        )
    return backend, tokenizer.pad_token_id
