"""The names that diffusers.AutoencoderKL gives to the parameters of our autoencoder."""

import json
from collections.abc import Iterator

from etils import epath
from flax import traverse_util

from lumina_jax import files
from lumina_jax.models.vae import VAEConfig, abstract_params
from lumina_jax.weights import convert
from lumina_jax.weights.files import write_file
from lumina_jax.weights.tensors import Tensor

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"

# Part of a path of ours -> the same in theirs; what is not named here is called alike.
_THEIRS = {
    "downsample/": "downsamplers/0/conv/",
    "upsample/": "upsamplers/0/conv/",
    "attention/norm/": "attentions/0/group_norm/",
    "attention/q/": "attentions/0/to_q/",
    "attention/k/": "attentions/0/to_k/",
    "attention/v/": "attentions/0/to_v/",
    "attention/out/": "attentions/0/to_out/0/",
    "/kernel": "/weight",
    "/scale": "/weight",
}
_LAYOUTS = {1: "same", 2: "linear", 4: "conv"}


def tensors(cfg: VAEConfig) -> Iterator[Tensor]:
    """Every tensor of the diffusers autoencoder of these sizes, in the order of our parameters."""
    for path, leaf in traverse_util.flatten_dict(abstract_params(cfg), sep="/").items():
        name = path
        for ours, theirs in _THEIRS.items():
            name = name.replace(ours, theirs)
        yield Tensor(name.replace("/", "."), path, None, leaf.shape, _LAYOUTS[leaf.ndim])


def save(folder: epath.PathLike, cfg: VAEConfig, params: dict) -> None:
    """Writes what `diffusers.AutoencoderKL.from_pretrained` reads."""
    folder = epath.Path(folder)
    write_file(folder / WEIGHTS_FILE, convert.entries(params, tensors(cfg)))
    files.write(folder / CONFIG_FILE, json.dumps(cfg.to_json(), indent=2))
