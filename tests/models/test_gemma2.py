"""The network of the text encoder by itself; tests/parity compares it with transformers."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

from lumina_jax import sharding
from lumina_jax.errors import InputError
from lumina_jax.models import gemma2
from lumina_jax.sharding import GEMMA2_RULES

# Every dim is divided by every mesh below, and the vocabulary is like no other dim.
CFG = gemma2.Gemma2Config(
    vocab_size=88,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=6,
    query_pre_attn_scalar=16.0,
    sliding_window=5,
    dtype="float32",
)
SLOTS = 16


def draw_params(cfg):
    """Every parameter drawn; heads lean far enough for the soft cap to bend them."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        fan_in = 30 if name.endswith("scale") else cfg.hidden_size
        size = 4 if re.search("attention/(q|k)/", name) else 1
        return (size * rng.normal(size=leaf.shape) / fan_in**0.5).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, gemma2.abstract_params(cfg))


def draw_tokens(slots=SLOTS):
    rng = np.random.default_rng(1)
    token_ids = rng.integers(0, CFG.vocab_size, (8, slots), dtype=np.int32)
    return token_ids, np.arange(slots) < np.array([[slots], [1], [5], [9]] * 2)


@functools.cache
def program(cfg):
    return jax.jit(gemma2.make_encode(cfg))


def encode(cfg, token_ids, token_mask):
    return np.asarray(program(cfg)(draw_params(cfg), token_ids, token_mask))


