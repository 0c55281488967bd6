r"""Fine-tunes a Qwen-VL model on pictures with captions, to caption others alike.

    hf download Qwen/Qwen2.5-VL-7B-Instruct --local-dir models/qwen
    python tools/train_captioner.py folder --input=photos --base=models/qwen --output=runs/mine

trains LoRA on every picture below `photos` that has captions beside it, and writes the new
checkpoint to runs/mine/captioner, which tools/caption.py takes as --model. metrics.jsonl and
loss.png show how the loss fell. The sources are those of tools/prepare_data.py; `openmoji` needs no
input. --rank=0 trains all weights. On several GPUs of a machine:

    torchrun --nproc_per_node=8 tools/train_captioner.py folder ...

A run that was stopped goes on from its last checkpoint when the same command is given again, and
one that is finished is left as it is.
"""

import dataclasses

from absl import flags, logging

from lumina_jax import cli, source_flags
from lumina_jax.errors import InputError

_BASE = flags.DEFINE_string("base", None, "Folder of the checkpoint to begin with.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory to write to.")
_PROMPTS = flags.DEFINE_string("prompts", None, "Folder of prompts; those of the package if none.")
source_flags.define(captions=True)
_RESOLUTION = flags.DEFINE_integer("resolution", 256, "openmoji: pixels of a drawing.")
# Of the training.
_KINDS = flags.DEFINE_list("kinds", [], "Kinds of captions to train on. Default: all.")
_LANGUAGES = flags.DEFINE_list("languages", [], "Languages to train on. Default: all.")
_NUM_STEPS = flags.DEFINE_integer("num_steps", 1000, "Updates of the weights.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 4, "Pictures in a step of one device.")
_ACCUMULATION = flags.DEFINE_integer("accumulation", 4, "Batches for an update.")
_RANK = flags.DEFINE_integer("rank", 64, "Of LoRA's matrices; 0 trains all weights.")
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 1e-4, "The highest. For --rank=0 try 1e-5.")
_WARMUP = flags.DEFINE_float("warmup", 0.03, "Share of the steps in which it rises.")
_WEIGHT_DECAY = flags.DEFINE_float("weight_decay", 0.0, "Of AdamW.")
_HELD_OUT = flags.DEFINE_float("held_out", 0.02, "Share of the pictures to validate on.")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 1024, "Longer captions are left out.")
_MAX_PIXELS = flags.DEFINE_integer("max_pixels", 1_003_520, "Pictures with more are shrunk.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the order, of the captions drawn and of LoRA's start.")
# How it is run.
_DEVICE = flags.DEFINE_enum("device", "auto", ["auto", "cpu"], "auto is a GPU if there is one.")
_NUM_WORKERS = flags.DEFINE_integer("num_workers", 4, "Processes of a device that read pictures.")
_LOG_EVERY = flags.DEFINE_integer("log_every", 10, "Steps from a line of metrics to the next.")
_SAVE_EVERY = flags.DEFINE_integer("save_every", 100, "Steps to a checkpoint and a validation.")


def main(kind: str) -> None:
    source = source_flags.make(kind, _RESOLUTION.value)
    # Slow to import, and not needed to tell a wrong flag.
    from lumina_jax.unicap import training
    from lumina_jax.unicap.prompts import load_prompts

    fields = dataclasses.fields(training.Settings)
    given = {field.name: flags.FLAGS[field.name].value for field in fields}
    given |= {name: tuple(given[name]) for name in ("kinds", "languages")}
    try:
        folder = training.train(
            _BASE.value,
            source,
            _OUTPUT.value,
            load_prompts(_PROMPTS.value).look,
            training.Settings(**given),
            device=_DEVICE.value,
            num_workers=_NUM_WORKERS.value,
            log_every=_LOG_EVERY.value,
            save_every=_SAVE_EVERY.value,
        )
    except OSError as error:
        logging.info("What failed:", exc_info=True)
        raise InputError(
            f"{error}. What is done is kept; mend it and give the same command again."
        ) from error
    logging.info("The trained captioner is in %s.", folder)


if __name__ == "__main__":
    cli.run(main, required=("base", "output"), commands=source_flags.SOURCES)
