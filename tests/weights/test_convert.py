"""Names and layouts of others: there and back without losing a bit, on any mesh."""

import itertools
import pathlib

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from lumina_jax import sharding
from lumina_jax.errors import InputError
from lumina_jax.models.next_dit import PRESETS, NextDiTConfig, abstract_params
from lumina_jax.weights import convert, next_dit
from lumina_jax.weights.files import Weights, write_file
from lumina_jax.weights.next_dit import FORMATS, open_transformer

# Three refiners, grouped heads, and a head shared unequally, as no released size has it.
MODEL = NextDiTConfig(
    dim=64, num_layers=2, num_refiner_layers=3, num_heads=4, num_kv_heads=2, hidden_dim=96,
    axes_dims=(4, 6, 6), in_channels=4, cap_feat_dim=24,
)  # fmt: skip
SUFFIX = {"diffusers": "", "official": ".pth", "comfyui": ".safetensors"}


def random_params(cfg=MODEL, dtype="float32"):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: rng.standard_normal(x.shape, np.float32).astype(dtype),
        abstract_params(cfg),
    )


def abstract(cfg, dtype):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), abstract_params(cfg))


def load(path, dtype=None, mesh=(1, 1, 1), **known):
    mesh = dict(zip(sharding.MESH_AXES, mesh, strict=True))
    num = np.prod([*mesh.values()])
    mesh = sharding.make_mesh(**mesh, devices=jax.devices()[:num])
    with open_transformer(path, **known) as source:
        target = abstract(source.cfg, dtype or source.dtype)
        return source.cfg, source.load(target, sharding.tree_shardings(target, mesh))


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


class Shapes(Weights):
    """The names and shapes of a file, without the file."""

    def __init__(self, shapes):
        super().__init__(pathlib.Path("shapes"))
        self.shapes = shapes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("format", FORMATS)
def test_a_round_trip_loses_no_bit(tmp_path, format, dtype):
    if format == "official":
        pytest.importorskip("torch")
    params, path = random_params(dtype=dtype), tmp_path / f"x{SUFFIX[format]}"
    next_dit.save(path, params, MODEL, format=format)
    known = {} if format == "diffusers" else {"axes_dims": (4, 6, 6)}
    cfg, found = load(path, **known)
    assert cfg == MODEL
    assert_equal(found, params)


def test_every_format_turns_into_every_other(tmp_path):
    """A chain through all pairs, each reading what the one before has written."""
    pytest.importorskip("torch")
    params = random_params()
    for number, (a, b) in enumerate(itertools.permutations(FORMATS, 2)):
        first, second = (tmp_path / f"{number}{f}{SUFFIX[f]}" for f in (a, b))
        next_dit.save(first, params, MODEL, format=a)
        _, between = load(first, axes_dims=(4, 6, 6)) if a != "diffusers" else load(first)
        next_dit.save(second, between, MODEL, format=b)
        _, params = load(second, axes_dims=(4, 6, 6)) if b != "diffusers" else load(second)
    assert_equal(params, random_params())


def test_bfloat16_files_fill_float32_parameters_and_come_back(tmp_path):
    params = random_params(dtype="bfloat16")
    next_dit.save(tmp_path / "a", params, MODEL, format="diffusers")
    _, wide = load(tmp_path / "a", "float32")
    assert {x.dtype for x in jax.tree.leaves(wide)} == {np.dtype("float32")}
    next_dit.save(tmp_path / "b", wide, MODEL, format="diffusers", dtype="bfloat16")
    assert_equal(load(tmp_path / "b")[1], params)


@pytest.mark.parametrize("format", ["diffusers", "comfyui"])
def test_a_sharded_target_gets_the_same_numbers(tmp_path, format):
    params, path = random_params(), tmp_path / f"x{SUFFIX[format]}"
    next_dit.save(path, params, MODEL, format=format)
    known = {} if format == "diffusers" else {"axes_dims": (4, 6, 6)}
    _, found = load(path, mesh=(2, 2, 2), **known)
    assert_equal(found, params)
    q = found["layers"]["attention"]["q"]["kernel"]
    assert q.sharding.spec == sharding.spec((None, "embed", "heads", "head_dim"))
    next_dit.save(tmp_path / "again", found, MODEL, format="diffusers")
    assert_equal(load(tmp_path / "again")[1], params)


