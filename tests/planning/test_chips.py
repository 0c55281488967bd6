"""Which slices there are, and what is not one."""

import re
import subprocess
import sys

import pytest

from lumina_jax.errors import InputError
from lumina_jax.planning import chips
from lumina_jax.planning.chips import Topology


@pytest.mark.parametrize(
    ("text", "chip", "per_slice", "slices"),
    [
        ("v5e:16x16", "v5e", 256, 1),
        ("2*v5e:16x16", "v5e", 256, 2),
        ("v5p:4x4x4", "v5p", 64, 1),
        ("3*v6e:8x8", "v6e", 64, 3),
    ],
)
def test_a_topology_is_read_and_written_the_same(text, chip, per_slice, slices):
    topology = Topology.parse(text)
    assert str(topology) == text
    assert topology.chip.name == chip
    assert (topology.chips_per_slice, topology.num_slices) == (per_slice, slices)
    assert topology.num_chips == per_slice * slices


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v9:2x2", "chips: v5e, v5p, v6e"),
        ("v5e", "such as v5e:16x16"),
        ("v5e:16", "such as v5e:16x16"),
        ("v5e:0x2", "such as v5e:16x16"),
        ("0*v5e:2x2", "such as v5e:16x16"),
        ("v5e:2x2x2", "a slice of v5e has 2 sizes and at most 256 chips, not 3 and 8"),
        ("v5p:4x4", "a slice of v5p has 3 sizes"),
        ("v6e:32x32", "at most 256 chips, not 2 and 1024"),
    ],
)
def test_what_is_no_topology_is_told(text, message):
    with pytest.raises(InputError, match=message.replace("*", r"\*")):
        Topology.parse(text)


def test_a_shape_that_libtpu_does_not_have_is_told(libtpu):
    # In a process of its own: with libtpu loaded, profiles of other tests cannot be taken.
    code = """
import lumina_jax.planning.chips as chips
try:
    chips.Topology.parse("v5e:3x3").devices()
except chips.InputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.search(r"libtpu has no such slice: v5e:3x3\. .*not divisible", done.stdout)


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'lumina-jax\[plan\]'"):
        Topology.parse("v5e:2x2").devices()
