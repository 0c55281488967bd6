"""The names that others give to the parameters of the Unified Next-DiT, and to its sizes.

    diffusers   Lumina2Transformer2DModel: 459 tensors of the released model
    official    `consolidated.*.pth` of Lumina-Image-2.0: 400 tensors; q, k and v are one matrix
    comfyui     the official names, bare or behind "model.diffusion_model."

Official files hold a `norm_final` that no forward pass uses: it is not read, and written as ones.
"""

import contextlib
import json
import math
import os
import pathlib
import re
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from flax import traverse_util

from lumina_jax.errors import InputError
from lumina_jax.files import write as write_aside
from lumina_jax.models.next_dit import STACKS, NextDiTConfig, abstract_params
from lumina_jax.untrusted import MAX_WIDTH, is_positive, is_whole, number_faults, read_json
from lumina_jax.weights import convert, files
from lumina_jax.weights.files import Entry, Weights
from lumina_jax.weights.tensors import Tensor

COMFYUI_PREFIX = "model.diffusion_model."
UNUSED = "norm_final.weight"

# Our path: name in diffusers, name in the official file.
_OUTER = {
    "x_embedder/kernel": ("x_embedder.weight",) * 2,
    "x_embedder/bias": ("x_embedder.bias",) * 2,
    "t_embedder/hidden/kernel": (
        "time_caption_embed.timestep_embedder.linear_1.weight", "t_embedder.mlp.0.weight",
    ),
    "t_embedder/hidden/bias": (
        "time_caption_embed.timestep_embedder.linear_1.bias", "t_embedder.mlp.0.bias",
    ),
    "t_embedder/out/kernel": (
        "time_caption_embed.timestep_embedder.linear_2.weight", "t_embedder.mlp.2.weight",
    ),
    "t_embedder/out/bias": (
        "time_caption_embed.timestep_embedder.linear_2.bias", "t_embedder.mlp.2.bias",
    ),
    "cap_embedder/norm/scale": (
        "time_caption_embed.caption_embedder.0.weight", "cap_embedder.0.weight",
    ),
    "cap_embedder/linear/kernel": (
        "time_caption_embed.caption_embedder.1.weight", "cap_embedder.1.weight",
    ),
    "cap_embedder/linear/bias": (
        "time_caption_embed.caption_embedder.1.bias", "cap_embedder.1.bias",
    ),
    "final_layer/modulation/kernel": (
        "norm_out.linear_1.weight", "final_layer.adaLN_modulation.1.weight",
    ),
    "final_layer/modulation/bias": (
        "norm_out.linear_1.bias", "final_layer.adaLN_modulation.1.bias",
    ),
    "final_layer/linear/kernel": ("norm_out.linear_2.weight", "final_layer.linear.weight"),
    "final_layer/linear/bias": ("norm_out.linear_2.bias", "final_layer.linear.bias"),
}  # fmt: skip

# The same inside a block.
_BLOCK = {
    "attention/q/kernel": ("attn.to_q.weight", "attention.qkv.weight"),
    "attention/k/kernel": ("attn.to_k.weight", "attention.qkv.weight"),
    "attention/v/kernel": ("attn.to_v.weight", "attention.qkv.weight"),
    "attention/out/kernel": ("attn.to_out.0.weight", "attention.out.weight"),
    "attention/q_norm/scale": ("attn.norm_q.weight", "attention.q_norm.weight"),
    "attention/k_norm/scale": ("attn.norm_k.weight", "attention.k_norm.weight"),
    "feed_forward/gate/kernel": ("feed_forward.linear_1.weight", "feed_forward.w1.weight"),
    "feed_forward/up/kernel": ("feed_forward.linear_3.weight", "feed_forward.w3.weight"),
    "feed_forward/down/kernel": ("feed_forward.linear_2.weight", "feed_forward.w2.weight"),
    "attention_norm1/scale": ("norm1.norm.weight", "attention_norm1.weight"),
    "attention_norm2/scale": ("norm2.weight", "attention_norm2.weight"),
    "ffn_norm1/scale": ("ffn_norm1.weight",) * 2,
    "ffn_norm2/scale": ("ffn_norm2.weight",) * 2,
    "modulation/kernel": ("norm1.linear.weight", "adaLN_modulation.1.weight"),
    "modulation/bias": ("norm1.linear.bias", "adaLN_modulation.1.bias"),
}
# A block without modulation has no wrapper around its first norm in diffusers.
_PLAIN_NORM = ("norm1.weight", "attention_norm1.weight")

