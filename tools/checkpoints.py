"""Looks at the checkpoints of a run, checks them, and sets one aside.

    python tools/checkpoints.py list --workdir=runs/tiny
    python tools/checkpoints.py verify --workdir=runs/tiny
    python tools/checkpoints.py set_aside --workdir=runs/tiny --step=1200

list       step, size on disk, validation loss and what the checkpoint holds
verify     reads every array and compares it with its checksum; all steps, or one
set_aside  moves one to <workdir>/damaged; the run then goes on from the newest that stays

Averaged weights alone, as a workdir of their own to draw with or to begin from:

    python tools/convert_checkpoint.py --input=runs/tiny --format=lumina_jax --output=runs/ema
"""

from absl import flags
from etils import epath
from rich.console import Console
from rich.table import Table

from lumina_jax import checkpoint, cli, lease
from lumina_jax.errors import DamagedError, InputError

_WORKDIR = flags.DEFINE_string("workdir", None, "Of the run.")
_STEP = flags.DEFINE_integer("step", None, "Which checkpoint.")


def show() -> None:
    """Prints a table of all checkpoints."""
    table = Table("step", "GB", "validation loss", "holds", "checksums", box=None)
    for step in _steps():
        directory = checkpoint.find(_WORKDIR.value, step)
        loss = checkpoint.validation_loss(directory)
        try:
            parts = ", ".join(checkpoint.parts(directory))
            has_digest = "yes" if checkpoint.load_digest(directory) else "no"
        except (InputError, OSError, ValueError) as error:
            parts, has_digest = f"damaged: {error}", ""
        size = f"{checkpoint.num_bytes(directory) / 1e9:.4g}"
        table.add_row(str(step), size, "" if loss is None else f"{loss:.5g}", parts, has_digest)
    Console(soft_wrap=True).print(table)


def verify() -> int:
    """Reads what --step names, or everything; the status is 2 if anything is damaged."""
    num_damaged = 0
    for step in _steps():
        directory = checkpoint.find(_WORKDIR.value, step)
        try:
            checkpoint.verify(directory)
            known = "as it was saved"
            if checkpoint.load_digest(directory) is None:
                known = "readable; it has no checksums, being from before there were any"
            print(f"step {step}: {known}")
        except DamagedError as error:
            num_damaged += 1
            print(f"step {step}: {error}")
    return InputError.status if num_damaged else 0


def set_aside() -> None:
    """Moves a checkpoint out of the way."""
    if _STEP.value is None:
        raise InputError("Which one is to be set aside? Give --step; `list` shows them.")
    holder = lease.holder(_WORKDIR.value)
    if holder is not None and holder.fate() is not False:
        raise InputError(
            f"Process {holder.pid} on {holder.host} runs in {_WORKDIR.value}, by {lease.FILE}. "
            f"Stop it first; if it is dead, remove that file."
        )
    steps = checkpoint.find_steps(_WORKDIR.value)
    target = checkpoint.set_aside(_WORKDIR.value, _STEP.value)
    rest = [step for step in steps if step != _STEP.value]
    goes_on = f"from step {rest[-1]}" if rest else "from the beginning"
    print(f"Moved to {target}. The run goes on {goes_on}.")


def _steps() -> list[int]:
    steps = checkpoint.find_steps(_WORKDIR.value)
    if _STEP.value is None:
        return steps
    checkpoint.find(_WORKDIR.value, _STEP.value)  # says which there are
    return [_STEP.value]


def main(command: str) -> int | None:
    if not epath.Path(_WORKDIR.value).is_dir():
        raise InputError(f"There is no directory {_WORKDIR.value}.")
    return {"list": show, "verify": verify, "set_aside": set_aside}[command]()


if __name__ == "__main__":
    cli.run(main, required=("workdir",), commands=("list", "verify", "set_aside"))