def test_q_k_and_v_are_one_matrix_below_each_other_in_official_files(tmp_path):
    params = random_params()
    next_dit.save(tmp_path / "x.safetensors", params, MODEL, format="official")
    theirs = load_file(tmp_path / "x.safetensors")
    attention = params["layers"]["attention"]
    fused = [attention[name]["kernel"][1].reshape(64, -1).T for name in "qkv"]
    np.testing.assert_array_equal(
        theirs["layers.1.attention.qkv.weight"], np.concatenate(fused, axis=0)
    )
    np.testing.assert_array_equal(theirs["norm_final.weight"], np.ones(64, np.float32))


@pytest.mark.slow
@pytest.mark.parity
def test_diffusers_converts_our_official_file_to_our_diffusers_file(tmp_path):
    """Their converter knows the released width and two refiners only."""
    single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
    from safetensors.torch import load_file as load_torch

    cfg = NextDiTConfig(
        dim=2304, num_layers=1, num_heads=24, num_kv_heads=8, hidden_dim=16, axes_dims=(32, 32, 32),
        in_channels=2, cap_feat_dim=8,
    )  # fmt: skip
    params = random_params(cfg)
    next_dit.save(tmp_path / "official.safetensors", params, cfg, format="official")
    next_dit.save(tmp_path / "diffusers", params, cfg, format="diffusers")
    expected = single_file.convert_lumina2_to_diffusers(
        load_torch(tmp_path / "official.safetensors")
    )
    found = load_torch(tmp_path / "diffusers" / "diffusion_pytorch_model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name].numpy(), value.numpy())


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "tiny"])
@pytest.mark.parametrize("format", FORMATS)
def test_the_sizes_of_every_preset_are_read_off_its_tensors(preset, format):
    cfg = NextDiTConfig.preset(preset, num_refiner_layers=4)
    shapes = convert.their_shapes(next_dit.tensors(cfg, format))
    assert next_dit.detect_format(shapes) == format
    assert next_dit.sizes_of(Shapes(shapes), format) == cfg


def test_the_released_model_has_400_official_tensors():
    """Oracle: 2,609,771,456 numbers, `norm_final` among them."""
    cfg = NextDiTConfig.preset("2b")
    shapes = convert.their_shapes(next_dit.tensors(cfg, "official"))
    shapes |= {entry.name: entry.shape for entry in next_dit.unused(cfg, "official", "float32")}
    assert len(shapes) == 400
    assert sum(np.prod(shape, dtype=np.int64) for shape in shapes.values()) == 2_609_771_456
    assert shapes["layers.25.attention.qkv.weight"] == (3840, 2304)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_config_of_diffusers_says_every_size(preset):
    cfg = NextDiTConfig.preset(preset)
    assert next_dit.from_diffusers_config(next_dit.to_diffusers_config(cfg)) == cfg


def test_everything_that_does_not_fit_is_listed_at_once():
    shapes = convert.their_shapes(next_dit.tensors(MODEL, "diffusers"))
    del shapes["x_embedder.bias"], shapes["layers.1.norm2.weight"]
    shapes |= {"layers.0.norm2.weight": (65,), "lora.weight": (3,)}
    with pytest.raises(InputError) as raised:
        convert.check(Shapes(shapes), next_dit.tensors(MODEL, "diffusers"))
    message = str(raised.value)
    assert "4 fault(s)" in message
    for line in (
        "missing    x_embedder.bias (64,)",
        "missing    layers.1.norm2.weight (64,)",
        "unexpected lora.weight (3,)",
        "mis-shaped layers.0.norm2.weight: (65,) there, (64,) needed",
    ):
        assert line in message


def test_a_missing_tensor_and_an_unknown_type_are_listed_by_a_real_file(tmp_path):
    entries = convert.entries(random_params(), next_dit.tensors(MODEL, "official"))
    write_file(tmp_path / "x.safetensors", entries[1:])
    with pytest.raises(InputError, match=rf"1 fault.*\n  missing    {entries[0].name}"):
        load(tmp_path / "x.safetensors", axes_dims=(4, 6, 6))
    weights = Shapes(convert.their_shapes(next_dit.tensors(MODEL, "official")))
    weights.dtypes["x_embedder.bias"] = "F8_E4M3"
    with pytest.raises(InputError, match=r"unreadable x_embedder.bias: its type is F8_E4M3"):
        convert.check(weights, next_dit.tensors(MODEL, "official"))


def test_a_folder_with_files_is_not_written_into(tmp_path):
    next_dit.save(tmp_path / "x", random_params(), MODEL, format="diffusers")
    with pytest.raises(InputError, match="has files already"):
        next_dit.save(tmp_path / "x", random_params(), MODEL, format="diffusers")