# In the config.json of diffusers' transformer.
_CONFIG_SIZES = (
    "hidden_size", "num_layers", "num_refiner_layers", "num_attention_heads", "num_kv_heads",
    "multiple_of", "in_channels", "patch_size", "cap_feat_dim",
)  # fmt: skip

_COLUMN = {"diffusers": 0, "official": 1}
FORMATS = ("diffusers", "official", "comfyui")


@contextlib.contextmanager
def open_transformer(path: str | os.PathLike, **known: Any) -> Iterator["Source"]:
    """The weights at `path` and what they are of.

    Args:
      path: A diffusers pipeline or its transformer folder, local or on the Hugging Face hub, or an
        official or ComfyUI file, `.safetensors` or `.pth`.
      **known: Fields of NextDiTConfig that a lone file does not tell, such as `patch_size`.
    """
    path = files.part_of(os.fspath(path), "transformer") if _is_folder(path) else files.local(path)
    with files.open_weights(path) as weights:
        format = detect_format(weights.shapes)
        config = path / "config.json"
        if config.exists():
            cfg = from_diffusers_config(read_json(config, "Copy it again."))
        else:
            cfg = sizes_of(weights, format, **known)
        yield Source(weights, format, cfg)


class Source(NamedTuple):
    """An open transformer of somebody's."""

    weights: Weights
    format: str
    cfg: NextDiTConfig

    @property
    def dtype(self) -> str:
        """The type of its tensors, float32 where they have several."""
        names = convert.their_shapes(self.tensors())
        dtypes = {self.weights.dtypes[name] for name in names if name in self.weights.dtypes}
        return min(dtypes) if len(dtypes) == 1 and dtypes <= files.READABLE else "float32"

    def tensors(self) -> Iterator[Tensor]:
        return tensors(self.cfg, self.format)

    def load(self, abstract: Any, shardings: Any) -> dict:
        """Our parameters, see `convert.load`."""
        return convert.load(
            self.weights,
            self.tensors(),
            abstract,
            shardings,
            ignored=self._is_unused,
        )

    def check(self) -> None:
        """Refuses what `load` would refuse, see `convert.check`; reads nothing."""
        convert.check(self.weights, self.tensors(), self._is_unused)

    def _is_unused(self, name: str) -> bool:
        return is_unused(name, self.format)


