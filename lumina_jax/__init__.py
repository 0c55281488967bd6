"""Lumina-Image 2.0 in JAX: training and sampling.

import lumina_jax
pipeline = lumina_jax.Pipeline.from_checkpoint("runs/tiny")
pipeline(["dog face"])[0].show()
"""

from typing import TYPE_CHECKING

from lumina_jax.version import __version__

if TYPE_CHECKING:
    from lumina_jax.sampling.pipeline import Pipeline

__all__ = ["Pipeline", "__version__"]


def __getattr__(name: str):
    # On demand: `import lumina_jax` must not wait for jax.
    if name == "Pipeline":
        from lumina_jax.sampling.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module 'lumina_jax' has no attribute {name!r}")
