"""Two models as one: the first sees pictures, the second works on text alone, as in the paper."""

from collections.abc import Sequence

from lumina_jax.unicap.backends.base import Backend, Reply, Request


class Pair:
    """Sends each request to the model that it is for.

    Args:
        look: sees pictures.
        write: condenses and translates.
    """

    def __init__(self, look: Backend, write: Backend):
        self._look, self._write = look, write
        self.model = look.model
        self.num_pictures = max(look.num_pictures, write.num_pictures)
        self.in_threads = look.in_threads and write.in_threads

    def ask(self, requests: Sequence[Request]) -> list[Reply]:
        replies: list[Reply | None] = [None] * len(requests)
        for backend, with_image in ((self._look, True), (self._write, False)):
            mine = [i for i, r in enumerate(requests) if (r.image is not None) == with_image]
            for i, reply in zip(mine, backend.ask([requests[i] for i in mine]), strict=True):
                replies[i] = reply
        return replies
