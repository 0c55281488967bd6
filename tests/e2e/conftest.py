"""A run of a few seconds on the emojis of every test."""

import pytest

from tests import small_run


@pytest.fixture
def config(dataset):
    config = small_run.get_config()
    config.data.directory = str(dataset)
    return config
