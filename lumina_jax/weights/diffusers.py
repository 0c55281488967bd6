"""The names that diffusers gives to our parameters, and the way there and back.

A torch linear layer keeps its weight as [outputs, inputs]; our kernels are [inputs, outputs], with
heads as dims of their own, and equal blocks are stacked along a leading dim.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from flax import traverse_util

from lumina_jax.errors import InputError
from lumina_jax.models.next_dit import NextDiTConfig, abstract_params

# Our path -> name in diffusers.Lumina2Transformer2DModel.
_OUTER = {
    "x_embedder/kernel": "x_embedder.weight",
    "x_embedder/bias": "x_embedder.bias",
    "t_embedder/hidden/kernel": "time_caption_embed.timestep_embedder.linear_1.weight",
    "t_embedder/hidden/bias": "time_caption_embed.timestep_embedder.linear_1.bias",
    "t_embedder/out/kernel": "time_caption_embed.timestep_embedder.linear_2.weight",
    "t_embedder/out/bias": "time_caption_embed.timestep_embedder.linear_2.bias",
    "cap_embedder/norm/scale": "time_caption_embed.caption_embedder.0.weight",
    "cap_embedder/linear/kernel": "time_caption_embed.caption_embedder.1.weight",
    "cap_embedder/linear/bias": "time_caption_embed.caption_embedder.1.bias",
    "final_layer/modulation/kernel": "norm_out.linear_1.weight",
    "final_layer/modulation/bias": "norm_out.linear_1.bias",
    "final_layer/linear/kernel": "norm_out.linear_2.weight",
    "final_layer/linear/bias": "norm_out.linear_2.bias",
}

# Path inside a block -> name inside a block.
_BLOCK = {
    "attention/q/kernel": "attn.to_q.weight",
    "attention/k/kernel": "attn.to_k.weight",
    "attention/v/kernel": "attn.to_v.weight",
    "attention/out/kernel": "attn.to_out.0.weight",
    "attention/q_norm/scale": "attn.norm_q.weight",
    "attention/k_norm/scale": "attn.norm_k.weight",
    "feed_forward/gate/kernel": "feed_forward.linear_1.weight",
    "feed_forward/up/kernel": "feed_forward.linear_3.weight",
    "feed_forward/down/kernel": "feed_forward.linear_2.weight",
    "attention_norm1/scale": "norm1.norm.weight",
    "attention_norm2/scale": "norm2.weight",
    "ffn_norm1/scale": "ffn_norm1.weight",
    "ffn_norm2/scale": "ffn_norm2.weight",
    "modulation/kernel": "norm1.linear.weight",
    "modulation/bias": "norm1.linear.bias",
}
_UNMODULATED_BLOCK = {**_BLOCK, "attention_norm1/scale": "norm1.weight"}

_STACKS = {
    "context_refiner": _UNMODULATED_BLOCK,
    "noise_refiner": _BLOCK,
    "layers": _BLOCK,
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of theirs and the place in our parameters that it fills.

    `layer` is the index along the leading dim of a stack; None outside of stacks.
    """

    name: str
    path: str
    layer: int | None
    our_shape: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in their file."""
        if not self.path.endswith("kernel"):
            return self.our_shape
        inputs = self._num_input_dims()
        return math.prod(self.our_shape[inputs:]), math.prod(self.our_shape[:inputs])

    def to_ours(self, value: np.ndarray) -> np.ndarray:
        return (value.T if value.ndim == 2 else value).reshape(self.our_shape)

    def to_theirs(self, value: np.ndarray) -> np.ndarray:
        shape = self.shape
        return value.reshape(shape[::-1]).T if len(shape) == 2 else value

    def _num_input_dims(self) -> int:
        # The output projection of attention reads heads and head_dim; all others read one dim.
        return 2 if self.path.endswith("attention/out/kernel") else 1


def diffusers_tensors(cfg: NextDiTConfig) -> Iterator[Tensor]:
    """Every tensor of the diffusers model of these sizes, in the order of our parameters."""
    for path, leaf in traverse_util.flatten_dict(abstract_params(cfg), sep="/").items():
        stack, _, inside = path.partition("/")
        if stack not in _STACKS:
            yield Tensor(_OUTER[path], path, None, leaf.shape)
            continue
        for layer in range(leaf.shape[0]):
            name = f"{stack}.{layer}.{_STACKS[stack][inside]}"
            yield Tensor(name, path, layer, leaf.shape[1:])


def from_diffusers(tensors: Mapping[str, np.ndarray], cfg: NextDiTConfig) -> dict:
    """Our parameters from theirs, as numpy arrays; every fault is listed in one InputError."""
    wanted = list(diffusers_tensors(cfg))
    faults = [f"unexpected {name}" for name in sorted(set(tensors) - {t.name for t in wanted})]
    for tensor in wanted:
        if tensor.name not in tensors:
            faults.append(f"missing {tensor.name}")
        elif tensors[tensor.name].shape != tensor.shape:
            faults.append(
                f"{tensor.name} has shape {tensors[tensor.name].shape}, needed {tensor.shape}"
            )
    if faults:
        raise InputError(
            f"These weights do not fit a model of {cfg}: {len(faults)} fault(s):\n  "
            + "\n  ".join(faults)
        )

    flat: dict[str, np.ndarray | list] = {}
    for tensor in wanted:
        value = tensor.to_ours(tensors[tensor.name])
        if tensor.layer is None:
            flat[tensor.path] = value
        else:
            flat.setdefault(tensor.path, []).append(value)
    flat = {path: np.stack(v) if isinstance(v, list) else v for path, v in flat.items()}
    return traverse_util.unflatten_dict(flat, sep="/")


def to_diffusers(params: dict, cfg: NextDiTConfig) -> dict[str, np.ndarray]:
    """Their tensors from our parameters."""
    flat = traverse_util.flatten_dict(jax.device_get(params), sep="/")
    result = {}
    for tensor in diffusers_tensors(cfg):
        value = np.asarray(flat[tensor.path])
        result[tensor.name] = tensor.to_theirs(
            value if tensor.layer is None else value[tensor.layer]
        )
    return result
