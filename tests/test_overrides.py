"""What flags may do to a config."""

import contextlib
import pathlib

import pytest
from absl import flags
from ml_collections import config_flags

from lumina_jax import overrides
from lumina_jax.errors import InputError

# ml_collections loads a config with a method that Python will not have for ever.
pytestmark = pytest.mark.filterwarnings("ignore:.*load_module:DeprecationWarning")

TINY = pathlib.Path(__file__).parents[1] / "configs" / "tiny.py"


def parsed(*changes, monkeypatch):
    line = ["train", f"--config={TINY}", *changes]
    monkeypatch.setattr("sys.argv", line)  # where ml_collections looks for them
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, flag_values=values)
    values(line)
    return values


def test_a_section_of_known_keys_is_not_replaced(monkeypatch):
    """Found by fuzzing: the run ended in a KeyError, of a key that was no longer there."""
    for section in ("optim", "mesh", "data", "preview"):
        values = parsed(f"--config.{section}={{'x': 1}}", monkeypatch=monkeypatch)
        with pytest.raises(InputError, match=rf"--config\.{section} replaces a whole section"):
            overrides.check(values["config"])


def test_sections_whose_keys_are_names_can_be_replaced(monkeypatch):
    changes = [f"--config.{section}={{'long': 1.0}}" for section in overrides.FREE[1:]]
    values = parsed(*changes, "--config.optim.b1=0.5", monkeypatch=monkeypatch)
    overrides.check(values["config"])
    assert values.config.data.kinds.to_dict() == {"long": 1.0}
    assert values.config.optim.b1 == 0.5


def test_a_value_is_a_literal_and_never_run(monkeypatch, tmp_path):
    text = f"__import__('pathlib').Path('{tmp_path / 'executed'}').touch()"
    for key in ("seed", "preview.prompts", "data.languages", "optim.name"):
        with contextlib.suppress(ValueError, TypeError, flags.Error):
            parsed(f"--config.{key}={text}", monkeypatch=monkeypatch)
    assert not (tmp_path / "executed").exists()
