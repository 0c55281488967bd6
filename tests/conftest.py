"""Eight emulated devices for every test, no silent broadcasting, and one small data set."""

import os
import tempfile

# Before jax is imported: with libtpu installed a bare import would look for a TPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile more than they compute, and without optimisation compiling takes half the time.
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"
# gcsfs looks at this when it is imported; else it asks another service what kind of bucket it is,
# and an emulator has none.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"

import jax
import pytest

from lumina_jax.data.buckets import Bucket
from tests.small_data import make_emojis

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Many tests run the same program; the second one need not compile it, in whichever process it is.
os.environ.setdefault("LUMINA_JAX_TEST_CACHE", tempfile.mkdtemp(prefix="lumina_jax_tests_"))
jax.config.update("jax_compilation_cache_dir", os.environ["LUMINA_JAX_TEST_CACHE"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

EMOJIS = "🐶🐱🍎🍋🏠🌞😀🎈 🇩🇪🇫🇷🇯🇵🚂🚐👀🦇🐖 🍷🍾🌵🕯️🧍👗🚪🖊️"
BUCKETS = (Bucket(24, 40), Bucket(32, 32), Bucket(40, 24))


@pytest.fixture(scope="module")
def bucket_server():
    """The process that is the bucket."""
    pytest.importorskip("gcsfs")
    pytest.importorskip("gcp_storage_emulator")
    from tests import bucket

    with bucket.running() as server:
        yield server


@pytest.fixture(scope="module")
def bucket(bucket_server):
    """A bucket on loopback, empty at first."""
    del bucket_server
    return "gs://bucket"


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """24 emojis at 32 px in three buckets. Read it; copy it to change it."""
    directory = tmp_path_factory.mktemp("data") / "emojis"
    make_emojis(directory, EMOJIS, BUCKETS)
    return directory
