"""Tiny checkpoints of the Qwen-VL families with random weights, in the files of the real ones.

Every part is the class that the released models use, with few and narrow layers. The tokenizer is
Qwen's, with a vocabulary of bytes and of some pieces learnt from the sentences below.
"""

import json
import os
import pathlib

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

SENTENCES = (
    "You are a helpful assistant.",
    "user assistant system",
    "Describe this picture in one sentence. What is its name?",
    "the dog and the cat, a red square on a white ground",
    "描述这张图片。狗和猫，白色背景上的红色方块",
)
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
# That of Qwen2.5-VL, without tools and videos.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
_WIDTH = 64


def save(
    folder: os.PathLike | str,
    family: str = "qwen2_vl",
    *,
    seed: int = 0,
    scale: float = 0.3,
    chat_template: str | None = CHAT_TEMPLATE,
) -> pathlib.Path:
    """Writes a checkpoint and returns its folder.

    Args:
      folder: To be made.
      family: One of `FAMILIES`, or "qwen2" for a model of text alone.
      seed: Of all weights.
      scale: Standard deviation of the matrices. The larger it is, the more the picture and the
        prompt decide the text; the smaller, the better the model trains.
      chat_template: Written to `chat_template.json` as the released models have it; None: not.
    """
    folder = pathlib.Path(folder)
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _model(family, tokenizer, scale)
    model.generation_config = transformers.GenerationConfig(
        # As released: what is drawn is always the likeliest token, and words avoid each other.
        do_sample=True,
        repetition_penalty=1.5,
        top_k=1,
        top_p=0.001,
        temperature=0.01,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    if family != "qwen2":
        patch_size = model.config.vision_config.patch_size
        processor = transformers.Qwen2VLImageProcessorPil(patch_size=patch_size)
        processor.save_pretrained(folder)
    if chat_template is not None:
        text = json.dumps({"chat_template": chat_template})
        (folder / "chat_template.json").write_text(text)
    return folder


def _tokenizer() -> transformers.Qwen2Tokenizer:
    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False)
    learnt.train_from_iterator(SENTENCES, trainer)
    bpe = json.loads(learnt.to_str())["model"]
    return transformers.Qwen2Tokenizer(
        vocab=bpe["vocab"],
        merges=[tuple(merge) for merge in bpe["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL[1:]),
    )


def _model(family: str, tokenizer, scale: float) -> transformers.PreTrainedModel:
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=scale,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if family == "qwen2":
        return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**text))
    vision = dict(depth=2, num_heads=2, initializer_range=scale)
    tokens = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    if family == "qwen2_vl":
        vision |= dict(embed_dim=32, hidden_size=_WIDTH, mlp_ratio=2, patch_size=14)
        config = transformers.Qwen2VLConfig
        model = transformers.Qwen2VLForConditionalGeneration
    elif family == "qwen2_5_vl":
        vision |= dict(hidden_size=32, intermediate_size=64, out_hidden_size=_WIDTH, patch_size=14)
        vision |= dict(window_size=56, fullatt_block_indexes=[1])
        config = transformers.Qwen2_5_VLConfig
        model = transformers.Qwen2_5_VLForConditionalGeneration
    elif family == "qwen3_vl":
        text["head_dim"] = 16
        rope |= dict(mrope_section=[3, 3, 2], mrope_interleaved=True)
        vision |= dict(hidden_size=32, intermediate_size=64, out_hidden_size=_WIDTH, patch_size=16)
        vision |= dict(deepstack_visual_indexes=[0], num_position_embeddings=64)
        config, model = transformers.Qwen3VLConfig, transformers.Qwen3VLForConditionalGeneration
    else:
        raise ValueError(f"no family {family!r}")
    text["rope_parameters"] = rope
    return model(config(text_config=text, vision_config=vision, **tokens))
