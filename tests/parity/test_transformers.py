"""Our features equal `hidden_states[-2]` of transformers.Gemma2Model.

Random weights, every one of them, go through files and the production name table.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import tiny_lumina2  # noqa: E402

from lumina_jax import sharding  # noqa: E402
from lumina_jax.models import gemma2  # noqa: E402
from lumina_jax.weights import convert, files  # noqa: E402
from lumina_jax.weights import gemma2 as names  # noqa: E402

pytestmark = pytest.mark.parity

# Changes to the sizes of tiny_lumina2. A sequence has 24 slots, all of which the window holds
# unless it is given. transformers applies the cap in eager attention; "sdpa", which cannot, it now
# refuses for Gemma 2, and versions that allowed it computed as without a cap.
CONFIGS = {
    "capped": {},
    "window": {"sliding_window": 5},
    "window of one": {"sliding_window": 1, "attn_logit_softcapping": 5.0},
    # As many key heads as heads, an odd number of layers, wide heads, another theta.
    "other sizes": {
        "hidden_size": 48, "intermediate_size": 200, "num_hidden_layers": 7,
        "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 32,
        "query_pre_attn_scalar": 144, "sliding_window": 9, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
    # All query heads on one key head, no cap, and layers of another order.
    "uncapped": {
        "num_key_value_heads": 1, "sliding_window": 3, "attn_logit_softcapping": None,
        "layer_types": ["full_attention", *["sliding_attention"] * 2, "full_attention"],
    },
}  # fmt: skip

LENGTHS = (24, 17, 8, 4, 1)


def make_pair(folder, dtype="float32", **changes):
    """Our config and parameters, and their model with the same weights."""
    theirs = tiny_lumina2.make_gemma(**changes)
    theirs.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    cfg = gemma2.Gemma2Config.from_json(config, dtype=dtype)
    return cfg, load(cfg, folder), theirs.to(getattr(torch, dtype))


def load(cfg, folder):
    mesh = sharding.make_mesh(replica=1, data=1, model=1, devices=jax.devices()[:1])
    abstract = gemma2.abstract_params(cfg)
    shardings = sharding.tree_shardings(abstract, mesh, sharding.GEMMA2_RULES)
    with files.open_weights(folder) as weights:
        return convert.load(
            weights,
            names.tensors(cfg),
            abstract,
            shardings,
            ignored=lambda name: names.is_ignored(name, cfg),
        )


def make_inputs(cfg):
    rng = np.random.default_rng(1)
    token_mask = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
    token_ids = rng.integers(5, cfg.vocab_size, token_mask.shape, dtype=np.int32)
    return np.where(token_mask, token_ids, 0), token_mask


def call_ours(cfg, params, token_ids, token_mask):
    features = jax.jit(gemma2.make_encode(cfg))(params, token_ids, token_mask)
    assert features.dtype == cfg.dtype
    return np.asarray(features, np.float32)


def call_theirs(model, token_ids, token_mask):
    with torch.no_grad():
        output = model(
            torch.as_tensor(token_ids),
            attention_mask=torch.as_tensor(token_mask),
            output_hidden_states=True,
        )
    return output.hidden_states[-2].float().numpy() * token_mask[..., None]


@pytest.mark.parametrize(
    "name",
    [
        "capped",
        "uncapped",
        "other sizes",
        pytest.param("window", marks=pytest.mark.slow),
        pytest.param("window of one", marks=pytest.mark.slow),
    ],
)
def test_features_equal_transformers(name, tmp_path):
    cfg, params, theirs = make_pair(tmp_path, **CONFIGS[name])
    inputs = make_inputs(cfg)
    expected = call_theirs(theirs, *inputs)
    error = np.abs(call_ours(cfg, params, *inputs) - expected).max() / np.abs(expected).max()
    assert error <= 2e-5


def test_the_soft_cap_and_the_window_are_not_in_vain(tmp_path):
    """Both move the features, so that the equality above says something."""
    cfg, params, _ = make_pair(tmp_path)
    inputs = make_inputs(cfg)
    features = call_ours(cfg, params, *inputs)
    for change in ({"attn_logit_softcapping": None}, {"sliding_window": 5}):
        other = call_ours(dataclasses.replace(cfg, **change), params, *inputs)
        assert np.linalg.norm(other - features) > 0.02 * np.linalg.norm(features)


def test_in_bfloat16_we_are_as_near_to_the_truth_as_they_are(tmp_path):
    cfg, params, theirs = make_pair(tmp_path, "bfloat16")
    inputs = make_inputs(cfg)
    # The truth: the same rounded weights, computed in float32.
    truth = call_ours(
        dataclasses.replace(cfg, dtype="float32"),
        jax.tree.map(lambda leaf: leaf.astype(np.float32), params),
        *inputs,
    )

    def error(features):
        return float(np.linalg.norm(features - truth) / np.linalg.norm(truth))

    ours, other = error(call_ours(cfg, params, *inputs)), error(call_theirs(theirs, *inputs))
    assert ours < 1.25 * other < 0.1


@pytest.mark.parametrize("prefix", ["", "model."])
def test_the_released_size_has_the_names_and_shapes_of_transformers(prefix):
    cls = transformers.Gemma2ForCausalLM if prefix else transformers.Gemma2Model
    with torch.device("meta"):
        theirs = cls(transformers.Gemma2Config())
    theirs = {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
    assert names.find_prefix(theirs) == prefix

    cfg = gemma2.Gemma2Config()
    ours = {tensor.name: tensor.shape for tensor in names.tensors(cfg, prefix)}
    ignored = {name for name in theirs if names.is_ignored(name, cfg, prefix)}
    assert ours == {name: shape for name, shape in theirs.items() if name not in ignored}
    assert len(ours) == 1 + 25 * 11
    assert sum(np.prod(shape, dtype=np.int64) for shape in ours.values()) == 2_536_473_600
