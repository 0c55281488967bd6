"""Compiles small programs for v5e slices of 2 x 4, without a TPU; writes text and peak of memory.

    python tests/planning/compile_programs.py folder

A process of its own, because libtpu reads its environment once.
"""

import functools
import os
import pathlib
import sys

if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1])
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE="v5litepod-8",
        TPU_WORKER_HOSTNAMES="localhost",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        JAX_PLATFORMS="cpu",
    )

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lumina_jax.planning.report import peak_memory

DEVICES = 8
LAYERS = 7
# Large enough that a gather of weights is not turned into a loop of permutes.
GATHER_WHOLE = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


class Programs:
    """Each method gives a function and the shapes of what one of its devices gets."""

    def __init__(self, mesh: Mesh):
        self.mesh = mesh

    def array(self, shape, dtype=jnp.bfloat16, *axes) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, P(*axes)))

    def matmul(self):
        """256 x 1024 by 1024 x 512."""
        x = self.array((DEVICES * 256, 1024), jnp.bfloat16, "data")
        return jnp.matmul, (x, self.array((1024, 512)))

    def rematerialised(self):
        """7 layers of 256 x 512 by 512 x 512, all of it computed again for the gradient."""

        def loss(weights, x):
            block = jax.checkpoint(lambda x, w: jnp.sin(x @ w), prevent_cse=False)
            y, _ = jax.lax.scan(lambda x, w: (block(x, w), None), x, weights)
            return jnp.mean(y.astype(jnp.float32) ** 2)

        x = self.array((DEVICES * 256, 512), jnp.bfloat16, "data")
        return jax.grad(loss), (self.array((LAYERS, 512, 512)), x)

    def fsdp(self):
        """7 layers of 1024 x 2048 by 2048 x 2048, whose weights are split by rows."""
        split = NamedSharding(self.mesh, P(None, "data"))
        rows = NamedSharding(self.mesh, P("data"))

        def loss(weights, x):
            def block(x, w):
                return jax.lax.with_sharding_constraint(jnp.sin(x @ w), rows)

            y, _ = jax.lax.scan(lambda x, w: (block(x, w), None), x, weights)
            return jnp.mean(y.astype(jnp.float32) ** 2)

        def step(weights, x):
            return jax.lax.with_sharding_constraint(jax.grad(loss)(weights, x), split)

        weights = self.array((LAYERS, 2048, 2048), jnp.bfloat16, None, "data")
        return step, (weights, self.array((DEVICES * 1024, 2048), jnp.bfloat16, "data"))

    def kept(self, offload=()):
        """12 layers, each of which keeps what came in, 8192 x 512 or 8 MiB, and nothing else."""
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=(),
            names_which_can_be_offloaded=offload,
            offload_src="device",
            offload_dst="pinned_host",
        )

        def loss(weights, x):
            def block(x, w):
                return jnp.sin(checkpoint_name(x, "input") @ w), None

            block = jax.checkpoint(block, policy=policy, prevent_cse=False)
            y, _ = jax.lax.scan(block, x, weights)
            return jnp.mean(y.astype(jnp.float32) ** 2)

        x = self.array((DEVICES * 8192, 512), jnp.bfloat16, "data")
        return jax.grad(loss), (self.array((12, 512, 512)), x)

    def slices(self):
        """3 layers of 512 x 1024 by 1024 x 1024 on two slices, each with all of the weights."""
        split = NamedSharding(self.mesh, P(None, "data"))

        def loss(weights, x):
            y, _ = jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, weights)
            return jnp.mean(y.astype(jnp.float32) ** 2)

        def step(weights, x):
            return jax.lax.with_sharding_constraint(jax.grad(loss)(weights, x), split)

        weights = self.array((3, 1024, 1024), jnp.bfloat16, None, "data")
        axes = ("replica", "data")
        return step, (weights, self.array((2 * DEVICES * 512, 1024), jnp.bfloat16, axes))

    def splash(self):
        """3 layers of attention over 512 tokens, 4 heads on 2, computed again for the gradient."""
        sizes = splash_attention_kernel.BlockSizes(
            block_q=256,
            block_kv=256,
            block_kv_compute=256,
            block_q_dkv=256,
            block_kv_dkv=256,
            block_kv_dkv_compute=256,
            use_fused_bwd_kernel=True,
        )
        kernel = splash_attention_kernel.make_splash_mha(
            splash_attention_mask.MultiHeadMask([splash_attention_mask.FullMask((512, 512))] * 4),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
        )
        spec = P("data")

        @functools.partial(
            jax.shard_map, mesh=self.mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False
        )
        def attention(q, k, v):
            return jax.vmap(kernel)(q, k, v)

        def loss(q, k, v):
            block = jax.checkpoint(lambda x: attention(x, k, v), prevent_cse=False)
            y, _ = jax.lax.scan(lambda x, _: (block(x), None), q, None, length=3)
            return jnp.sum(y.astype(jnp.float32))

        q = self.array((DEVICES, 4, 512, 128), jnp.bfloat16, "data")
        k = self.array((DEVICES, 2, 512, 128), jnp.bfloat16, "data")
        return jax.grad(loss), (q, k, k)

    def kernels(self):
        """One kernel over a grid of 16, and one with rare regions and a loop of its own."""

        def double_exp(x, out):
            out[...] = jnp.exp(x[...]) * 2

        def row_sum(x, out, total):
            column = pl.program_id(1)

            @pl.when(column == 0)
            def _():
                total[...] = jnp.zeros_like(total)

            @pl.loop(0, 11)
            def _(i):
                total[...] += jnp.exp(x[...] * i.astype(jnp.float32))

            @pl.when(column == 3)
            def _():
                out[...] = total[...]

        def run(x):
            block = pl.BlockSpec((256, 512), lambda i, j: (i, j))
            x = pl.pallas_call(
                double_exp,
                grid=(4, 4),
                in_specs=[block],
                out_specs=block,
                out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
                name="double_exp",
            )(x)
            return pl.pallas_call(
                row_sum,
                grid=(4, 4),
                in_specs=[block],
                out_specs=pl.BlockSpec((256, 512), lambda i, j: (i, 0)),
                out_shape=jax.ShapeDtypeStruct((1024, 512), x.dtype),
                scratch_shapes=[pltpu.VMEM((256, 512), jnp.float32)],
                name="row_sum",
            )(x)

        spec = P("data")
        mapped = jax.shard_map(run, mesh=self.mesh, in_specs=spec, out_specs=spec, check_vma=False)
        return mapped, (self.array((DEVICES * 1024, 2048), jnp.float32, "data"),)


def main(folder: pathlib.Path) -> None:
    def devices(**options):
        return topologies.get_topology_desc("v5e:2x4", platform="tpu", **options).devices

    programs = Programs(Mesh(np.array(devices()), ("data",)))
    two = np.array(devices(num_slices=2)).reshape(2, DEVICES)
    for name, method, options in (
        ("matmul", programs.matmul, None),
        ("rematerialised", programs.rematerialised, None),
        ("windowed", programs.fsdp, None),
        ("fsdp", programs.fsdp, GATHER_WHOLE),
        ("kept", programs.kept, None),
        ("offloaded", functools.partial(programs.kept, offload=["input"]), None),
        ("slices", Programs(Mesh(two, ("replica", "data"))).slices, GATHER_WHOLE),
        ("splash", programs.splash, None),
        ("kernels", programs.kernels, None),
    ):
        function, arguments = method()
        compiled = jax.jit(function).lower(*arguments).compile(compiler_options=options)
        (folder / f"{name}.hlo").write_text(compiled.as_text())
        (folder / f"{name}.peak").write_text(str(peak_memory(compiled.memory_analysis())))


if __name__ == "__main__":
    main(folder)
