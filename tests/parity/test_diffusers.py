"""Our velocity and its gradients equal those of diffusers.Lumina2Transformer2DModel.

Random weights, every one of them (norms and biases too), go through the production name table.
Theirs takes one picture size a call and packs tokens raggedly, so agreement here also proves the
fixed [caption | image] layout, the masks and the per-token rows and columns.
"""

import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
Lumina2Transformer2DModel = pytest.importorskip("diffusers").Lumina2Transformer2DModel

from lumina_jax import sharding  # noqa: E402
from lumina_jax.models import embed, next_dit, rope  # noqa: E402
from lumina_jax.types import ImageTokens  # noqa: E402
from lumina_jax.weights import convert, files  # noqa: E402
from lumina_jax.weights import next_dit as names  # noqa: E402

pytestmark = pytest.mark.parity

CONFIGS = {
    # The sizes of diffusers' own tests.
    "toy": dict(
        dim=24, num_layers=2, num_refiner_layers=1, num_heads=3, num_kv_heads=1, hidden_dim=96,
        axes_dims=(4, 2, 2), in_channels=4, cap_feat_dim=32,
    ),
    # Grouped heads as in the released model: three query heads a key head.
    "grouped": dict(
        dim=96, num_layers=3, num_refiner_layers=2, num_heads=6, num_kv_heads=2, hidden_dim=384,
        axes_dims=(4, 6, 6), in_channels=16, cap_feat_dim=40,
    ),
    # Odd on purpose: head_dim 108 as in 3b, three refiners, as many key heads as heads.
    "odd": dict(
        dim=216, num_layers=2, num_refiner_layers=3, num_heads=2, num_kv_heads=2, hidden_dim=864,
        axes_dims=(36, 36, 36), in_channels=3, cap_feat_dim=20,
    ),
    # The condition is narrower than the model, as in every real size.
    "wide": dict(
        dim=1056, num_layers=1, num_refiner_layers=1, num_heads=12, num_kv_heads=4, hidden_dim=4224,
        axes_dims=(32, 28, 28), in_channels=16, cap_feat_dim=64,
    ),
}  # fmt: skip

CAPTION_LENGTHS = (24, 7, 1)


def make_pair(name):
    """Our config and parameters, and their model with the same weights."""
    cfg = next_dit.NextDiTConfig(**CONFIGS[name], dtype="float32")
    theirs = Lumina2Transformer2DModel(
        sample_size=16,
        patch_size=cfg.patch_size,
        in_channels=cfg.in_channels,
        hidden_size=cfg.dim,
        num_layers=cfg.num_layers,
        num_refiner_layers=cfg.num_refiner_layers,
        num_attention_heads=cfg.num_heads,
        num_kv_heads=cfg.num_kv_heads,
        multiple_of=cfg.hidden_dim,
        axes_dim_rope=cfg.axes_dims,
        axes_lens=(300, 512, 512),
        cap_feat_dim=cfg.cap_feat_dim,
    )
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            noise = torch.from_numpy(rng.normal(size=parameter.shape).astype(np.float32))
            is_norm = parameter.ndim == 1 and key.endswith("weight")
            parameter.copy_(1 + 0.2 * noise if is_norm else noise / parameter.shape[-1] ** 0.5)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        with files.open_weights(folder) as weights:
            params = load(weights, cfg)
    return cfg, params, theirs


def load(weights, cfg):
    mesh = sharding.make_mesh(replica=1, data=1, model=1, devices=jax.devices()[:1])
    abstract = next_dit.abstract_params(cfg)
    shardings = sharding.tree_shardings(abstract, mesh)
    return convert.load(weights, names.tensors(cfg, "diffusers"), abstract, shardings)


def to_diffusers(params, cfg):
    return {e.name: e.get() for e in convert.entries(params, names.tensors(cfg, "diffusers"))}


