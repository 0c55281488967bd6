"""Checksums: the same on every mesh, another for any change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lumina_jax import digest, sharding


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.standard_normal((4, 16, 24), np.float32))
    return {"kernel": kernel, "step": jnp.int32(3), "moment": jnp.asarray(kernel[0], jnp.bfloat16)}


def put(arrays, mesh, *spec):
    shardings = {"kernel": P(*spec), "step": P(), "moment": P(None, "model")}
    return {
        name: jax.device_put(x, jax.sharding.NamedSharding(mesh, shardings[name]))
        for name, x in arrays.items()
    }


def test_a_checksum_is_that_of_its_definition(arrays):
    """Written out with Python's integers, as a reader of another language would."""

    def mixed(x):
        x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
        x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
        return x ^ (x >> 16)

    made, _ = digest.make(put(arrays, sharding.make_mesh(replica=1, data=4, model=2), "data"))
    for name, bits in (("kernel", np.uint32), ("moment", np.uint16)):
        numbers = np.asarray(arrays[name]).view(bits).ravel().tolist()
        expected = sum(mixed(x ^ mixed(place + 1)) for place, x in enumerate(numbers)) % 2**32
        assert next(iter(made["arrays"][name].values())) == f"{expected:08x}"


@pytest.mark.parametrize("mesh", [(1, 1, 8), (8, 1, 1), (1, 4, 2)])
def test_the_mesh_does_not_matter(arrays, mesh):
    mesh = sharding.make_mesh(**dict(zip(sharding.MESH_AXES, mesh, strict=True)))
    made, _ = digest.make(put(arrays, sharding.make_mesh(replica=1, data=2, model=4)))
    assert digest.differing(put(arrays, mesh, None, None, "model"), made) == []


def test_any_flipped_bit_is_found_and_its_array_named(arrays):
    made, _ = digest.make(arrays)
    rng = np.random.default_rng(1)
    for _ in range(50):
        kernel = np.array(arrays["kernel"])
        place = rng.integers(kernel.nbytes)
        kernel.view(np.uint8).reshape(-1)[place] ^= 1 << rng.integers(8)
        assert digest.differing(arrays | {"kernel": jnp.asarray(kernel)}, made) == ["kernel"]
    swapped = np.array(arrays["kernel"])
    swapped[0, 0, :2] = swapped[0, 0, 1::-1]
    assert digest.differing({"kernel": jnp.asarray(swapped)}, made) == ["kernel"]


def test_weights_are_known_in_the_types_they_are_read_in(arrays):
    made, _ = digest.make({"kernel": arrays["kernel"], "moment": arrays["moment"]})
    read = {
        "kernel": arrays["kernel"].astype(jnp.bfloat16),
        "moment": arrays["moment"].astype(jnp.float32),
    }
    assert digest.differing(read, made) == []
    read["moment"] = read["moment"] + 1
    assert digest.differing(read | {"other": jnp.ones(2)}, made) == ["moment", "other"]


def test_numbers_that_are_not_finite_are_found(arrays):
    assert digest.make(arrays)[1] == []
    broken = arrays | {"moment": arrays["moment"].at[2, 3].set(jnp.nan)}
    assert digest.make(broken)[1] == ["moment"]
