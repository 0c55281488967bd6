"""What the compiler is told, by kind of device. What each option gave: docs/performance.md."""

from collections.abc import Mapping
from typing import Any

from lumina_jax.errors import InputError

# By the start of `device_kind`. Others of their users: config.compile.options.
_OPTIONS = {
    # The tiles of a matrix product lie in a TPU's vector memory; with more of it than the 16 MiB
    # that are the default they are larger, and operands are read less often.
    "TPU": {"xla_tpu_scoped_vmem_limit_kib": "32768"},
    # A v5e moves parts of a gather between the instructions of a fusion. With elementwise ones
    # allowed to carry parts, all gathers of a layer are hidden; by default, those are not that have
    # no product before them. Other TPUs refuse the option.
    "TPU v5 lite": {"xla_tpu_enable_async_collective_fusion_fuse_kloop_fusions": "true"},
}


def options(device_kind: str, changes: Mapping[str, Any] | None = None) -> dict[str, str]:
    """For `jax.jit(compiler_options=)` of the large programs.

    Args:
      device_kind: Of jax, such as "TPU v5 lite".
      changes: By the start of `device_kind` too, "" for all; they are added, and win.

    Raises:
      InputError: An option of `changes` has no kind of device.
    """
    found = {}
    for start, those in (*_OPTIONS.items(), *(changes or {}).items()):
        if not isinstance(those, Mapping):
            raise InputError(
                f"compile.options={{{start!r}: {those!r}}} does not say for which devices. Write "
                f'{{"TPU": {{{start!r}: {those!r}}}}}, or "" for all.'
            )
        if device_kind.startswith(start):
            found |= those
    return found