def make_inputs(cfg, size, lengths=CAPTION_LENGTHS, seed=1):
    rng = np.random.default_rng(seed)
    batch, slots = len(lengths), 24
    latents = rng.normal(size=(batch, *size, cfg.in_channels)).astype(np.float32)
    t = rng.uniform(size=batch).astype(np.float32)
    cap_feats = rng.normal(size=(batch, slots, cfg.cap_feat_dim)).astype(np.float32)
    return latents, t, cap_feats, np.arange(slots)[None] < np.asarray(lengths)[:, None]


def call_theirs(model, latents, t, cap_feats, cap_mask):
    """Latents in and out as NHWC tensors."""
    out = model(
        hidden_states=torch.permute(torch.as_tensor(latents), (0, 3, 1, 2)),
        timestep=torch.as_tensor(t),
        encoder_hidden_states=torch.as_tensor(cap_feats),
        encoder_attention_mask=torch.as_tensor(cap_mask),
        return_dict=False,
    )[0]
    return torch.permute(out, (0, 2, 3, 1))


def call_ours(cfg, params, latents, t, cap_feats, cap_mask, num_slots=None):
    height, width = latents.shape[1:3]
    num_slots = num_slots or height * width // cfg.patch_size**2
    image = embed.patchify(jnp.asarray(latents), cfg.patch_size, num_slots)
    velocity = jax.jit(next_dit.make_forward(cfg))(params, image, t, cap_feats, cap_mask)
    return embed.unpatchify(velocity, cfg.patch_size, height, width)


def assert_close(ours, theirs, relative):
    scale = np.abs(theirs).max()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=relative * scale)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [pytest.param((16, 16), marks=pytest.mark.slow), (8, 20)])
def test_velocity_equals_diffusers(name, size):
    cfg, params, theirs = make_pair(name)
    inputs = make_inputs(cfg, size)
    with torch.no_grad():
        expected = call_theirs(theirs, *inputs).numpy()
    assert np.abs(expected).max() > 0.1
    assert_close(call_ours(cfg, params, *inputs), expected, 2e-5)
    # Padding the image slots must not change it either.
    assert_close(call_ours(cfg, params, *inputs, num_slots=100), expected, 2e-5)


def call_stages(cfg, params, latents, t, cap_feats, cap_mask, **kind):
    """Ours in the pieces that a sampler calls."""
    height, width = latents.shape[1:3]
    rows, columns = height // cfg.patch_size, width // cfg.patch_size
    stages = next_dit.make_stages(cfg, **kind)

    @jax.jit
    def run(params, latents, t, cap_feats, cap_mask):
        image = embed.patchify(latents, cfg.patch_size, rows * columns)
        caption = stages.refine(params, cap_feats, cap_mask)
        joined = stages.join(params, image, t, caption, cap_mask)
        x = stages.attend(params, joined, rows, columns, None)
        return stages.predict(params, x, joined, cap_mask.shape[1])

    velocity = run(params, latents, t, cap_feats, cap_mask)
    return embed.unpatchify(velocity, cfg.patch_size, height, width)


def test_stretched_positions_equal_those_of_lumina_next():
    """Linear before the watershed, NTK after it, on rows and columns: diffusers' own tables."""
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    cfg, params, theirs = make_pair("grouped")
    latents, _, cap_feats, cap_mask = make_inputs(cfg, (8, 20))
    plain, outputs = theirs.rope_embedder.freqs_cis, []
    for t, factors in ((0.2, {"linear_factor": 1.7}), (0.4, {"ntk_factor": 1.7})):
        stretched = [
            get_1d_rotary_pos_embed(
                dim, 512, theta=10000.0, freqs_dtype=torch.float64, **(factors if axis else {})
            )
            for axis, dim in enumerate(cfg.axes_dims)
        ]
        theirs.rope_embedder.freqs_cis = stretched
        inputs = (latents, np.full(3, t, np.float32), cap_feats, cap_mask)
        with torch.no_grad():
            expected = call_theirs(theirs, *inputs).numpy()
        theirs.rope_embedder.freqs_cis = plain
        found = call_stages(cfg, params, *inputs, stretch=rope.Stretch(1.7, 0.3))
        assert_close(found, expected, 2e-5)
        outputs.append(np.abs(found - call_stages(cfg, params, *inputs)).max())
    assert min(outputs) > 1e-3


