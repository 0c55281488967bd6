"""Seconds a picture: our sampler and diffusers', on this machine, from the same random weights.

    python tools/benchmark_sampling.py --size=small --side=256 --num_steps=20 --rounds=5

Both load one folder that diffusers wrote, in float32, and take turns, so that whatever else the
machine does meets both alike. The first call of each, which compiles ours, is not counted. Needs
the `dev` extra: torch and diffusers.
"""

import json
import pathlib
import statistics
import tempfile
import time

import numpy as np
from absl import flags

from lumina_jax import cli
from lumina_jax.sampling.pipeline import Pipeline
from lumina_jax.system_prompts import SYSTEM_PROMPTS

# Of the transformer; text encoder and VAE are shrunk alike.
SIZES = {
    "tiny": dict(hidden_size=96, num_layers=4, heads=6, kv_heads=2, vae=(16, 16, 32, 32)),
    "small": dict(hidden_size=384, num_layers=8, heads=12, kv_heads=4, vae=(32, 64, 128, 128)),
    "medium": dict(hidden_size=768, num_layers=12, heads=24, kv_heads=8, vae=(64, 128, 256, 256)),
}

_SIZE = flags.DEFINE_enum("size", "small", list(SIZES), "Of the random model.")
_SIDE = flags.DEFINE_integer("side", 256, "Of the picture, in pixels.")
_NUM_STEPS = flags.DEFINE_integer("num_steps", 20, "Intervals of the Euler solver.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 1, "Pictures at a time.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns that are counted.")

PROMPT = (
    "A red fox in deep snow looks at the camera, late afternoon light, a birch forest behind it"
)


def save_pipeline(folder: pathlib.Path, size: str) -> None:
    """Writes a random pipeline of the released architecture, fewer and narrower layers."""
    import diffusers
    import torch
    import transformers

    sizes, width = SIZES[size], SIZES[size]["hidden_size"]
    third = width // sizes["heads"] // 3 // 2 * 2
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    diffusers.Lumina2Pipeline(
        transformer=diffusers.Lumina2Transformer2DModel(
            sample_size=32,
            hidden_size=width,
            num_layers=sizes["num_layers"],
            num_attention_heads=sizes["heads"],
            num_kv_heads=sizes["kv_heads"],
            axes_dim_rope=(width // sizes["heads"] - 2 * third, third, third),
            cap_feat_dim=width,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=sizes["vae"],
            layers_per_block=2,
            latent_channels=16,
            norm_num_groups=16,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=transformers.Gemma2Model(
            transformers.Gemma2Config(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=sizes["num_layers"],
                num_attention_heads=8,
                num_key_value_heads=4,
                head_dim=width // 8,
            )
        ),
        tokenizer=tokenizer,
    ).save_pretrained(folder)


def make_tokenizer():
    """A Gemma tokenizer with about as many tokens for the prompt as the real one has."""
    import tokenizers
    import transformers

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{b:02X}>" for b in range(256))]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True))
    bpe.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Split("▁", "merged_with_next")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=2000, special_tokens=special, show_progress=False
    )
    bpe.train_from_iterator([PROMPT, *SYSTEM_PROMPTS.values()], trainer)
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return transformers.GemmaTokenizer(
        vocab=model["vocab"], merges=merges, add_bos_token=True, padding_side="right"
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_pipeline(pathlib.Path(folder), _SIZE.value)
        compare(folder)


def compare(folder: str) -> None:
    import diffusers

    theirs = diffusers.Lumina2Pipeline.from_pretrained(folder)
    ours = Pipeline.from_diffusers(folder, dtype="float32")
    theirs.set_progress_bar_config(disable=True)
    num, side, steps = _BATCH_SIZE.value, _SIDE.value, _NUM_STEPS.value
    prompts = [PROMPT] * num
    programs = {
        "diffusers": lambda: (
            theirs(
                prompts, height=side, width=side, num_inference_steps=steps, output_type="np"
            ).images
        ),
        "lumina_jax": lambda: ours(
            prompts, height=side, width=side, num_steps=steps, output="float"
        ),
    }
    for name, draw in programs.items():
        began = time.perf_counter()
        images = draw()
        print(f"{name}: first call {time.perf_counter() - began:.1f} s", flush=True)
        if not np.isfinite(images).all():
            raise FloatingPointError(f"{name} drew numbers that are not finite")
    ratios = []
    for turn in range(_ROUNDS.value):
        seconds = {}
        # Who goes first alternates too.
        for name, draw in sorted(programs.items(), reverse=bool(turn % 2)):
            began = time.perf_counter()
            draw()
            seconds[name] = (time.perf_counter() - began) / num
        ratios.append(seconds["diffusers"] / seconds["lumina_jax"])
        print(
            f"{seconds['diffusers']:.2f} s a picture in diffusers, {seconds['lumina_jax']:.2f} s "
            f"here: {ratios[-1]:.2f} times as fast",
            flush=True,
        )
    median = statistics.median(ratios)
    print(f"{_SIZE.value}, {side} px, batch {num}, {steps} steps: median ratio {median:.2f}")


if __name__ == "__main__":
    cli.run(main)
