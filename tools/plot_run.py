"""Draws the loss curve of a run, also while it is training.

    python tools/plot_run.py --workdir=runs/tiny

writes runs/tiny/loss_curve.png from runs/tiny/metrics.jsonl.
"""

from absl import flags
from etils import epath

from lumina_jax import cli, plots

_WORKDIR = flags.DEFINE_string("workdir", None, "The workdir of the run.")
_OUTPUT = flags.DEFINE_string("output", None, "The PNG. Default: loss_curve.png in the workdir.")


def main() -> None:
    workdir = epath.Path(_WORKDIR.value)
    output = _OUTPUT.value or workdir / "loss_curve.png"
    plots.loss_curve(workdir / "metrics.jsonl", output)
    print(output)


if __name__ == "__main__":
    cli.run(main, required=("workdir",))
