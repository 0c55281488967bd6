"""How long a run takes from its command to the end of its first step.

python tools/benchmark_start.py --config_file=configs/tiny.py --data=data/openmoji --rounds=3
python tools/benchmark_start.py --config_file=configs/tiny.py --data=data/openmoji --num_layers=26

Each start is a process of its own. `cold` has an empty cache; `cache` finds what JAX compiled, but
traces and lowers; `programs` finds the traces too. The three take turns.
"""

import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from absl import flags

from lumina_jax import cli
from lumina_jax.errors import InputError

MODES = ("cold", "cache", "programs")
# Without kept traces a program is jax.jit, which the compilation cache serves all the same.
_TRACED = """
import runpy, jax
from lumina_jax import executables
def prepare(program, args, static):
    import functools
    function = functools.partial(program._function, **static)
    function.__name__ = program._name
    return jax.jit(function, **program._jit)
executables.Program._prepare = prepare
runpy.run_module("lumina_jax.train", run_name="__main__", alter_sys=True)
"""


def define_flags() -> None:
    flags.DEFINE_string("config_file", "configs/tiny.py", "Of the run.")
    flags.DEFINE_string("data", "data/openmoji", "Its data set.")
    flags.DEFINE_integer("num_layers", None, "Of the model; the config's by default.")
    flags.DEFINE_integer("rounds", 3, "Starts of each kind.", lower_bound=1)


def start(arguments: list[str], cache: pathlib.Path, mode: str, kept: bool = False) -> float:
    """Seconds from the command until the log says that the first step is done.

    Args:
      arguments: Of the run.
      cache: Where it keeps what it compiles.
      mode: One of MODES.
      kept: Whether traces must be there already.
    """
    how = ["-m", "lumina_jax.train"] if mode == "programs" else ["-c", _TRACED]
    with tempfile.TemporaryDirectory() as workdir:
        command = [
            sys.executable, *how, *arguments, f"--workdir={workdir}",
            f"--config.compile.cache_directory={cache}",
            "--config.train.num_steps=2", "--config.preview.every=0",
        ]  # fmt: skip
        began = time.perf_counter()
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        lines, found = [], None
        for line in process.stderr:
            lines.append(line)
            if found is None and "The first step is done." in line:
                found = time.perf_counter() - began, line
        if process.wait() or found is None:
            raise InputError("The run ended: " + "".join(lines[-20:]))
    if kept and "; 0 read untraced" in found[1]:
        raise InputError("No trace was read: was lumina_jax changed meanwhile? Run it again.")
    print(f"{mode}: {found[0]:.1f} s; {found[1].split('done. ')[1].strip()}", flush=True)
    return found[0]


def main() -> None:
    args = flags.FLAGS
    arguments = [f"--config={args.config_file}", f"--config.data.directory={args.data}"]
    if args.num_layers is not None:
        arguments.append(f"--config.model.num_layers={args.num_layers}")
    seconds = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory() as folder:
        kept = pathlib.Path(folder)
        start(arguments, kept / "programs", "programs")  # fills it, and warms the machine
        for index in range(args.rounds):
            cold = kept / f"cold{index}"
            seconds["cold"].append(start(arguments, cold, "cold"))
            seconds["cache"].append(start(arguments, cold, "cache"))
            seconds["programs"].append(start(arguments, kept / "programs", "programs", kept=True))
    for mode, values in seconds.items():
        median = statistics.median(values)
        print(
            json.dumps(
                {"start": mode, "median": round(median, 1), "all": [round(v, 1) for v in values]}
            )
        )


if __name__ == "__main__":
    define_flags()
    cli.run(main)
