"""From how far the first layer's input moved to how much the layers' work changed: the fit.

TeaCache's polynomials were fitted to other models, fall below zero and rise again. Here it is one
with non-negative coefficients and without a constant: nothing moved, nothing changed, and the
further the more. It is found by non-negative least squares over evaluations that all ran the layers
(`caching.Record`), and kept beside the checkpoint that it was fitted to.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.optimize
from etils import epath
from jaxtyping import Float

from lumina_jax import files
from lumina_jax.errors import InputError
from lumina_jax.sampling.sampler import Trace
from lumina_jax.untrusted import is_finite, read_json

FILE_NAME = "cache_calibration.json"
_REMAKE = "Make it again: tools/calibrate_cache.py."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """What `tools/calibrate_cache.py` found.

    Attributes:
      coefficients: Of the polynomial, the highest power first.
      largest_distance: Of the evaluations it was fitted to; beyond it nothing is known.
      error: Root mean square of what it misses, over that of the changes.
      fitted_to: Checkpoint, settings and prompts.
      thresholds: Of each threshold tried: the share of layers run, and the error of the picture.
    """

    coefficients: Sequence[float]
    largest_distance: float
    error: float
    fitted_to: Mapping[str, Any]
    thresholds: Sequence[Mapping[str, float]] = ()

    def save(self, folder: epath.PathLike) -> None:
        text = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False)
        files.write(epath.Path(folder) / FILE_NAME, text)

    @classmethod
    def load(cls, path: epath.PathLike) -> "Calibration":
        """Of a file, or of the folder that holds it."""
        path = epath.Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        try:
            found = read_json(
                path, "So it is no calibration of a cache: make it again, tools/calibrate_cache.py."
            )
            if not all(map(is_finite, found["coefficients"])):
                raise ValueError("its coefficients are no numbers")
            return cls(**found)
        except FileNotFoundError:
            raise InputError(f"{path} does not exist. Make it: tools/calibrate_cache.py.") from None
        except InputError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} is no calibration of a cache ({error}). {_REMAKE}") from None


def pairs(trace: Trace) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Distances and changes of all evaluations but the first, before which there was nothing."""
    records = [record for record in trace if record is not None]
    if not all(np.asarray(record.computed).all() for record in records):
        raise ValueError("The trace has evaluations that were skipped: their changes are unknown.")
    return tuple(
        np.concatenate([np.asarray(getattr(record, name))[1:].ravel() for record in records])
        for name in ("distance", "change")
    )


def fit(
    distance: Float[np.ndarray, " n"], change: Float[np.ndarray, " n"], *, degree: int
) -> tuple[Float[np.ndarray, " P"], float]:
    """Coefficients, the highest power first and the constant 0, and the relative error."""
    if len(distance) < degree:
        raise InputError(
            f"{len(distance)} evaluations do not determine a polynomial of degree {degree}: "
            f"calibrate with more steps or prompts."
        )
    scale = distance.max()  # powers of small numbers would have columns of very different sizes
    powers = np.arange(1, degree + 1)
    found, _ = scipy.optimize.nnls((distance[:, None] / scale) ** powers, change)
    coefficients = np.append((found / scale**powers)[::-1], 0.0)
    missed = np.polyval(coefficients, distance) - change
    return coefficients, float(np.sqrt(np.mean(missed**2) / np.mean(change**2)))
