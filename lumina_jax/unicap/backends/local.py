"""A vision-language model on a device of this machine, by PyTorch and transformers.

Questions are asked in batches of like length, filled up on the left. What a request draws follows
from its seed, its question and its picture alone: by the Gumbel trick the likeliest token of

    logits / temperature + noise,    noise = -log(an exponential variable)

is a draw from softmax(logits / temperature), and each request has a generator of its own for the
noise. So a reply is the same in whatever batch it is asked, up to rounding, and no other random
numbers are disturbed.
"""

import hashlib
import itertools
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from jaxtyping import Float, Int

from lumina_jax.data.images import Rejected
from lumina_jax.errors import InputError
from lumina_jax.unicap import qwen
from lumina_jax.unicap.backends.base import Reply, Request
from lumina_jax.unicap.qwen import torch, transformers  # it says what to install without them

TOO_LARGE, TOO_LONG = "too large for the model", "too long for the model"


class _Question(NamedTuple):
    request: Request
    tokens: list[int]


class LocalBackend:
    """Asks the checkpoint in a folder; nothing is downloaded and no code of the folder is run.

    A batch holds requests of one `max_tokens`, those of like length together: pictures of one size
    and questions of one length need no filling up. Where the memory of the device does not suffice
    for a batch, its halves are asked.

    The settings for drawing in generation_config.json are not used (released models always take the
    likeliest token by them); only its marks of the end are.

    Args:
        path: of the folder: config.json, *.safetensors, the tokenizer.
        device: such as "cuda" or "cuda:1"; "auto" is a GPU if there is one, else the CPU.
        dtype: of the weights; "auto" is bfloat16 on a GPU and float32 on a CPU.
        batch_size: requests that are worked on together.
        min_pixels: pictures with fewer are enlarged; None is the checkpoint's own number.
        max_pixels: pictures with more are shrunk. Others keep their size, to whole tokens.
        name: to be stored with each caption; by default that of the folder. A mark of the weights
            is added: two checkpoints may have one name, and a table is of one model.
    """

    in_threads = False

    def __init__(
        self,
        path: os.PathLike | str,
        *,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int = 8,
        min_pixels: int | None = None,
        max_pixels: int = qwen.MAX_PIXELS,
        name: str = "",
    ):
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size} must be 1 or more.")
        self._path = os.fspath(path)
        self._chat = qwen.Chat.load(path, min_pixels, max_pixels)
        self._model = qwen.load_model(path, device, dtype)
        self._batch_size = batch_size
        self._ends = _ends(self._model, self._chat)
        # Its own would add a penalty for repetition and the like, also to the likeliest token.
        self._model.generation_config = transformers.GenerationConfig(
            do_sample=False,
            eos_token_id=self._ends,
            pad_token_id=self._chat.tokenizer.pad_token_id,
        )
        self._max_length = self._model.config.get_text_config().max_position_embeddings
        self.model = f"{name or pathlib.Path(path).resolve().name}-{qwen.mark_of(path)}"
        self.num_pictures = 4 * batch_size  # enough to find some of like length

    def ask(self, requests: Sequence[Request]) -> list[Reply]:
        """Returns a reply to each request, in their order; `num_tokens` counts the end too."""
        self._check(requests)
        replies: dict[int, Reply] = {}
        questions: dict[int, _Question] = {}
        for index, request in enumerate(requests):
            try:
                questions[index] = self._question(request)
            except Rejected as fault:
                replies[index] = Reply("", fault=fault)
        for indices in _batches(questions, self._batch_size):
            answers = self._answer([questions[index] for index in indices])
            replies.update(zip(indices, answers, strict=True))
        return [replies[index] for index in range(len(requests))]

    def _check(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if request.image is not None and self._chat.family in qwen.TEXT_FAMILIES:
                raise InputError(
                    f"{self._path} holds a model of type {self._chat.family}, which reads text "
                    f"alone, and it is asked about a picture. Give one of type "
                    f"{', '.join(qwen.FAMILIES)}."
                )
            if request.max_tokens < 1 or not 0 <= request.temperature < float("inf"):
                raise InputError(
                    f"max_tokens={request.max_tokens} must be 1 or more, and "
                    f"temperature={request.temperature} must be 0 or more."
                )

    def _question(self, request: Request) -> _Question:
        tokens = self._chat.tokens(request.prompt, request.image)
        if len(tokens) + request.max_tokens > self._max_length:
            raise Rejected(
                TOO_LONG,
                f"{len(tokens)} tokens and {request.max_tokens} to write; it reads "
                f"{self._max_length}",
            )
        return _Question(request, tokens)

    def _answer(self, questions: Sequence[_Question]) -> list[Reply]:
        """Replies to a batch, or to its halves where memory runs out."""
        try:
            return self._generate(questions)
        except torch.OutOfMemoryError as error:
            detail = " ".join(str(error).split())[:300]
        # Outside of `except`: the traceback holds what is to be freed.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(questions) == 1:
            return [Reply("", fault=Rejected(TOO_LARGE, detail))]
        half = len(questions) // 2
        return self._answer(questions[:half]) + self._answer(questions[half:])

    @torch.inference_mode()
    def _generate(self, questions: Sequence[_Question]) -> list[Reply]:
        requests = [question.request for question in questions]
        inputs = self._chat.batch(
            [question.tokens for question in questions],
            [request.image for request in requests],
            side="left",
        )
        device = self._model.device
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        written = self._model.generate(
            **inputs,
            max_new_tokens=requests[0].max_tokens,
            logits_processor=[_Draws(questions, device)],
        )
        rows = written[:, inputs["input_ids"].shape[1] :].tolist()
        return [self._reply(q, row) for q, row in zip(questions, rows, strict=True)]

    def _reply(self, question: _Question, row: list[int]) -> Reply:
        end = next((place for place, token in enumerate(row) if token in self._ends), None)
        return Reply(
            text=self._chat.text(row[:end]),
            finished=end is not None,
            num_prompt_tokens=len(question.tokens),
            num_tokens=len(row) if end is None else end + 1,
        )


class _Draws(transformers.LogitsProcessor):
    """Adds its noise to the logits of each request with a temperature."""

    def __init__(self, questions: Iterable[_Question], device: torch.device):
        self._rows = [
            (row, question.request.temperature, _generator(question, device))
            for row, question in enumerate(questions)
            if question.request.temperature > 0
        ]

    def __call__(
        self, input_ids: Int[torch.Tensor, "B T"], scores: Float[torch.Tensor, "B V"]
    ) -> Float[torch.Tensor, "B V"]:
        del input_ids
        for row, temperature, generator in self._rows:
            noise = torch.empty_like(scores[row]).exponential_(generator=generator)
            scores[row] = scores[row] / temperature - noise.log()
        return scores


def _generator(question: _Question, device: torch.device) -> torch.Generator:
    """A generator that differs between pictures too, else all captions of a seed would be alike."""
    request = question.request
    digest = hashlib.blake2b(f"{request.seed} {question.tokens}".encode(), digest_size=8)
    if request.image is not None:
        digest.update(request.image.tobytes())
    seed = int.from_bytes(digest.digest(), "big") >> 1
    return torch.Generator(device).manual_seed(seed)


def _batches(questions: dict[int, _Question], batch_size: int) -> Iterator[list[int]]:
    """Indices of questions to be asked together."""

    def length(index):
        question = questions[index]
        return question.request.max_tokens, len(question.tokens)

    ordered = sorted(questions, key=length, reverse=True)  # what may not fit comes first
    for _, group in itertools.groupby(ordered, key=lambda index: length(index)[0]):
        indices = list(group)
        for start in range(0, len(indices), batch_size):
            yield indices[start : start + batch_size]


def _ends(model: transformers.PreTrainedModel, chat: qwen.Chat) -> list[int]:
    """The tokens that end an answer."""
    found = model.generation_config.eos_token_id
    found = found if isinstance(found, list) else [found]
    return sorted({chat.tokenizer.eos_token_id, *(id for id in found if id is not None)})
