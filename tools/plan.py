"""Says of a run, without any accelerator, whether it fits and how fast it can be.

    python tools/plan.py --config=configs/stage2.py --topology=v5e:16x16
    python tools/plan.py --config=configs/stage2.py --topology=v5e:2x2 --what=sample --batch_size=4
    python tools/plan.py --config=configs/stage1.py --topology=v6e:16x16 \
        --sweep=model.remat=names,dots,attention --sweep=mesh.replica=4,8

It lowers and compiles the real program for the TPUs named, here, on a processor, and reads what the
compiler made of it; docs/planning.md explains every number. Needs the extra [tpu] (libtpu).

Exit status: 0 it fits, 3 it does not, 4 an --assert failed, 2 the input was wrong.
"""

import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

from absl import flags, logging
from ml_collections import config_flags

# The code of Pallas kernels is counted where libtpu dumps it. It reads its arguments when it is
# loaded, which the imports below do not do yet.
_DUMP = tempfile.TemporaryDirectory(prefix="lumina_jax_plan_")
os.environ["JAX_PLATFORMS"] = "cpu"

from lumina_jax import cli, sharding  # noqa: E402  (jax reads the variable above)
from lumina_jax.errors import InputError  # noqa: E402
from lumina_jax.planning import bundles, programs, report  # noqa: E402
from lumina_jax.planning.chips import Topology  # noqa: E402

os.environ["LIBTPU_INIT_ARGS"] = (
    f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {bundles.dump_flags(_DUMP.name)}"
)

