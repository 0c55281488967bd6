"""Real photographs without a download: those inside packages of the `dev` extra."""

import importlib.util
import pathlib
from collections.abc import Iterator

from lumina_jax.errors import InputError

_FILES = {
    "skimage": (
        "data/astronaut.png",
        "data/chelsea.png",
        "data/coffee.png",
        "data/hubble_deep_field.jpg",
        "data/ihc.png",
        "data/motorcycle_left.png",
        "data/retina.jpg",
        "data/rocket.jpg",
    ),
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
    "matplotlib": ("mpl-data/sample_data/grace_hopper.jpg",),
}


def photographs() -> Iterator[tuple[str, bytes]]:
    """Yields the name and the file of each."""
    for package, paths in _FILES.items():
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise InputError(
                f"The photographs of the package {package!r} are needed, which is not installed. "
                "Install it: pip install 'lumina-jax[dev]'"
            )
        for path in map(pathlib.Path(spec.origin).parent.joinpath, paths):
            yield path.name, path.read_bytes()
