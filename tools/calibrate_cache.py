r"""Fits the polynomial by which a sampler skips layers to a model, and shows what thresholds cost.

    python tools/calibrate_cache.py --checkpoint=runs/tiny
    python tools/calibrate_cache.py --checkpoint=models/Lumina-Image-2.0 --output=calibration \
        --prompts_file=prompts.txt --num_steps=30

draws each prompt once with all layers in every evaluation, fits the change of their work to how far
the input of the first had moved, then draws again with each of --thresholds. Writes
cache_calibration.json and cache_calibration.png to --output, by default the run's workdir, where
the pipeline finds it (elsewhere: `--cache_calibration`). Then `--cache_threshold=0.2` of
lumina_jax.sample means that the layers run again when their work has changed by about a fifth.
"""

import numpy as np
from absl import flags
from etils import epath

from lumina_jax import checkpoint, cli, executables, plots
from lumina_jax.errors import InputError
from lumina_jax.progress import progress_bar
from lumina_jax.sampling import calibration, requests
from lumina_jax.sampling.pipeline import Pipeline

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of a run, or a diffusers pipeline.")
_WEIGHTS = flags.DEFINE_enum(
    "weights", None, checkpoint.WEIGHTS, "Averaged, by default, or raw ones."
)
_STEP = flags.DEFINE_integer("step", None, "Which checkpoint; the newest by default.")
_PROMPTS_FILE = flags.DEFINE_string(
    "prompts_file", None, "One prompt a line; the prompts of the run's previews by default."
)
_OUTPUT = flags.DEFINE_string("output", None, "Folder; the run's workdir by default.")
_SOLVER = flags.DEFINE_string("solver", None, "To calibrate for; the checkpoint's by default.")
_NUM_STEPS = flags.DEFINE_integer("num_steps", None, "Likewise.")
_TRUNCATION = flags.DEFINE_float("guidance_truncation", None, "Likewise.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the first prompt's noise.")
_DEGREE = flags.DEFINE_integer("degree", 4, "Of the polynomial.", lower_bound=1)
_THRESHOLDS = flags.DEFINE_list("thresholds", "0.05,0.1,0.2,0.3,0.5", "To be tried.")


def main() -> None:
    executables.use_cache("")
    path = _CHECKPOINT.value
    if _OUTPUT.value is None and not checkpoint.is_run(path):
        raise InputError(
            f"--checkpoint={path} is not the workdir of a run: name a folder, --output."
        )
    pipeline = Pipeline.open(path, step=_STEP.value, weights=_WEIGHTS.value)
    output = _OUTPUT.value or path
    prompts = read_prompts(path, _PROMPTS_FILE.value)
    settings = {
        "solver": _SOLVER.value,
        "num_steps": _NUM_STEPS.value,
        "guidance_truncation": _TRUNCATION.value,
    }
    found, trace = calibrate(
        pipeline, prompts, settings, degree=_DEGREE.value, seed=_SEED.value,
        thresholds=[float(value) for value in _THRESHOLDS.value],
    )  # fmt: skip
    found.save(output)
    figure = epath.Path(output) / "cache_calibration.png"
    plots.cache_calibration(figure, *calibration.pairs(trace), found.coefficients, found.thresholds)
    for row in found.thresholds:
        print(
            f"threshold {row['threshold']:g}: the layers run in {row['computed']:.0%} of the "
            f"evaluations, the picture is off by {row['error']:.4f} of 1"
        )
    print(f"The polynomial misses {found.error:.0%} of the changes. Written: {output}, {figure}")


def read_prompts(path: str, prompts_file: str | None) -> list[str]:
    """Those of a file, or of the previews of a run."""
    if prompts_file is not None:
        return [line["prompt"] for line in requests.read_prompts([], prompts_file)]
    if checkpoint.is_run(path):
        config = checkpoint.load_meta(checkpoint.find(path))["config"]
        prompts = list(config.get("preview", {}).get("prompts", ()))
    else:
        prompts = []
    if not prompts:
        raise InputError("No prompts to calibrate with: give --prompts_file, one prompt a line.")
    return prompts


def calibrate(pipeline, prompts, settings, *, degree, seed, thresholds):
    """The calibration of a model, and the trace that it was fitted to."""
    call = {**settings, "seed": seed, "output": "float", "trace": True}
    full, trace = pipeline(prompts, cache_threshold=1e-30, cache_interval=1, **call)
    coefficients, error = calibration.fit(*calibration.pairs(trace), degree=degree)
    rows = []
    with progress_bar("Thresholds", len(thresholds), unit="thresholds") as advance:
        for threshold in thresholds:
            images, its = pipeline(
                prompts, cache_threshold=threshold, cache_interval=1,
                cache_coefficients=tuple(coefficients), **call,
            )  # fmt: skip
            computed = np.concatenate([np.ravel(r.computed) for r in its if r is not None])
            rows.append(
                {
                    "threshold": threshold,
                    "computed": float(computed.mean()),
                    "error": float(np.sqrt(np.mean((images - full) ** 2))),
                }
            )
            advance(len(rows))
    config = pipeline.settings(**settings)
    found = calibration.Calibration(
        coefficients=[float(c) for c in coefficients],
        largest_distance=float(calibration.pairs(trace)[0].max()),
        error=error,
        fitted_to={
            "solver": config.solver,
            "num_steps": config.num_steps,
            "guidance_scale": config.guidance_scale,
            "guidance_truncation": config.guidance_truncation,
            "time_shift": config.time_shift,
            "num_prompts": len(prompts),
        },
        thresholds=rows,
    )
    return found, trace


if __name__ == "__main__":
    cli.run(main, required=("checkpoint",))
