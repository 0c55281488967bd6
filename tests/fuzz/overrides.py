"""The command line of a run: its config changed by flags, up to the checks at the door."""

import contextlib
import io
import math
import pathlib
import sys
from collections.abc import Iterator
from unittest import mock

import jax
from absl import flags
from hypothesis import strategies as st
from ml_collections import ConfigDict, config_flags

from configs import base, tiny, tiny_latent
from lumina_jax import cli, optim, sharding, train
from lumina_jax.frozen.autoencoder import make_autoencoder
from lumina_jax.frozen.text_encoder import make_text_encoder
from tests.fuzz.mutations import plain
from tests.small_data import make_dataset, picture

_CONFIGS = (base, tiny, tiny_latent)
_CANARY = "executed"  # a file that would be made by a text that is run


def _leaves(config: ConfigDict, above: str = "") -> Iterator[tuple[str, str]]:
    for name in config:
        yield above + name, config.get_type(name).__name__
        if isinstance(config[name], ConfigDict):
            yield from _leaves(config[name], f"{above}{name}.")


_KEYS = {key: kind for config in _CONFIGS for key, kind in _leaves(config.get_config())}
_TEXTS = (
    "1", "0", "-1", "1e3", "1e400", "nan", "inf", "true", "None", "", "adamw", "muon", "adafactor",
    "cosine", "bfloat16", "float32", "int8", "ema", "kept", "use", "gemma2", "pixels", "vae",
    "full", "xla", "2b", "tiny", "(1,2)", "(8,12,12)", "('32x32',)", "('latents',)", "('1x',)",
    "{}",
    "{'en': 1.0}", "{'long': -1}", "[[[[", "(" * 300, "-" * 9000 + "1", "1" * 5000,
    "9" * 300 + "x9", "'" * 3, "\\", f"open('{_CANARY}', 'w')",
    f"__import__('pathlib').Path('{_CANARY}').touch()",
    "lambda: 0", "1 if 1 else 2", "f'{1}'", "b'\\xff'", "{1: 2}", "1j", "1_000", "0x10",
)  # fmt: skip
_VALUES = st.one_of(
    st.sampled_from(_TEXTS),
    plain.map(str),
    st.integers(-4, 300).map(str),
    st.floats().map(str),
    st.text(max_size=30),
)
# Values that a key of this type can have, sensible or not.
_OF_TYPE = {
    "int": st.one_of(st.integers(-3, 70), st.integers(), st.sampled_from((2**31, 2**63, 10**30))),
    "float": st.one_of(st.floats(-1, 3), st.floats(), st.integers(-3, 9)),
    "bool": st.booleans(),
    "str": st.one_of(st.sampled_from(_TEXTS), st.text(max_size=8)),
    "tuple": st.lists(st.one_of(plain, st.sampled_from(("32x32", "latents"))), max_size=3).map(
        tuple
    ),
    "ConfigDict": st.dictionaries(st.sampled_from(("en", "long", "x")), plain, max_size=2),
}
_FITTING = st.sampled_from(sorted(_KEYS.items())).flatmap(
    lambda key: st.builds("--config.{}={}".format, st.just(key[0]), _OF_TYPE.get(key[1], _VALUES))
)
_NAMES = st.one_of(
    *[st.sampled_from(sorted(_KEYS))] * 8,
    st.builds(
        "{}.{}".format, st.sampled_from(sorted(_KEYS)), st.sampled_from(("x", "0", "en", "a.b"))
    ),
    st.builds("{}[{}]".format, st.sampled_from(sorted(_KEYS)), st.integers(-2, 9)),
    st.text(max_size=12),
)
_FLAGS = st.one_of(
    *[_FITTING] * 12,
    *[st.builds("--config.{}={}".format, _NAMES, _VALUES)] * 4,
    st.builds("--config.{}".format, _NAMES),
    st.builds("--noconfig.{}".format, _NAMES),
    st.text(max_size=12),
)


def override(folder: pathlib.Path):
    """One to four flags behind --config, then all that a run asks of numbers and names."""
    make_dataset(folder / "data", [picture("a"), picture("b")])
    root = pathlib.Path(base.__file__).parent
    devices = jax.devices()[:1]
    lines = st.tuples(
        st.sampled_from(
            [f"--config={root / config.__name__.split('.')[1]}.py" for config in _CONFIGS]
        ),
        st.lists(_FLAGS, min_size=1, max_size=3),
    )

    def check(given: tuple[str, list[str]]) -> None:
        first, rest = given
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", None, lock_config=True, flag_values=values)
        flags.DEFINE_string("workdir", None, "", flag_values=values)
        small = [
            f"--config.data.directory={folder / 'data'}",
            "--config.data.resolution=32",
            "--config.autoencoder.kind=pixels",
            "--config.validation.num_records=1",
            "--config.validation.num_times=1",
        ]
        line = ["train", first, *small, *rest]
        with (
            mock.patch.object(flags, "FLAGS", values),
            mock.patch.object(sys, "argv", line),  # where ml_collections looks for overrides
            contextlib.redirect_stderr(io.StringIO()),
        ):
            try:
                cli._parse_flags(line)
                cli._check_config()
                at_the_door(values.config, devices)
            finally:
                assert not pathlib.Path(_CANARY).exists(), "a text was executed"

    return lines, check, (f"--config={root}/tiny.py", ["--config.train.batch_size=8"])


def at_the_door(config: ConfigDict, devices: list[jax.Device]) -> None:
    """What train.Trainer looks at before it builds a program."""
    train.check_numbers(config)
    text_encoder = make_text_encoder(**config.text_encoder)
    autoencoder = make_autoencoder(**config.autoencoder)
    model = train.model_config(config, text_encoder, autoencoder)
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    loader = train.make_loader(config, text_encoder, autoencoder)
    held_out = train.make_validation_loader(config, loader, text_encoder, autoencoder)
    train.check_batch_size(config, mesh)
    train.check_validation_batch(config, mesh)
    train.check_buckets(config, {*loader.buckets, *held_out.buckets}, model, autoencoder)
    rate = optim.learning_rate(optim.OptimConfig(**config.optim), config.train.num_steps)
    assert math.isfinite(rate(1))
    train.make_pipeline(config, model, mesh)


TARGETS = {"override": (override, 1)}
