"""Plans the three stages on several TPU topologies; writes their tables and plot.

    python tools/plan_table.py --processes=2

Each plan is a child process (tools/plan.py) and a file in --plans; what is there is not computed
again, so the command can be stopped and repeated. Delete a file to renew it. A stage whose program
is the same as another's, as stage 3's is stage 2's, is not compiled twice. A full model takes up to
half an hour of one core and several GB of memory each.
"""

import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys

from absl import flags

from lumina_jax import cli
from lumina_jax.errors import InputError
from lumina_jax.planning import table
from lumina_jax.planning.chips import Topology

ROOT = pathlib.Path(__file__).parents[1]

_PLANS = flags.DEFINE_string("plans", "docs/plans", "Where the JSON of each plan is kept.")
_PAGE = flags.DEFINE_string("page", "docs/performance.md", "Where the table goes, between marks.")
_COSTS_PAGE = flags.DEFINE_string("costs_page", "docs/launch.md", "Where the costs go, likewise.")
_PLOT = flags.DEFINE_string("plot", "docs/plans.png", "Where the picture goes.")
_CONFIGS = flags.DEFINE_list("configs", "stage1,stage2,stage3", "Names of files in configs/.")
_TOPOLOGIES = flags.DEFINE_list(
    "topologies", "v5e:16x16,2*v5e:16x16,v5p:4x4x4,v6e:8x8,v6e:16x16", "As tools/plan.py has them."
)
_PROCESSES = flags.DEFINE_integer("processes", 1, "How many plans at once.", lower_bound=1)
_CHANGES = flags.DEFINE_multi_string(
    "change", [], "key=value of the config, for all plans: such as model.num_layers=2."
)

# Parameters are split 32 ways: their rows fill whole tiles then, and a part of the state is small
# (docs/planning.md). What chips are left hold copies.
DATA_AXIS = 32
# At eight pictures of 1024 px a chip: four at a time, or there is room for all products.
_HALVES, _ROOM = ("train.num_microbatches=2",), ("model.remat=dots",)
CHANGES = {
    ("stage2", "v6e:8x8"): _HALVES,
    ("stage3", "v6e:8x8"): _HALVES,
    ("stage2", "v5p:4x4x4"): _ROOM,
    ("stage3", "v5p:4x4x4"): _ROOM,
}


def main() -> None:
    topologies = [Topology.parse(text) for text in _TOPOLOGIES.value]
    # One config after another, so that what is equal has been compiled.
    with concurrent.futures.ThreadPoolExecutor(_PROCESSES.value) as pool:
        for config in _CONFIGS.value:
            done = [pool.submit(plan, config, topology) for topology in topologies]
            for future in concurrent.futures.as_completed(done):
                print(future.result(), flush=True)
    plans = [
        json.loads(file_of(config, topology).read_text())
        for config in _CONFIGS.value
        for topology in topologies
    ]
    table.plot(plans, _PLOT.value)
    picture = os.path.relpath(_PLOT.value, pathlib.Path(_PAGE.value).parent)
    image = f"![Estimated seconds of a step, by kind of work]({picture})"
    table.insert(_PAGE.value, f"{table.markdown(plans)}\n\n{image}")
    table.insert(_COSTS_PAGE.value, table.costs(plans))
    print(
        f"The table is in {_PAGE.value}, the plot in {_PLOT.value}, the costs in "
        f"{_COSTS_PAGE.value}."
    )


def file_of(config: str, topology: Topology) -> pathlib.Path:
    name = f"{config}-{topology}".replace("*", "x").replace(":", "-")
    return pathlib.Path(_PLANS.value) / f"{name}.json"


def plan(config: str, topology: Topology) -> str:
    """Makes one plan where there is none, and says what came of it."""
    path, label = file_of(config, topology), f"{config} on {topology}"
    if path.exists():
        return f"{label}: is in {path}"
    data = min(DATA_AXIS, topology.chips_per_slice)
    changes = [
        f"mesh.data={data}",
        f"mesh.replica={topology.num_chips // data}",
        *CHANGES.get((config, str(topology)), ()),
        *_CHANGES.value,
    ]
    done = subprocess.run(
        [
            sys.executable, ROOT / "tools/plan.py", f"--config={ROOT}/configs/{config}.py",
            f"--topology={topology}", f"--json={path}", f"--reuse={_PLANS.value}",
            *(f"--config.{change}" for change in changes),
        ],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    if not path.exists():
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise InputError(f"{label}: {last[0]}")
    return f"{label}: {'fits' if done.returncode == 0 else done.stdout.strip().splitlines()[-1]}"


if __name__ == "__main__":
    cli.run(main)
