"""Options follow the kind of device, and a config has the last word."""

import jax
import pytest

from configs import tiny
from lumina_jax import compiler, sharding
from lumina_jax.errors import InputError
from lumina_jax.planning import programs

VMEM = "xla_tpu_scoped_vmem_limit_kib"
FUSIONS = "xla_tpu_enable_async_collective_fusion_fuse_kloop_fusions"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("cpu", set()),
        ("NVIDIA H100 80GB HBM3", set()),
        ("TPU v5 lite", {VMEM, FUSIONS}),
        ("TPU v5", {VMEM}),  # v5p refuses the other
        ("TPU v6 lite", {VMEM}),
    ],
)
def test_options_by_kind_of_device(kind, expected):
    assert set(compiler.options(kind)) == expected


def test_changes_are_added_and_win():
    changes = {"TPU v6": {VMEM: "65536"}, "": {"other": "1"}, "NVIDIA": {"third": "2"}}
    assert compiler.options("TPU v6 lite", changes) == {VMEM: "65536", "other": "1"}
    assert compiler.options("TPU v6 lite")[VMEM] == "32768"
    assert compiler.options("cpu", changes) == {"other": "1"}


def test_an_option_without_a_device_is_told():
    with pytest.raises(InputError, match=r"does not say for which devices\. Write \{\"TPU\": "):
        compiler.options("cpu", {VMEM: "65536"})


def test_options_of_a_config_reach_the_compiler():
    config = tiny.get_config()
    config.text_encoder.kind = "gemma2"  # whose sizes need no package
    config.compile.options = {"": {"xla_no_such_option": "true"}}
    lowered = programs.lower_train(config, sharding.make_mesh(replica=1, data=8, model=1))
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        lowered.lowered.compile()
