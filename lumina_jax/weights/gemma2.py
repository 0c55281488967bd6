"""Names of transformers' Gemma 2 for our parameters."""

from collections.abc import Collection, Iterator

from flax import traverse_util

from lumina_jax.models.gemma2 import Gemma2Config, abstract_params
from lumina_jax.weights.tensors import Tensor

_TABLE = "embed_tokens.weight"

# Path inside a block -> name inside a layer.
_BLOCK = {
    "attention/q/kernel": "self_attn.q_proj.weight",
    "attention/k/kernel": "self_attn.k_proj.weight",
    "attention/v/kernel": "self_attn.v_proj.weight",
    "attention/out/kernel": "self_attn.o_proj.weight",
    "feed_forward/gate/kernel": "mlp.gate_proj.weight",
    "feed_forward/up/kernel": "mlp.up_proj.weight",
    "feed_forward/down/kernel": "mlp.down_proj.weight",
    "attention_norm1/scale": "input_layernorm.weight",
    "attention_norm2/scale": "post_attention_layernorm.weight",
    "ffn_norm1/scale": "pre_feedforward_layernorm.weight",
    "ffn_norm2/scale": "post_feedforward_layernorm.weight",
}


def find_prefix(names: Collection[str]) -> str:
    """Before every name: none in a `Gemma2Model`, "model." in the language model around one."""
    return "model." if f"model.{_TABLE}" in names else ""


def tensors(cfg: Gemma2Config, prefix: str = "") -> Iterator[Tensor]:
    """Every tensor that is read, in the order of our parameters."""
    for path, leaf in traverse_util.flatten_dict(abstract_params(cfg), sep="/").items():
        stack, _, inside = path.partition("/")
        if stack != "layers":
            yield Tensor(prefix + _TABLE, path, None, leaf.shape)
            continue
        layout = "linear" if path.endswith("kernel") else "same"
        # The output projection of attention reads heads and head_dim; all others read one dim.
        inputs = 2 if inside == "attention/out/kernel" else 1
        for layer in range(leaf.shape[0]):
            name = f"{prefix}layers.{layer}.{_BLOCK[inside]}"
            yield Tensor(name, path, layer, leaf.shape[1:], layout, inputs)


def is_ignored(name: str, cfg: Gemma2Config, prefix: str = "") -> bool:
    """Whether a tensor is expected and not read: it comes after the features."""
    last_layer = f"{prefix}layers.{cfg.num_hidden_layers - 1}."
    return name.startswith(last_layer) or name in (f"{prefix}norm.weight", "lm_head.weight")