def test_attention_gain_multiplies_the_scores_wherever_image_tokens_attend():
    cfg, params, theirs = make_pair("grouped")
    inputs = make_inputs(cfg, (8, 20))
    for block in (*theirs.noise_refiner, *theirs.layers):
        block.attn.scale *= 1.2
    with torch.no_grad():
        expected = call_theirs(theirs, *inputs).numpy()
    assert_close(call_stages(cfg, params, *inputs, attention_gain=1.2), expected, 2e-5)
    assert np.abs(call_stages(cfg, params, *inputs) - expected).max() > 1e-3


def test_sizes_mixed_in_one_batch_equal_separate_calls():
    """Three pictures of three shapes in one batch of ours, three calls of theirs."""
    cfg, params, theirs = make_pair("grouped")
    sizes, slots = [(16, 16), (8, 20), (20, 8)], 64
    inputs = [
        make_inputs(cfg, size, lengths=(length,), seed=seed)
        for seed, (size, length) in enumerate(zip(sizes, CAPTION_LENGTHS, strict=True))
    ]
    images = [embed.patchify(jnp.asarray(latents), cfg.patch_size, slots) for latents, *_ in inputs]
    image = ImageTokens(*(jnp.concatenate(parts) for parts in zip(*images, strict=True)))
    conditions = [np.concatenate(parts) for parts in list(zip(*inputs, strict=True))[1:]]
    velocity = jax.jit(next_dit.make_forward(cfg))(params, image, *conditions)

    for index, (size, given) in enumerate(zip(sizes, inputs, strict=True)):
        ours = embed.unpatchify(velocity[index : index + 1], cfg.patch_size, *size)
        with torch.no_grad():
            assert_close(ours, call_theirs(theirs, *given).numpy(), 2e-5)


@pytest.mark.parametrize(
    "name",
    [n if n == "grouped" else pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS],
)
def test_gradient_of_every_parameter_equals_diffusers(name):
    cfg, params, theirs = make_pair(name)
    latents, t, cap_feats, cap_mask = make_inputs(cfg, (8, 12))
    target = np.random.default_rng(2).normal(size=latents.shape).astype(np.float32)

    loss = torch.mean(
        (call_theirs(theirs, latents, t, cap_feats, cap_mask) - torch.as_tensor(target)) ** 2
    )
    loss.backward()

    def our_loss(params):
        return jnp.mean((call_ours(cfg, params, latents, t, cap_feats, cap_mask) - target) ** 2)

    ours = to_diffusers(jax.grad(our_loss)(params), cfg)
    for key, parameter in theirs.named_parameters():
        expected = parameter.grad.numpy()
        assert np.abs(expected).max() > 0, f"{key} has no gradient to compare"
        error = np.linalg.norm(ours[key] - expected) / np.linalg.norm(expected)
        assert error <= 1e-4, f"{key}: relative error {error:.1e}"


def test_the_released_sizes_have_the_names_and_shapes_of_diffusers():
    """Oracle 1: 459 tensors, 2,609,769,152 numbers, each name and shape as in their 2.6B model."""
    with torch.device("meta"):
        theirs = Lumina2Transformer2DModel(cap_feat_dim=2304)
    cfg = next_dit.NextDiTConfig.preset("2b")
    ours = convert.their_shapes(names.tensors(cfg, "diffusers"))
    assert ours == {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
    assert len(ours) == 459
    assert sum(np.prod(shape, dtype=np.int64) for shape in ours.values()) == 2_609_769_152


def test_names_round_trip():
    cfg, params, theirs = make_pair("grouped")
    back = to_diffusers(params, cfg)
    for key, value in theirs.state_dict().items():
        np.testing.assert_array_equal(back[key], value.numpy())
