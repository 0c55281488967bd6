"""Checkpoints of the Qwen-VL family: what asking them and training them have in common.

A question about a picture becomes a row of tokens by the checkpoint's own chat template. The mark
of the picture is repeated once for each token that the vision tower makes of it:

    <|im_start|>user <|vision_start|> <|image_pad|> x N <|vision_end|> question <|im_end|> ...

The template is cut at its special tokens, and what lies between is read as plain text. So nothing
that a question or a caption says can end a turn or stand for a picture.

transformers has a class for this, `Qwen2VLProcessor`, which cannot be built without torchvision
since it reads videos too. Pictures are resized by Pillow here, whatever is installed.

Letters of the shapes: B rows, T tokens, P patches of all pictures, V numbers of a patch.
"""

import dataclasses
import hashlib
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import huggingface_hub.errors
import jinja2
from jaxtyping import Float, Int
from PIL import Image

from lumina_jax.data.images import Rejected
from lumina_jax.errors import InputError, listed
from lumina_jax.untrusted import read_json

try:
    import safetensors
    import torch
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
except ImportError as error:
    raise InputError(
        f"Captioners on this machine need a package that is not installed ({error}). Install it: "
        "pip install 'lumina-jax[caption]'"
    ) from error

# What config.json calls it, and its class in transformers.
FAMILIES = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}
TEXT_FAMILIES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
MAX_PIXELS = 1280 * 28 * 28  # 1280 tokens where a token is 28 pixels wide
DTYPES = ("auto", "bfloat16", "float16", "float32")
TOO_NARROW = "too narrow for the model"
_MAX_ASPECT = 200  # beyond it transformers' `smart_resize` raises
_PLACES, _PLACE = 17, 2**16  # of a file of weights, looked at to tell it from others; bytes
_IMAGE = "<|image_pad|>"
# Stands for the question in a rendered template. It is no letter of any script.
_QUESTION = "\ufdd0"
# What the loaders of a checkpoint raise where a file is missing, damaged or of another model.
_UNREADABLE = (
    AttributeError,
    KeyError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    huggingface_hub.errors.StrictDataclassError,
    safetensors.SafetensorError,
)
_DOWNLOAD = "hf download Qwen/Qwen2.5-VL-7B-Instruct --local-dir"
_AGAIN = "Download the checkpoint again in full."
# The Qwen-VL models' own for one question, without tools and videos.
_CHAT_ML = """\
<|im_start|>system
You are a helpful assistant.<|im_end|>
<|im_start|>user
{% for content in messages[0].content -%}
{%- if content.type == "image" -%}<|vision_start|><|image_pad|><|vision_end|>
{%- else -%}{{ content.text }}{%- endif -%}
{%- endfor -%}<|im_end|>
<|im_start|>assistant
{# without this the line break before it would be lost #}"""


def find_family(path: os.PathLike | str) -> str:
    """Returns the family of the checkpoint in a folder, by its config.json."""
    return _read_config(path)["model_type"]


def _read_config(path: os.PathLike | str) -> dict[str, Any]:
    folder = pathlib.Path(path)
    if not folder.is_dir():
        raise InputError(
            f"{os.fspath(path)} is not a folder on this machine. It must hold the weights of a "
            f"captioner, and nothing is downloaded here. Get them first: {_DOWNLOAD} FOLDER"
        )
    try:
        config = read_json(folder / "config.json", _AGAIN)
    except FileNotFoundError:
        raise InputError(
            f"{folder} holds no config.json, so it is no checkpoint. Give the folder of one, or "
            f"get one: {_DOWNLOAD} FOLDER"
        ) from None
    family = config.get("model_type")
    if family not in (*FAMILIES, *TEXT_FAMILIES):
        raise InputError(
            f"{folder} holds a model of type {family!r:.60}. Supported are {', '.join(FAMILIES)}, "
            f"and for questions without a picture {', '.join(TEXT_FAMILIES)}. Serve others with "
            "vLLM or the like."
        )
    return config


def load_model(path: os.PathLike | str, device: str, dtype: str) -> transformers.PreTrainedModel:
    """Returns the model of a folder, to be asked.

    Args:
        path: Of the checkpoint; its weights must be safetensors.
        device: Such as "cuda" or "cuda:1"; "auto" is a GPU if there is one, else the CPU.
        dtype: Of the weights; "auto" is bfloat16 on a GPU and float32 on a CPU.
    """
    family, folder = find_family(path), pathlib.Path(path)
    where = _device(device)
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
    if dtype == "auto":
        dtype = "float32" if where.type == "cpu" else "bfloat16"
    if not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{folder} holds no weights as *.safetensors; others are not opened, since a pickle "
            "can run any code. Download the safetensors of the model, or convert it."
        )
    try:
        model, found = getattr(transformers, {**FAMILIES, **TEXT_FAMILIES}[family]).from_pretrained(
            str(folder),
            dtype=getattr(torch, dtype),
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except _UNREADABLE as error:
        raise InputError(
            f"The weights in {folder} cannot be loaded ({_short(error)}). {_AGAIN}"
        ) from error
    if missing := sorted(found["missing_keys"]):
        # transformers would fill them with random numbers.
        raise InputError(f"{folder} lacks the weights {listed(missing, 3)}. {_AGAIN}")
    try:
        return model.eval().to(where)
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"The model in {folder} is too large for {where}: {_short(error)}. Use a smaller one, "
            "or one served over several devices."
        ) from error


