"""One small dataset for the whole session, and a tokenizer that a reader can follow by eye."""

from collections.abc import Sequence

import numpy as np
import pytest

from lumina_jax.data import openmoji
from lumina_jax.data.buckets import Bucket

EMOJIS = "🐶🐱🍎🍋🏠🌞😀🎈 🇩🇪🇫🇷🇯🇵🚂🚐👀🦇🐖 🍷🍾🌵🕯️🧍👗🚪🖊️"
BUCKETS = (Bucket(24, 40), Bucket(32, 32), Bucket(40, 24))


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """24 emojis at 32 px in three buckets. Read it; copy it to change it."""
    directory = tmp_path_factory.mktemp("data") / "emojis"
    openmoji.prepare(directory, emojis=EMOJIS, resolution=32, buckets=BUCKETS)
    return directory


@pytest.fixture(scope="session")
def tokenize():
    """Token ids are the first 16 bytes of the text."""

    def tokenize(texts: Sequence[str]):
        token_ids = np.zeros((len(texts), 16), np.int32)
        for row, text in zip(token_ids, texts, strict=True):
            content = text.encode()[:16]
            row[: len(content)] = list(content)
        return token_ids, token_ids > 0

    return tokenize
