"""Flags that change a config, `--config.optim.learning_rate=1e-3`: what ml_collections lets pass.

It reads a value as a literal of Python, never as code, and sees to the type of a key. But a section
can be replaced as a whole, `--config.optim="{'name': 'muon'}"`, and has no other keys then.
"""

from absl import flags
from ml_collections import ConfigDict, config_flags

from lumina_jax.errors import InputError

# Sections whose keys are names that a user gives.
FREE = (
    "data.datasets", "data.kinds", "data.languages", "data.text_slots", "compile.options",
)  # fmt: skip


def check(flag: flags.Flag) -> None:
    """Refuses sections that were replaced, where the code asks for all of their keys.

    Args:
      flag: Of the config, after parsing.
    """
    replaced = [
        path
        for path, value in config_flags.get_override_values(flag).items()
        if isinstance(value, ConfigDict | dict) and not path.startswith(FREE)
    ]
    if replaced:
        raise InputError(
            f"--{flag.name}.{replaced[0]} replaces a whole section, whose other keys would be "
            f"gone. Change its keys one by one, such as --{flag.name}.{replaced[0]}.KEY=VALUE."
        )
