import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import tiny_lumina2  # noqa: E402

from lumina_jax import sharding  # noqa: E402
from lumina_jax.errors import InputError  # noqa: E402
from lumina_jax.frozen.gemma2 import Gemma2TextEncoder  # noqa: E402
from lumina_jax.frozen.text_encoder import TextEncoder, make_text_encoder  # noqa: E402

CAPTIONS = [
    "",
    "a dog",
    "собака 🐶 и кошка",
    "一只狗 坐在\n红色的雨伞下。",
    "a <bos> inside",
    "  two  ",
]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """Subfolders text_encoder/ and tokenizer/, as in a diffusers pipeline."""
    return tiny_lumina2.save_text_encoder(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """All files side by side and a language model in them; the same numbers."""
    return tiny_lumina2.save_text_encoder(tmp_path_factory.mktemp("plain"), plain=True)


def make(folder, **kwargs):
    kwargs = {"max_tokens": 24, "dtype": "float32", **kwargs}
    return make_text_encoder("gemma2", path=str(folder), **kwargs)


def encode(encoder, captions):
    mesh = sharding.make_mesh(replica=1, data=1, model=1, devices=jax.devices()[:1])
    params = encoder.load_params(mesh)
    return np.asarray(jax.jit(encoder.encode)(params, *encoder.tokenize(captions)))


def their_features(folder, captions, max_tokens=24):
    """What `Lumina2Pipeline._get_gemma_prompt_embeds` does, padding set to zero."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    model = transformers.AutoModel.from_pretrained(folder / "text_encoder")
    tokens = tokenizer(
        captions, padding="max_length", max_length=max_tokens, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        states = model(**tokens, output_hidden_states=True).hidden_states[-2]
    return tokens, (states * tokens.attention_mask[..., None]).numpy()


def test_tokens_and_features_are_those_of_the_pipeline(pipeline):
    encoder = make(pipeline)
    tokens, expected = their_features(pipeline, CAPTIONS)
    token_ids, token_mask = encoder.tokenize(CAPTIONS)
    np.testing.assert_array_equal(token_ids, tokens.input_ids)
    np.testing.assert_array_equal(token_mask, tokens.attention_mask.bool())
    np.testing.assert_allclose(
        encode(encoder, CAPTIONS), expected, atol=2e-5 * np.abs(expected).max()
    )


def test_a_plain_folder_gives_the_same_and_bfloat16_nearly(pipeline, plain):
    features = encode(make(pipeline), CAPTIONS)
    np.testing.assert_array_equal(encode(make(plain), CAPTIONS), features)
    rounded = encode(make(plain, dtype="bfloat16"), CAPTIONS)
    assert rounded.dtype == "bfloat16"
    assert np.linalg.norm(rounded - features) < 0.1 * np.linalg.norm(features)


def test_without_the_soft_cap_the_features_are_others(pipeline):
    capped, uncapped = (encode(make(pipeline, soft_cap=on), CAPTIONS) for on in (True, False))
    assert np.linalg.norm(capped - uncapped) > 0.01 * np.linalg.norm(capped)


def test_an_encoder_keeps_the_interface(pipeline, plain):
    encoder = make(pipeline)
    assert isinstance(encoder, TextEncoder)
    assert (encoder.feature_dim, encoder.max_tokens) == (40, 24)
    assert encoder.folders == (pipeline / "text_encoder", pipeline / "tokenizer")
    assert make(plain).folders == (plain, plain)


def test_the_empty_caption_is_the_beginning_alone(pipeline):
    token_ids, token_mask = make(pipeline).tokenize([""])
    assert token_ids[0, 0] == 2
    assert token_mask.sum() == 1
    assert not token_ids[~token_mask].any()


def test_a_long_caption_loses_its_end_and_is_counted(pipeline):
    encoder = make(pipeline, max_tokens=5)
    caption = "zyxwvutsrq" * 3
    token_ids, token_mask = encoder.tokenize([caption, "", caption])
    whole, _ = make(pipeline, max_tokens=100).tokenize([caption])
    np.testing.assert_array_equal(token_ids[0], whole[0, :5])
    assert token_mask[0].all()
    assert encoder.num_truncated == 2
    exactly = make(pipeline, max_tokens=int((whole != 0).sum()))
    exactly.tokenize([caption])
    assert exactly.num_truncated == 0


def test_threads_and_processes_tokenize_alike(pipeline):
    encoder = make(pipeline, max_tokens=5)
    captions = [caption * 3 for caption in CAPTIONS[1:]]
    expected, _ = pickle.loads(pickle.dumps(encoder)).tokenize(captions)
    with ThreadPoolExecutor(4) as pool:
        for token_ids, _ in pool.map(encoder.tokenize, [captions] * 20):
            np.testing.assert_array_equal(token_ids, expected)
    assert encoder.num_truncated == 20 * len(captions)


def test_the_fingerprint_is_of_what_changes_the_features(pipeline, tmp_path):
    copy = shutil.copytree(pipeline, tmp_path / "another name")
    fingerprint = make(pipeline).fingerprint()
    assert make(copy).fingerprint() == fingerprint
    others = [
        make(pipeline, max_tokens=8),
        make(pipeline, dtype="bfloat16"),
        make(pipeline, soft_cap=False),
        make(tiny_lumina2.save_text_encoder(tmp_path / "weights", seed=1)),
        make(tiny_lumina2.save_text_encoder(tmp_path / "config", sliding_window=7)),
    ]
    file = copy / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(content))
    others.append(make(copy))
    assert len({fingerprint, *(other.fingerprint() for other in others)}) == 1 + len(others)


def test_the_weights_are_spread_over_the_mesh(pipeline):
    mesh = sharding.make_mesh(replica=1, data=4, model=2)
    params = make(pipeline).load_params(mesh)
    table = params["embedder"]["table"]
    assert {shard.data.shape for shard in table.addressable_shards} == {(448, 10)}
    assert params["layers"]["attention"]["q"]["kernel"].sharding.spec[1:3] == ("data", "model")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", r"text_encoder.path is empty.*Alpha-VLLM/Lumina-Image-2.0"),
        ("no/such/folder", "No file or folder at"),
        ("tokenizer", "is no text encoder: it has no config.json but tokenizer.json"),
        ("text_encoder", "has no tokenizer: none of tokenizer.json, tokenizer.model is there"),
    ],
)
def test_a_wrong_folder_is_refused(pipeline, path, message):
    path = pipeline / path if path in ("tokenizer", "text_encoder") else path
    with pytest.raises(InputError, match=message):
        make(path)


def test_a_broken_tokenizer_is_refused(pipeline, tmp_path):
    folder = shutil.copytree(pipeline, tmp_path / "copy")
    (folder / "tokenizer" / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(InputError, match="transformers cannot load the tokenizer in"):
        make(folder)


def test_another_model_is_refused(pipeline, tmp_path):
    folder = shutil.copytree(pipeline, tmp_path / "copy")
    file = folder / "text_encoder" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": "llama"}))
    with pytest.raises(InputError, match=r"another network than Gemma 2: model_type='llama'"):
        make(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"add_bos_token": False}, r"an empty caption into the ids \[\]"),
        ({"add_bos_token": True, "add_eos_token": True}, r"an empty caption into the ids \[2, 1\]"),
    ],
)
def test_a_tokenizer_must_begin_a_caption_and_not_end_it(pipeline, tmp_path, changes, message):
    folder = shutil.copytree(pipeline, tmp_path / "copy")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer", **changes)
    tokenizer.save_pretrained(folder / "tokenizer")
    with pytest.raises(InputError, match=message):
        make(folder)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    folder = tiny_lumina2.save_text_encoder(tmp_path)
    tiny_lumina2.make_gemma(vocab_size=300).save_pretrained(folder / "text_encoder")
    with pytest.raises(InputError, match="has 448 tokens and the text encoder only 300"):
        make(folder)


def test_too_few_slots_are_refused(pipeline):
    with pytest.raises(InputError, match="max_tokens=1 leaves no room"):
        make(pipeline, max_tokens=1)


def test_an_unknown_type_is_refused(pipeline):
    with pytest.raises(InputError, match="dtype='int8' is not one of float32, bfloat16"):
        Gemma2TextEncoder(str(pipeline), max_tokens=24, dtype="int8")


def test_the_other_encoder_takes_no_path(pipeline):
    with pytest.raises(InputError, match="the text encoder 'use' comes with its weights"):
        make_text_encoder("use", path=str(pipeline), max_tokens=24)
