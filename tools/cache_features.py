r"""Copies a data set and adds what the frozen encoders make of it, so that training need not.

    python tools/cache_features.py --config=configs/tiny.py --output=data/openmoji_cached

encodes the pictures and captions of `config.data.directory` with the encoders and the system prompt
of the config. A run reads the copy with

    --config.data.directory=data/openmoji_cached --config.data.cached="('latents','cap_feats')"

and refuses one that was made by other encoders. Running it again leaves a finished copy as it is.
"""

import pathlib
import sys

from absl import flags
from etils import epath
from ml_collections import config_flags

from lumina_jax import cli, sharding
from lumina_jax.frozen import cache
from lumina_jax.frozen.autoencoder import make_autoencoder
from lumina_jax.frozen.text_encoder import make_text_encoder

config_flags.DEFINE_config_file("config", None, "The config of the runs to come.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory to write the copy to.")
_FEATURES = flags.DEFINE_list("features", ["latents", "cap_feats"], "What to add.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Pictures, or captions, encoded at a time.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace the data set that is there.")


def main() -> None:
    config = flags.FLAGS.config
    manifest = cache.cache_features(
        config.data.directory,
        _OUTPUT.value,
        _FEATURES.value,
        text_encoder=make_text_encoder(**config.text_encoder),
        autoencoder=make_autoencoder(**config.autoencoder),
        system_prompt=config.data.system_prompt,
        mesh=sharding.make_mesh(**config.mesh),
        batch_size=_BATCH_SIZE.value,
        sample=config.autoencoder.sample,
        overwrite=_OVERWRITE.value,
    )
    print(
        f"{manifest.num_records:,} records with {' and '.join(sorted(manifest.cache))} in "
        f"{_OUTPUT.value}: {_num_bytes(_OUTPUT.value) / 1e6:,.1f} MB, against "
        f"{_num_bytes(config.data.directory) / 1e6:,.1f} MB in {config.data.directory}."
    )
    if (texts := manifest.cache.get("cap_feats")) and texts.num_truncated:
        print(f"{texts.num_truncated:,} captions were cut to {texts.max_tokens} tokens.")


def _num_bytes(directory: str) -> int:
    return sum(path.stat().length for path in epath.Path(directory).iterdir())


if __name__ == "__main__":
    # Run as a file, Python looks for modules beside it; a config imports its base from the root.
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    cli.run(main, required=("config", "output"))