def paths(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


@pytest.fixture(scope="module")
def features():
    return encode(CFG, *draw_tokens())


@pytest.mark.parametrize(
    "sizes",
    [
        (2, 2, 2),
        (1, 2, 4),
        pytest.param((1, 8, 1), marks=pytest.mark.slow),
        pytest.param((1, 1, 8), marks=pytest.mark.slow),
    ],
)
def test_every_mesh_gives_the_features_of_one_device_and_keeps_the_table_split(sizes, features):
    mesh = sharding.make_mesh(replica=sizes[0], data=sizes[1], model=sizes[2])
    params = draw_params(CFG)
    params = jax.device_put(params, sharding.tree_shardings(params, mesh, GEMMA2_RULES))
    split = sharding.named(mesh, ("act_batch",))
    args = params, *jax.device_put(draw_tokens(), split)
    with jax.set_mesh(mesh):
        compiled = jax.jit(gemma2.make_encode(CFG), out_shardings=split).lower(*args).compile()
        np.testing.assert_allclose(compiled(*args), features, rtol=0, atol=1e-4)

    # Nothing as long as the vocabulary is wider than a device's part of the table, or travels.
    tables = re.findall(r" = f32\[88,(\d+)\]\S* (\S+)\(", compiled.as_text())
    assert {int(width) for width, _ in tables} == {CFG.hidden_size // mesh.shape["data"]}
    assert not [kind for _, kind in tables if re.match("all-|collective-", kind)]


def test_padding_changes_nothing_and_reads_zero(features):
    token_ids, token_mask = draw_tokens()
    assert (features[~token_mask] == 0).all()
    assert np.abs(features[token_mask]).max() > 1
    disturbed = np.where(token_mask, token_ids, 7).astype(np.int32)
    np.testing.assert_array_equal(encode(CFG, disturbed, token_mask), features)

    wider = [np.pad(x, ((0, 0), (0, 8))) for x in (token_ids, token_mask)]
    np.testing.assert_allclose(encode(CFG, *wider)[:, :SLOTS], features, atol=1e-4)


def test_a_row_without_tokens_gives_zeros():
    token_ids, token_mask = draw_tokens()
    assert not encode(CFG, token_ids, np.zeros_like(token_mask)).any()


@pytest.mark.parametrize("kind", ["sliding_attention", "full_attention"])
def test_a_token_is_seen_by_later_ones_up_to_the_window(kind):
    # Three layers of a window of five: what a token says travels 3 * 4 slots, and never back.
    cfg = dataclasses.replace(CFG, layer_types=(kind,) * 4)
    token_ids, token_mask = draw_tokens()
    changed = token_ids.copy()
    changed[0, 2] += 1
    before, after = (encode(cfg, ids, token_mask)[0] for ids in (token_ids, changed))
    moved = np.flatnonzero((before != after).any(axis=-1))
    last = 2 + 3 * 4 if kind == "sliding_attention" else SLOTS - 1
    assert (moved[0], moved[-1]) == (2, last)


def test_no_soft_cap_is_a_soft_cap_at_infinity(features):
    token_ids, token_mask = draw_tokens()
    uncapped, far = (
        encode(dataclasses.replace(CFG, attn_logit_softcapping=cap), token_ids, token_mask)
        for cap in (None, 1e4)
    )
    np.testing.assert_allclose(far, uncapped, atol=1e-3)
    assert np.abs(features - uncapped).max() > 0.01


def test_the_released_size_has_its_parameters_in_bfloat16():
    """26 layers have 2,614,341,888; neither the last of them nor the final norm is ours."""
    leaves = jax.tree.leaves(gemma2.abstract_params(gemma2.Gemma2Config()))
    assert sum(leaf.size for leaf in leaves) == 2_536_473_600
    assert {leaf.dtype.name for leaf in leaves} == {"bfloat16"}


def test_every_rule_decides_for_a_parameter_and_splits_every_large_one():
    params = paths(gemma2.abstract_params(gemma2.Gemma2Config()))
    deciding = {next(rule for rule, _ in GEMMA2_RULES if re.search(rule, path)) for path in params}
    assert deciding == {rule for rule, _ in GEMMA2_RULES}
    for path, leaf in params.items():
        axes = sharding.param_axes(path, leaf.ndim, GEMMA2_RULES)
        assert leaf.size < 1e6 or {"embed", "mlp"} & set(axes)


def test_the_config_of_every_version_of_transformers_is_read():
    sizes = {
        **dataclasses.asdict(gemma2.Gemma2Config()),
        "model_type": "gemma2",
        "query_pre_attn_scalar": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "vocab_size": 1000,
    }
    del sizes["layer_types"], sizes["dtype"], sizes["rope_theta"]
    old = {**sizes, "rope_theta": 5000.0, "rope_scaling": None, "dtype": None}
    new = {
        **sizes,
        "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"},
        "layer_types": ["sliding_attention", "full_attention"] * 13,
        "use_bidirectional_attention": None,
        "dtype": "float32",
    }
    expected = gemma2.Gemma2Config(vocab_size=1000, rope_theta=5000.0)
    assert gemma2.Gemma2Config.from_json(old) == gemma2.Gemma2Config.from_json(new) == expected
    uncapped = gemma2.Gemma2Config.from_json({**new, "attn_logit_softcapping": None})
    assert uncapped.attn_logit_softcapping is None


def test_another_network_is_refused_with_every_difference():
    config = {
        "model_type": "gemma3_text",
        "attention_bias": True,
        "hidden_activation": "silu",
        "use_bidirectional_attention": True,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "sliding_window": None,
    }
    with pytest.raises(InputError, match="another network than Gemma 2") as error:
        gemma2.Gemma2Config.from_json(config)
    for fault in (
        "model_type='gemma3_text' (needed: 'gemma2')",
        "attention_bias=True",
        "hidden_activation='silu'",
        "use_bidirectional_attention=True",
        "rope_type='linear'",
        "sliding_window=None (needed: a number)",
    ):
        assert fault in str(error.value)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_hidden_layers": 1}, "num_hidden_layers=1 must be at least 2"),
        ({"num_key_value_heads": 3}, "num_attention_heads=8 is not a multiple of"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"layer_types": ("full_attention",)}, "must be 26 of sliding_attention and full"),
        ({"layer_types": ("chunked",) * 26}, "must be 26 of sliding_attention and full"),
        ({"dtype": "float16"}, "dtype='float16' is not one of float32, bfloat16"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(InputError, match=message):
        gemma2.Gemma2Config(**sizes)


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**12}, {"num_key_value_heads": 0}, {"hidden_size": "64"},
        {"head_dim": None}, {"rope_parameters": [1]}, {"rope_theta": float("nan")},
        {"layer_types": 5}, {"layer_types": [1, 2]}, {"rms_norm_eps": 0}, {"vocab_size": 10**400},
    ],
)  # fmt: skip
def test_a_config_that_no_text_encoder_has_is_refused_before_anything_is_made(change):
    config = {"model_type": "gemma2", "hidden_size": 64}
    gemma2.Gemma2Config.from_json(config)
    with pytest.raises(InputError, match=r"config\.json|Gemma 2: "):
        gemma2.Gemma2Config.from_json(config | change)
