"""The machine code of Pallas kernels, which libtpu writes down when it is told to.

It does so for all instructions of a program or for none, and is slow at it: a training step would
take twice as long to compile. So each kernel of a compiled program is compiled once more, alone, in
a process that libtpu is told in.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp

from lumina_jax.planning import hlo
from lumina_jax.planning.chips import Topology

_DTYPES = {
    "pred": jnp.bool_, "s8": jnp.int8, "s16": jnp.int16, "s32": jnp.int32, "u8": jnp.uint8,
    "u16": jnp.uint16, "u32": jnp.uint32, "f16": jnp.float16, "bf16": jnp.bfloat16,
    "f32": jnp.float32, "f8e4m3fn": jnp.float8_e4m3fn, "f8e5m2": jnp.float8_e5m2,
}  # fmt: skip
_ANSWER = "answer.json"  # beside what is dumped


def machine_code(
    kernels: Iterable[hlo.Kernel], topology: Topology, compiler_options: Mapping[str, str]
) -> dict[str, str]:
    """Bundles, as bundles.parse reads them, by `Kernel.code`.

    Args:
      kernels: Of a program that was compiled for the topology.
      topology: Its chips.
      compiler_options: That the program was compiled with.
    """
    different = {kernel.code: kernel for kernel in kernels}
    if not different:
        return {}
    with tempfile.TemporaryDirectory(prefix="lumina_jax_kernels_") as folder:
        flags = (
            f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
            f"--xla_jf_dump_llo_pass_label_regex=^final_bundles$"
        )
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "LIBTPU_INIT_ARGS": f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}",
        }
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # what a cache answers dumps nothing
        request = {
            "folder": folder,
            "topology": str(topology),
            "compiler_options": dict(compiler_options),
            "kernels": [
                {"config": k.config, "operands": k.operands, "results": k.results}
                for k in different.values()
            ],
        }
        done = subprocess.run(
            [sys.executable, "-m", "lumina_jax.planning.kernels"],
            input=json.dumps(request), capture_output=True, text=True, check=False, env=environment,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"A kernel could not be compiled alone:\n{done.stderr[-4000:]}")
        texts = json.loads(pathlib.Path(folder, _ANSWER).read_text())
    return dict(zip(different, texts, strict=True))


def _main() -> None:
    request = json.loads(sys.stdin.read())
    folder = pathlib.Path(request["folder"])
    device = Topology.parse(request["topology"]).devices()[0]
    on_device = jax.sharding.SingleDeviceSharding(device)
    texts = []
    for kernel in request["kernels"]:
        call = jax.ffi.ffi_call(
            "tpu_custom_call",
            [_array(array) for array in kernel["results"]],
            custom_call_api_version=1,
            legacy_backend_config=kernel["config"],
        )
        operands = [_array(array, sharding=on_device) for array in kernel["operands"]]
        lowered = jax.jit(call).lower(*operands)
        compiled = lowered.compile(compiler_options=request["compiler_options"])
        (alone,) = hlo.analyze(compiled.as_text()).kernels
        texts.append(_dumped(folder, alone.name))
    (folder / _ANSWER).write_text(json.dumps(texts))


def _array(array: tuple[str, list[int]], **kinds) -> jax.ShapeDtypeStruct:
    dtype, shape = array
    return jax.ShapeDtypeStruct(shape, _DTYPES[dtype], **kinds)


def _dumped(folder: pathlib.Path, name: str) -> str:
    """What <time>-<instruction>-<pass>-final_bundles.txt says; the next one finds nothing old."""
    files = list(folder.iterdir())
    pattern = rf"\d+-{re.escape(name)}-\d+-final_bundles\.txt"
    (text,) = (file.read_text() for file in files if re.fullmatch(pattern, file.name))
    for file in files:
        file.unlink()
    return text


if __name__ == "__main__":
    _main()