config_flags.DEFINE_config_file("config", None, "A file in configs/.", lock_config=True)
_TOPOLOGY = flags.DEFINE_string("topology", None, "Such as v5e:16x16, or 2*v5e:16x16: two slices.")
_WHAT = flags.DEFINE_enum("what", "train", ["train", "sample", "encode"], "Which program.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 4, "Of --what=sample: pictures at once.")
_TEXT_SLOTS = flags.DEFINE_integer("text_slots", None, "Of a caption; by default the most.")
_SWEEP = flags.DEFINE_multi_string(
    "sweep", [], "key=value,value,...: plan every combination of these changes and rank them."
)
_ASSERT = flags.DEFINE_multi_string(
    "assert", [], "A condition on the numbers of --json, such as mfu>=0.58."
)
_JSON = flags.DEFINE_string("json", None, "Write all numbers to this file as well.")
_HOTTEST = flags.DEFINE_integer("hottest", 0, "Show so many of the longest instructions.")
_PRICE = flags.DEFINE_float("price", None, "Of a chip-hour, to say what the run costs.")

DOES_NOT_FIT, ASSERTION_FAILED = 3, 4


def main() -> int:
    topology = Topology.parse(_TOPOLOGY.value)
    if _SWEEP.value:
        return sweep()
    config = flags.FLAGS.config
    mesh = sharding.make_mesh(**config.mesh, devices=topology.devices())
    print(
        f"{config_name()} on {topology}: {topology.num_chips} chips, mesh "
        + " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    )
    results = {}
    for lowered in lower(config, mesh):
        logging.info("Compiling %s ...", lowered.name)
        try:
            numbers = report.compile_and_report(lowered, topology, _DUMP.name)
        except report.DoesNotFitError as error:
            print(f"{lowered.name}: does not fit: {error}.")
            return DOES_NOT_FIT
        results[lowered.name] = numbers
        print(describe(lowered.name, numbers, config, topology))
    if _JSON.value:
        found = {"config": config_name(), "topology": str(topology), "mesh": dict(mesh.shape)}
        pathlib.Path(_JSON.value).write_text(json.dumps(found | {"programs": results}, indent=1))
    return check(results)


def lower(config, mesh) -> list[programs.Lowered]:
    if _WHAT.value == "train":
        return [programs.lower_train(config, mesh, _TEXT_SLOTS.value)]
    if _WHAT.value == "sample":
        return [programs.lower_sample(config, mesh, _BATCH_SIZE.value, _TEXT_SLOTS.value)]
    return programs.lower_encode(config, mesh)


def config_name() -> str:
    for argument in sys.argv:
        if match := re.match(r"--?config=(.*)", argument):
            return pathlib.Path(match[1]).stem
    return "config"


def describe(name: str, numbers: dict[str, float], config, topology: Topology) -> str:
    """All of it, for a person."""
    n = numbers
    memory = ", ".join(
        f"{key.removesuffix('_gib').replace('_', ' ')} {n[key]:.2f}"
        for key in n
        if key.endswith("_gib") and key not in ("peak_gib", "host_memory_gib") and n[key] >= 0.005
    )
    traffic = "; ".join(
        f"{network.upper()} {n[f'{network}_gb']:.2f} GB ("
        + ", ".join(
            f"{key.removeprefix(network + '_').removesuffix('_gb').replace('_', '-')} {n[key]:.2f}"
            for key in n
            if re.match(rf"{network}_(all|reduce|coll)", key) and n[key] >= 0.005
        )
        + f"), {n[f'{network}_seconds']:.3f} s at link speed, "
        f"{n[f'{network}_sync_gb']:.2f} GB of it waited for"
        for network in ("ici", "dcn")
        if n[f"{network}_gb"]
    )
    kinds = ", ".join(
        f"{kind} {n[f'{kind}_seconds']:.3f}"
        for kind in ("dots", "reduces", "elementwise", "slices", "copies", "kernels", "waiting")
        if n.get(f"{kind}_seconds", 0) >= 0.0005
    )
    lines = [
        f"{name}, on each chip:",
        f"  memory     {n['peak_gib']:.2f} GiB at most: {memory}",
        f"  operations {n['compiled_tflop']:.1f} TFLOP compiled, "
        f"{n['kernels_tflop']:.1f} of them in kernels; {n['asked_tflop']:.1f} asked for: ratio {n['flops_ratio']:.3f}",
        f"  traffic    {traffic or 'none'}; {n['gather_asynchronous']:.0%} of gathered bytes hidden",
        f"  estimate   {n['step_seconds']:.3f} s, MFU {n['mfu']:.1%}: {kinds}",
        f"  roofline   {n['roofline_seconds']:.3f} s, MFU {n['roofline_mfu']:.1%}",
        f"  speed      {n['images_per_second']:.1f} images/s by the estimate",
        f"  compiled   in {n['compile_seconds']:.0f} s ({n['compile_cpu_seconds']:.0f} s of CPU), "
        f"{n['host_memory_gib']:.1f} GiB of this machine",
    ]
    if name == "train":
        hours = n["step_seconds"] * config.train.num_steps / 3600
        cost = (
            f", {hours * topology.num_chips * _PRICE.value:,.0f} at that price"
            if _PRICE.value
            else ""
        )
        lines.append(
            f"  the stage  {config.train.num_steps:,} steps: {hours / 24:.1f} days, "
            f"{hours * topology.num_chips:,.0f} chip-hours{cost}"
        )
    return "\n".join(lines)


def check(results: dict[str, dict[str, float]]) -> int:
    status = 0
    for condition in _ASSERT.value:
        match = re.fullmatch(r"(\w+)(<=|>=)([-+.e\d]+)", condition.replace(" ", ""))
        for name, numbers in results.items():
            if match is None or match[1] not in numbers:
                raise InputError(
                    f"--assert={condition!r} is not NAME<=NUMBER or NAME>=NUMBER with a name of: "
                    f"{', '.join(sorted(numbers))}."
                )
            value, bound = numbers[match[1]], float(match[3])
            if not (value <= bound if match[2] == "<=" else value >= bound):
                print(f"{name}: {condition} does not hold: it is {value:.6g}.", file=sys.stderr)
                status = ASSERTION_FAILED
    return status


def sweep() -> int:
    """Plans each combination in a process of its own, and ranks what fits by the estimate."""
    axes = []
    for text in _SWEEP.value:
        key, _, values = text.partition("=")
        if not values:
            raise InputError(
                f"--sweep={text!r} is not key=value,value,... with keys of the config."
            )
        axes.append([(key, value) for value in values.split(",")])
    given = [a for a in sys.argv[1:] if not re.match(r"--?(sweep|json|assert|hottest)=", a)]
    rows = []
    for combination in itertools.product(*axes):
        label = " ".join(f"{key}={value}" for key, value in combination)
        changes = [f"--config.{key}={value}" for key, value in combination]
        with tempfile.TemporaryDirectory() as folder:
            out = pathlib.Path(folder) / "plan.json"
            done = subprocess.run(
                [sys.executable, __file__, *given, *changes, f"--json={out}"],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode == 0:
                (numbers,) = json.loads(out.read_text())["programs"].values()
                rows.append((numbers["step_seconds"], label, numbers))
                print(f"{label}: {numbers['step_seconds']:.3f} s", flush=True)
            elif done.returncode == DOES_NOT_FIT:
                print(f"{label}: {done.stdout.strip().splitlines()[-1]}", flush=True)
            else:
                raise InputError(f"{label}: {done.stderr.strip().splitlines()[-1]}")
    print(f"\n{'step':>8} {'MFU':>6} {'peak GiB':>9} {'ratio':>6} {'ICI GB':>7}  change")
    for seconds, label, n in sorted(rows, key=lambda row: row[0]):
        print(
            f"{seconds:8.3f} {n['mfu']:6.1%} {n['peak_gib']:9.2f} {n['flops_ratio']:6.3f} "
            f"{n['ici_gb']:7.2f}  {label}"
        )
    return 0 if rows else DOES_NOT_FIT


if __name__ == "__main__":
    # Configs import each other from the root of the checkout.
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    cli.run(main, required=("config", "topology"))