def mark_of(path: os.PathLike | str) -> str:
    """Returns eight letters that differ where the weights do, from a look at parts of them."""
    digest = hashlib.sha256()
    for file in sorted(pathlib.Path(path).glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as content:
            for number in range(_PLACES):
                content.seek(number * max(size - _PLACE, 0) // (_PLACES - 1))
                digest.update(content.read(_PLACE))
    return digest.hexdigest()[:8]


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"There is no device {name!r} here ({_short(error)}). Choose auto, cpu or cuda."
        ) from None
    return device


@dataclasses.dataclass(frozen=True)
class Chat:
    """Turns questions about pictures into what the models read, and tokens into text.

    Its attributes can be pickled, so that workers prepare batches without the model.

    Args:
        family: Of the checkpoint.
        tokenizer: Its own.
        processor: Its own, of pictures; None where the model reads text alone.
        min_pixels: Pictures with fewer are enlarged.
        max_pixels: Pictures with more are shrunk; others keep about the size they have, to whole
            tokens.
        parts: The chat template by whether there is a picture: ids of special tokens, and text
            between them.
    """

    family: str
    tokenizer: Any
    processor: Any
    min_pixels: int
    max_pixels: int
    parts: dict[bool, tuple[int | str, ...]]

    @classmethod
    def load(
        cls,
        path: os.PathLike | str,
        min_pixels: int | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> "Chat":
        """Reads the tokenizer, the settings for pictures and the template of a checkpoint.

        Args:
            path: Of its folder.
            min_pixels: As above; None is the checkpoint's own number.
            max_pixels: As above.
        """
        config, folder = _read_config(path), pathlib.Path(path)
        family = config["model_type"]
        processor = None
        if not (folder / "tokenizer.json").exists() and not (folder / "vocab.json").exists():
            # transformers would make an empty one.
            raise InputError(f"{folder} holds no tokenizer.json and no vocab.json. {_AGAIN}")
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
            if family in FAMILIES:
                image_processor = transformers.Qwen2VLImageProcessorPil
                processor = image_processor.from_pretrained(str(folder), local_files_only=True)
        except _UNREADABLE as error:
            raise InputError(
                f"The tokenizer or the preprocessor_config.json in {folder} cannot be read "
                f"({_short(error)}). {_AGAIN}"
            ) from error
        if processor is not None:
            if min_pixels is None:
                min_pixels = min(processor.size["shortest_edge"], max_pixels)
            least = (processor.patch_size * processor.merge_size) ** 2
            _check_same_model(folder, config, tokenizer, processor)
            if not 1 <= min_pixels <= max_pixels or max_pixels < least:
                raise InputError(
                    f"min_pixels={min_pixels} and max_pixels={max_pixels} do not fit: the first "
                    "must be 1 or more and not above the second, which must be at least "
                    f"{least}, a token."
                )
        if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
            raise InputError(f"The tokenizer in {folder} names no end or no padding. {_AGAIN}")
        template = _find_template(folder, tokenizer)
        parts = {
            with_picture: _cut(folder, tokenizer, template, family, with_picture)
            for with_picture in {False, family in FAMILIES}
        }
        return cls(family, tokenizer, processor, min_pixels or 0, max_pixels, parts)

    def tokens(self, question: str, image: Image.Image | None) -> list[int]:
        """Returns the tokens up to where the answer begins; Rejected for an impossible picture."""
        row: list[int] = []
        for part in self.parts[image is not None]:
            if isinstance(part, str):
                row += _plain(self.tokenizer, part.replace(_QUESTION, question))
            elif part == self._image_id and image is not None:
                row += [part] * self._num_tokens(image)
            else:
                row.append(part)
        return row

    def answer_tokens(self, answer: str) -> list[int]:
        """Returns the tokens of an answer and of its end."""
        return [*_plain(self.tokenizer, answer), self.tokenizer.eos_token_id]

    def text(self, tokens: Sequence[int]) -> str:
        """Returns what tokens say, without special ones."""
        return self.tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def batch(
        self, rows: Sequence[Sequence[int]], images: Sequence[Image.Image | None], side: str
    ) -> dict[str, Int[torch.Tensor, "_ _"] | Float[torch.Tensor, "P V"]]:
        """Returns what the model's `forward` takes.

        Args:
            rows: The tokens of each conversation.
            images: Its picture, upright and RGB.
            side: Where shorter rows are filled up: "left" to be continued, "right" to train on.
        """
        ids = pad(rows, self.tokenizer.pad_token_id, side)
        mask = pad([[1] * len(row) for row in rows], 0, side)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self.processor is not None:
            inputs["mm_token_type_ids"] = (ids == self._image_id).long()
        if pictures := [image for image in images if image is not None]:
            size = {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels}
            made = self.processor(images=pictures, size=size, return_tensors="pt")
            inputs |= {name: made[name] for name in ("pixel_values", "image_grid_thw")}
        return inputs

    @property
    def _image_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(_IMAGE)

    def _num_tokens(self, image: Image.Image) -> int:
        """How many tokens the vision tower makes of a picture."""
        if max(image.size) > _MAX_ASPECT * min(image.size):
            raise Rejected(TOO_NARROW, f"{image.width} x {image.height}")
        side = self.processor.patch_size * self.processor.merge_size
        height, width = smart_resize(
            image.height, image.width, side, self.min_pixels, self.max_pixels
        )
        return (height // side) * (width // side)


def pad(rows: Sequence[Sequence[int]], value: int, side: str) -> Int[torch.Tensor, "B T"]:
    """Returns rows of different lengths as a tensor, filled up on one side."""
    padded = torch.full((len(rows), max(map(len, rows))), value)
    for out, row in zip(padded, rows, strict=True):
        place = slice(len(out) - len(row), None) if side == "left" else slice(len(row))
        out[place] = torch.tensor(row)
    return padded


def _plain(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text in which no special token is seen."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def _check_same_model(
    folder: pathlib.Path, config: dict[str, Any], tokenizer: Any, processor: Any
) -> None:
    """Raises where the files of a folder are of several models."""
    vision = config.get("vision_config") or {}
    names = {
        "image_token_id": (tokenizer.convert_tokens_to_ids(_IMAGE), config.get("image_token_id")),
        "patch_size": (processor.patch_size, vision.get("patch_size")),
        "merge_size": (processor.merge_size, vision.get("spatial_merge_size")),
    }
    differences = [
        f"{name} is {read} in it and {wanted} for the model"
        for name, (read, wanted) in names.items()
        if wanted not in (None, read)
    ]
    if differences:
        raise InputError(
            f"The tokenizer or the preprocessor_config.json in {folder} is of another model: "
            f"{', '.join(differences)}. {_AGAIN}"
        )


def _find_template(folder: pathlib.Path, tokenizer: Any) -> str:
    """The chat template: of the processor, whose file knows of pictures, or of the tokenizer."""
    if not (folder / "chat_template.jinja").exists():  # the tokenizer has read this one
        try:
            template = read_json(folder / "chat_template.json", _AGAIN).get("chat_template")
        except FileNotFoundError:
            template = None
        if isinstance(template, str):
            return template
    template = tokenizer.chat_template
    return template if isinstance(template, str) else _CHAT_ML


def _cut(
    folder: pathlib.Path, tokenizer: Any, template: str, family: str, with_picture: bool
) -> tuple[int | str, ...]:
    """The rendered template as ids of special tokens and the text between them."""
    content: Any = [{"type": "image"}] if with_picture else []
    content.append({"type": "text", "text": _QUESTION})
    if family in TEXT_FAMILIES and template is not _CHAT_ML:
        content = _QUESTION  # templates of such models add it to other text
    try:
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=template,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,  # of models that can do without
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise InputError(
            f"The chat template in {folder} cannot be used ({_short(error)}). {_AGAIN}"
        ) from error
    if rendered.count(_QUESTION) != 1 or rendered.count(_IMAGE) != with_picture:
        raise InputError(
            f"The chat template in {folder} must show a question once and {_IMAGE} once for its "
            f"picture; it makes {rendered.replace(_QUESTION, 'QUESTION')!r:.300}. {_AGAIN}"
        )
    ids = {str(t): id for id, t in tokenizer.added_tokens_decoder.items() if t.special}
    if with_picture and _IMAGE not in ids:
        raise InputError(f"The tokenizer in {folder} has no special token {_IMAGE}. {_AGAIN}")
    if seen := [token for token, id in ids.items() if id in _plain(tokenizer, token)]:
        raise InputError(
            f"The tokenizer in {folder} takes {listed(seen, 3)} written in a text for the special "
            f"token. Use the tokenizer of the released model. {_AGAIN}"
        )
    pattern = "|".join(map(re.escape, sorted(ids, key=len, reverse=True)))
    pieces = re.split(f"({pattern})", rendered)
    return tuple(ids.get(piece, piece) for piece in pieces if piece)


def _short(error: BaseException) -> str:
    return f"{' '.join(str(error).split()):.300}"