def save(
    path: str | os.PathLike,
    params: Any,
    cfg: NextDiTConfig,
    *,
    format: str,
    dtype: str | None = None,
    sample_size: int = 128,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes our parameters for others.

    Args:
      path: A new folder for diffusers; a `.safetensors` or `.pth` file for the other formats.
      params: Of a model of the sizes `cfg`.
      cfg: Those sizes.
      format: One of FORMATS.
      dtype: To write, "float32" or "bfloat16"; that of the parameters by default.
      sample_size: Of diffusers' config: the side of its pictures by default, in latents.
      max_shard_bytes: Of one file in a folder.
    """
    path = epath.Path(path)
    entries = convert.entries(params, tensors(cfg, format), dtype)
    if format == "diffusers":
        check_new(path)  # an index of another time would be read before what is written now
        config = to_diffusers_config(cfg) | {"sample_size": sample_size}
        files.write_folder(path, "diffusion_pytorch_model", entries, max_shard_bytes)
        write_aside(path / "config.json", json.dumps(config, indent=2) + "\n")
    else:
        files.write_file(path, entries + unused(cfg, format, entries[0].dtype))


def check_new(folder: epath.PathLike) -> None:
    """Refuses a folder that has files already."""
    folder = epath.Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} has files already. Name a folder that does not exist.")


def _is_folder(path):
    return pathlib.Path(path).suffix not in (".safetensors", ".pth", ".pt")


def tensors(cfg: NextDiTConfig, format: str) -> Iterator[Tensor]:
    """Every tensor of a model of these sizes, in the order of our parameters.

    `format` is one of FORMATS; "official" stands for ComfyUI's bare names too.
    """
    prefix = COMFYUI_PREFIX if format == "comfyui" else ""
    column = _COLUMN["diffusers" if format == "diffusers" else "official"]
    q_rows, kv_rows = cfg.dim, cfg.num_kv_heads * cfg.head_dim
    first_rows = {"attention/k/kernel": q_rows, "attention/v/kernel": q_rows + kv_rows}
    for path, leaf in traverse_util.flatten_dict(abstract_params(cfg), sep="/").items():
        stack, _, inside = path.partition("/")
        # The output projection of attention reads heads and head_dim; all others read one dim.
        layout = {"layout": "linear"} if path.endswith("kernel") else {}
        if inside == "attention/out/kernel":
            layout["num_input_dims"] = 2
        if stack not in STACKS:
            yield Tensor(prefix + _OUTER[path][column], path, None, leaf.shape, **layout)
            continue
        names = _BLOCK[inside]
        if stack == "context_refiner" and inside == "attention_norm1/scale":
            names = _PLAIN_NORM
        if format != "diffusers":
            layout["first_row"] = first_rows.get(inside, 0)
        for layer in range(leaf.shape[0]):
            name = f"{prefix}{stack}.{layer}.{names[column]}"
            yield Tensor(name, path, layer, leaf.shape[1:], **layout)


def unused(cfg: NextDiTConfig, format: str, dtype: str) -> list[Entry]:
    """What the official program wants to find in a file, though it never uses it."""
    if format == "diffusers":
        return []
    name = (COMFYUI_PREFIX if format == "comfyui" else "") + UNUSED
    return [Entry(name, (cfg.dim,), dtype, lambda: np.ones(cfg.dim, np.dtype(dtype)))]


def is_unused(name: str, format: str) -> bool:
    """Whether a tensor may be left out: `norm_final`, and other models in a file of ComfyUI's."""
    if format == "comfyui" and not name.startswith(COMFYUI_PREFIX):
        return True
    return format != "diffusers" and name.removeprefix(COMFYUI_PREFIX) == UNUSED


def detect_format(names: Collection[str]) -> str:
    """Whose names these are."""
    for format, marker in (
        ("diffusers", "layers.0.attn.to_q.weight"),
        ("official", "layers.0.attention.qkv.weight"),
        ("comfyui", f"{COMFYUI_PREFIX}layers.0.attention.qkv.weight"),
    ):
        if marker in names:
            return format
    raise InputError(
        f"These are not the weights of a Lumina-Image 2.0 transformer in any known naming "
        f"({', '.join(FORMATS)}); their first names are {', '.join(sorted(names)[:5])}."
    )


def sizes_of(weights: Weights, format: str, **known: Any) -> NextDiTConfig:
    """The sizes of a model from the shapes of its tensors.

    A file says neither patch size nor how a head is shared among the axes of position: 2, and equal
    parts as in every released size, unless they are among `known`.
    """
    shapes = weights.shapes
    if format == "comfyui":
        shapes = {
            name.removeprefix(COMFYUI_PREFIX): shape
            for name, shape in shapes.items()
            if name.startswith(COMFYUI_PREFIX)
        }
    column = _COLUMN["diffusers" if format == "diffusers" else "official"]

    def shape(path, num_dims=2):
        name = _OUTER.get(path, ("", ""))[column] or f"layers.0.{_BLOCK[path][column]}"
        found = shapes.get(name, ())
        if len(found) != num_dims or 0 in found:
            raise InputError(
                f"{weights.path} lacks {name} of {num_dims} dim(s), which tells the size of the "
                f"model; found there: {shapes.get(name, 'nothing')}."
            )
        return found

    def count(stack):
        found = [re.match(rf"{stack}\.(\d+)\.", name) for name in shapes]
        return 1 + max((int(match[1]) for match in found if match), default=-1)

    dim, patch_dim = shape("x_embedder/kernel")
    (head_dim,) = shape("attention/q_norm/scale", 1)
    kv_rows = shape("attention/k/kernel")[0]
    if format != "diffusers":  # q, k and v in one
        kv_rows = (kv_rows - dim) // 2
    sizes = {
        "dim": dim,
        "num_layers": count("layers"),
        "num_refiner_layers": count("noise_refiner"),
        "num_heads": dim // head_dim,
        "num_kv_heads": kv_rows // head_dim,
        "hidden_dim": shape("feed_forward/gate/kernel")[0],
        "patch_size": 2,
        "cap_feat_dim": shape("cap_embedder/linear/kernel")[1],
    }
    if head_dim % 6 == 0:
        sizes["axes_dims"] = (head_dim // 3,) * 3
    sizes |= known
    if "axes_dims" not in sizes:
        raise InputError(
            f"{weights.path} does not say how the {head_dim} features of a head are shared among "
            f"caption index, row and column. Give axes_dims, three even numbers of that sum."
        )
    return NextDiTConfig(in_channels=patch_dim // sizes["patch_size"] ** 2, **sizes)


def from_diffusers_config(config: dict) -> NextDiTConfig:
    """Our sizes from the config.json of diffusers' transformer."""
    if (name := config.get("_class_name")) != "Lumina2Transformer2DModel":
        raise InputError(
            f"This transformer is a {name}; needed: Lumina2Transformer2DModel, that of "
            f"Lumina-Image 2.0."
        )
    sizes = dict.fromkeys(_CONFIG_SIZES) | config
    faults = number_faults(sizes, _CONFIG_SIZES, 1, MAX_WIDTH)
    factor = config.get("ffn_dim_multiplier")
    if factor is not None and not (is_positive(factor) and factor <= MAX_WIDTH):
        faults.append(f"ffn_dim_multiplier={factor!r:.60} is not a positive number")
    axes = config.get("axes_dim_rope")
    if not isinstance(axes, list) or not all(is_whole(n, 0, MAX_WIDTH) for n in axes):
        faults.append(f"axes_dim_rope={axes!r:.60} is not a list of whole numbers")
    if not is_positive(config.get("norm_eps")):
        faults.append(f"norm_eps={config.get('norm_eps')!r:.60} is not a positive number")
    if faults:
        raise InputError(f"This transformer's config.json is damaged: {'; '.join(faults)}.")
    if config.get("out_channels") not in (None, config["in_channels"]):
        raise InputError(
            f"out_channels={config['out_channels']} differs from in_channels="
            f"{config['in_channels']}, which is not supported."
        )
    inner = 4 * config["hidden_size"]
    if factor is not None:
        inner = int(factor * inner)
    return NextDiTConfig(
        dim=config["hidden_size"],
        num_layers=config["num_layers"],
        num_refiner_layers=config["num_refiner_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_kv_heads"],
        hidden_dim=config["multiple_of"] * math.ceil(inner / config["multiple_of"]),
        axes_dims=tuple(axes),
        in_channels=config["in_channels"],
        patch_size=config["patch_size"],
        cap_feat_dim=config["cap_feat_dim"],
        norm_eps=float(config["norm_eps"]),
    )


def to_diffusers_config(cfg: NextDiTConfig) -> dict:
    """The config.json of diffusers' transformer of these sizes."""
    if cfg.rope_theta != 10000:
        raise InputError(f"rope_theta={cfg.rope_theta}: diffusers' transformer knows 10000 only.")
    inner = 4 * cfg.dim
    by_rounding = 256 * math.ceil(inner / 256) == cfg.hidden_dim
    return {
        "_class_name": "Lumina2Transformer2DModel",
        "axes_dim_rope": list(cfg.axes_dims),
        "axes_lens": [300, 512, 512],
        "cap_feat_dim": cfg.cap_feat_dim,
        "ffn_dim_multiplier": None if by_rounding else cfg.hidden_dim / inner,
        "hidden_size": cfg.dim,
        "in_channels": cfg.in_channels,
        "multiple_of": 256 if by_rounding else cfg.hidden_dim,
        "norm_eps": cfg.norm_eps,
        "num_attention_heads": cfg.num_heads,
        "num_kv_heads": cfg.num_kv_heads,
        "num_layers": cfg.num_layers,
        "num_refiner_layers": cfg.num_refiner_layers,
        "out_channels": None,
        "patch_size": cfg.patch_size,
        "sample_size": 128,
        "scaling_factor": 1.0,
    }
