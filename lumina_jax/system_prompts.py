"""The sentences that Lumina-Image 2.0 puts before a caption, for the text encoder to read.

A system prompt names the domain of a picture: synthetic or photographed, one panel or several. The
text is what a model was trained with, letter by letter, so none may be reworded. "<Prompt Start>"
is plain text to the tokenizer, and the caption follows the blank after it. A caption that is
dropped takes its system prompt along: the unconditional input is "" (official finetune.py).

Lumina-Image 2.0 (arXiv 2503.21758), table 1; Alpha-VLLM/Lumina-Image-2.0, finetune.py and demo.py.
"""

from lumina_jax.errors import InputError

SYSTEM_PROMPTS = {
    # Template A of the paper, and what the official fine-tuning puts before an ordinary caption.
    "base": (
        "You are an assistant designed to generate high-quality images based on user prompts. "
        "<Prompt Start> "
    ),
    # Template B of the paper; the official demo and diffusers sample with it.
    "real": (
        "You are an assistant designed to generate superior images with the superior degree of "
        "image-text alignment based on textual prompts or user prompts. <Prompt Start> "
    ),
    # The official fine-tuning, before a caption of the highest quality.
    "align": (
        "You are an assistant designed to generate high-quality images with the highest degree of "
        "image-text alignment based on textual prompts. <Prompt Start> "
    ),
    "aesthetics": (
        "You are an assistant designed to generate high-quality images with highest degree of "
        "aesthetics based on user prompts. <Prompt Start> "
    ),
    "4grid": (
        "You are an assistant designed to generate four high-quality images with highest degree of "
        "aesthetics arranged in 2x2 grids based on user prompts. <Prompt Start> "
    ),
    "empty": "",
}

_OPPOSITE = {
    "lower half": "upper half",
    "upper half": "lower half",
    "left half": "right half",
    "right half": "left half",
}


_MARK = "<Prompt Start>"


def prefixed(caption: str, name: str) -> str:
    """The caption behind the system prompt of that name, or behind a text of its own.

    A text is told from a name by the mark that ends it, as `dual_panel` writes it.
    """
    if _MARK in name:
        return name.rstrip() + " " + caption
    if name not in SYSTEM_PROMPTS:
        raise InputError(
            f"No system prompt is called {name!r}; choose one of: {', '.join(SYSTEM_PROMPTS)}."
        )
    return SYSTEM_PROMPTS[name] + caption


def dual_panel(condition: str = "depth map", half: str = "lower half") -> str:
    """Template C of the paper: a picture in two panels, the other one for its `condition`.

    Args:
      condition: What is seen in the panel beside the picture; the brackets around it stay.
      half: Where that panel is: "lower half", "upper half", "left half" or "right half".
    """
    if half not in _OPPOSITE:
        raise InputError(f"half={half!r} is not one of {', '.join(_OPPOSITE)}.")
    return (
        f"Generate a dual-panel image where the <{half}> displays a <{condition}>, while the "
        f"<{_OPPOSITE[half]}> retains the original image for direct visual comparison. "
        "<Prompt Start> "
    )
