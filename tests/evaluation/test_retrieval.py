"""Nearest pictures, where the answer is plain to see."""

import numpy as np

from lumina_jax.evaluation.retrieval import nearest


def plain(colour, shape=(8, 8)):
    return np.broadcast_to(np.array(colour, np.uint8), (*shape, 3)).copy()


def test_each_sample_finds_its_colour_whatever_its_shape():
    pictures = [plain((255, 0, 0)), plain((0, 255, 0), (4, 12)), plain((0, 0, 255), (12, 4))]
    samples = [plain((10, 10, 240)), plain((240, 30, 0), (6, 10)), plain((0, 200, 50))]
    assert nearest(samples, pictures, 8).tolist() == [2, 0, 1]
