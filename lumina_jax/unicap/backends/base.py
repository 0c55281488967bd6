"""What every model that writes captions looks like: it is asked, and it replies."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from PIL import Image

from lumina_jax.data.images import Rejected


@dataclasses.dataclass(frozen=True)
class Request:
    """One question to a model.

    Args:
        prompt: what is asked.
        image: what it is about, upright and RGB; None asks about text alone.
        max_tokens: of the reply.
        temperature: 0 takes the likeliest token each time.
        seed: of what is drawn where the temperature is above 0.
    """

    prompt: str
    image: Image.Image | None = None
    max_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0


class Reply(NamedTuple):
    """What a model answers.

    Attributes:
        text: as it was written, without the marks of its end.
        finished: whether it ended by itself, not at `max_tokens`.
        num_prompt_tokens: read, those of the picture among them.
        num_tokens: written.
        fault: why there is no answer to this request, whatever is tried again; text is "" then.
    """

    text: str
    finished: bool = True
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    fault: Rejected | None = None


@runtime_checkable
class Backend(Protocol):
    """A model to ask.

    A fault of one request is in its reply. A fault of all (no server, no memory, a broken
    checkpoint) is raised: InputError where the user has to mend something, RestartError where the
    same command may be given again.

    Attributes:
        model: its name, to be stored with each caption.
        num_pictures: how many pictures are best worked on at the same time.
        in_threads: whether `ask` may be called by many threads at once, each with what it needs
            next. Else one thread calls it, with the requests of all pictures together.
    """

    model: str
    num_pictures: int
    in_threads: bool

    def ask(self, requests: Sequence[Request]) -> list[Reply]:
        """Returns a reply to each request, in their order."""
        ...