def test_other_models_in_a_file_of_comfyui_are_left_alone(tmp_path):
    params = random_params()
    entries = convert.entries(params, next_dit.tensors(MODEL, "comfyui"))
    vae = entries[0]._replace(name="vae.decoder.conv_in.weight")
    write_file(tmp_path / "all.safetensors", [vae, *entries])
    _, found = load(tmp_path / "all.safetensors", axes_dims=(4, 6, 6))
    assert_equal(found, params)


def test_the_report_counts_and_measures_each_part():
    params = random_params()
    lines = convert.report(params).splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    leaves = jax.tree.leaves(params["noise_refiner"])
    arrays, numbers, norm = rows["noise_refiner"]
    assert int(arrays) == len(leaves)
    assert int(numbers.replace(",", "")) == sum(x.size for x in leaves)
    expected = np.sqrt(sum(np.sum(np.square(x.astype(np.float64))) for x in leaves))
    np.testing.assert_allclose(float(norm), expected, rtol=1e-4)
    assert int(rows["all"][0]) == len(jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "FluxTransformer2DModel"}, "is a FluxTransformer2DModel; needed"),
        ({"out_channels": 8}, "out_channels=8 differs from in_channels=4"),
    ],
)
def test_the_transformer_of_another_model_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        next_dit.from_diffusers_config(next_dit.to_diffusers_config(MODEL) | change)


def test_weights_of_another_kind_are_refused(tmp_path):
    write_file(
        tmp_path / "x.safetensors",
        [next_dit.Entry("conv.weight", (1,), "float32", lambda: np.ones(1, np.float32))],
    )
    with (
        pytest.raises(InputError, match="not the weights of a Lumina-Image"),
        open_transformer(tmp_path / "x.safetensors"),
    ):
        pass


def test_a_head_that_cannot_be_shared_equally_must_be_explained(tmp_path):
    next_dit.save(tmp_path / "x.safetensors", random_params(), MODEL, format="official")
    with (
        pytest.raises(
            InputError, match=r"how the 16 features of a head are shared.*Give axes_dims"
        ),
        open_transformer(tmp_path / "x.safetensors"),
    ):
        pass


def test_casting_while_writing_is_numpys_rounding(tmp_path):
    params = random_params()
    next_dit.save(tmp_path / "x", params, MODEL, format="diffusers", dtype="bfloat16")
    theirs = load_file(tmp_path / "x" / "diffusion_pytorch_model.safetensors")
    np.testing.assert_array_equal(
        theirs["x_embedder.weight"], params["x_embedder"]["kernel"].T.astype(ml_dtypes.bfloat16)
    )


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": 10**12}, {"num_layers": "26"}, {"num_layers": None}, {"num_layers": True},
        {"num_attention_heads": 0}, {"num_kv_heads": 0}, {"hidden_size": -1}, {"patch_size": 0},
        {"multiple_of": 0}, {"ffn_dim_multiplier": float("nan")}, {"ffn_dim_multiplier": 1e300},
        {"ffn_dim_multiplier": "x"}, {"axes_dim_rope": None}, {"axes_dim_rope": [4, None, 2]},
        {"norm_eps": float("nan")}, {"norm_eps": None}, {"cap_feat_dim": 2**63},
    ],
)  # fmt: skip
def test_sizes_that_no_transformer_has_are_refused_before_anything_is_made(change):
    """Found by fuzzing: a division by zero, or a loop over so many layers."""
    with pytest.raises(InputError, match=r"config\.json is damaged|config\.model: "):
        next_dit.from_diffusers_config(next_dit.to_diffusers_config(MODEL) | change)


def test_a_config_without_a_size_is_refused():
    config = next_dit.to_diffusers_config(MODEL)
    for key in config.keys() - {"axes_lens", "sample_size", "scaling_factor", "out_channels"}:
        if key != "ffn_dim_multiplier":  # which may be missing
            with pytest.raises(InputError):
                next_dit.from_diffusers_config({k: v for k, v in config.items() if k != key})


def test_a_file_whose_tensors_have_other_dims_tells_no_size(tmp_path):
    tensors = list(next_dit.tensors(MODEL, "official"))
    shapes = convert.their_shapes(tensors)
    for name in ("x_embedder.weight", "layers.0.attention.q_norm.weight"):
        for shape in ((), (0,), (0, 0), (3, 4, 5)):
            with pytest.raises(InputError, match=f"lacks {name} of"):
                next_dit.sizes_of(Shapes(shapes | {name: shape}), "official")
