"""Draws the curves of a run, also while it is training.

    python tools/plot_run.py --workdir=runs/tiny

writes runs/tiny/loss_curve.png and runs/tiny/speed.png from runs/tiny/metrics.jsonl.
"""

from absl import flags
from etils import epath

from lumina_jax import cli, plots

_WORKDIR = flags.DEFINE_string("workdir", None, "The workdir of the run.")
_OUTPUT = flags.DEFINE_string("output", None, "The folder of the PNGs. Default: the workdir.")


def main() -> None:
    metrics = epath.Path(_WORKDIR.value) / "metrics.jsonl"
    output = epath.Path(_OUTPUT.value or _WORKDIR.value)
    for name, draw in (("loss_curve.png", plots.loss_curve), ("speed.png", plots.speed)):
        draw(metrics, output / name)
        print(output / name)


if __name__ == "__main__":
    cli.run(main, required=("workdir",))
