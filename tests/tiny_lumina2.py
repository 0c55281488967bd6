"""A tiny `diffusers.Lumina2Pipeline` with random weights, in the files of the real one.

Every part is the class that the released model uses, with few and narrow layers, and every number
of it is drawn, norms and biases too: nothing agrees by being zero or one.
"""

import json
import pathlib

import numpy as np

# Some of each script, so that the vocabulary has whole pieces besides bytes.
SENTENCES = (
    "You are an assistant designed to generate high-quality images based on user prompts.",
    "a dog and a cat sit under a red umbrella while the sun is setting",
    "ein Hund, una manzana verde, un petit chat noir, Zürich",
    "собака и кошка на мосту",
    "一只狗坐在红色的雨伞下。猫が窓のそばで眠る。",
)


def save(folder, *, seed=0, vae_channels=(8, 16, 16), **gemma) -> pathlib.Path:
    """Writes the pipeline and returns its folder.

    Args:
      folder: To be made.
      seed: Of all weights.
      vae_channels: Of the autoencoder's blocks, multiples of 8; each but the last halves the
        picture. diffusers takes four for granted when it turns a height into latents.
      **gemma: Changes to the settings of `transformers.Gemma2Config`.
    """
    import diffusers

    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=48,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=6,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(300, 64, 64),
        cap_feat_dim=40,
    )
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(vae_channels),
        up_block_types=("UpDecoderBlock2D",) * len(vae_channels),
        block_out_channels=vae_channels,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        force_upcast=True,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=True,
    )
    tokenizer = make_tokenizer()
    pipeline = diffusers.Lumina2Pipeline(
        transformer=randomize(transformer, seed + 1),
        vae=randomize(vae, seed + 2),
        text_encoder=make_gemma(seed=seed, vocab_size=len(tokenizer), **gemma),
        tokenizer=tokenizer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
    )
    pipeline.save_pretrained(folder)
    return pathlib.Path(folder)


def save_text_encoder(folder, *, seed=0, plain=False, **gemma) -> pathlib.Path:
    """Writes text encoder and tokenizer and returns the folder.

    Args:
      folder: To be made.
      seed: Of the weights.
      plain: Both side by side, and the names with the prefix of the language model, as in
        google/gemma-2-2b; in the two subfolders of a diffusers pipeline otherwise.
      **gemma: Changes to the settings of `transformers.Gemma2Config`.
    """
    folder = pathlib.Path(folder)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder if plain else folder / "tokenizer")
    model = make_gemma(seed=seed, causal=plain, vocab_size=len(tokenizer), **gemma)
    model.save_pretrained(folder if plain else folder / "text_encoder")
    return folder


def make_gemma(*, seed=0, causal=False, **changes):
    """A random `transformers.Gemma2Model`, or the language model around one."""
    import transformers

    config = transformers.Gemma2Config(
        **{
            "vocab_size": 512,
            "hidden_size": 40,  # not heads * head_dim, as in the released sizes
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "query_pre_attn_scalar": 16,
            "attn_implementation": "eager",  # the one that applies the soft cap
            **changes,
        }
    )
    cls = transformers.Gemma2ForCausalLM if causal else transformers.Gemma2Model
    return randomize(cls(config), seed).eval()


def make_tokenizer():
    """A `transformers.GemmaTokenizer` trained on SENTENCES; bytes stand in for unknown letters."""
    import tokenizers
    import transformers

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{b:02X}>" for b in range(256))]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True))
    bpe.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=448, special_tokens=special, show_progress=False
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    model = json.loads(bpe.to_str())["model"]
    return transformers.GemmaTokenizer(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        add_bos_token=True,
        padding_side="right",
    )


def randomize(module, seed):
    """Draws every parameter of a PyTorch module, in the order of its names."""
    import torch

    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            noise = rng.normal(size=parameter.shape)
            if parameter.ndim == 1:
                # Gemma multiplies by 1 + weight, the others by the weight.
                is_scale = name.endswith("weight") and "gemma" not in type(module).__name__.lower()
                value = is_scale + 0.2 * noise
            elif "embed_tokens" in name:
                value = noise / parameter.shape[1] ** 0.5
            else:
                value = noise / np.prod(parameter.shape[1:]) ** 0.5
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                value = 4 * value  # logits that reach a soft cap of 50
            parameter.copy_(torch.from_numpy(np.asarray(value, np.float32)))
    return module
