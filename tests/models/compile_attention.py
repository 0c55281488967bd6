"""Compiles attention for TPUs and prints what came out, as JSON; run by test_attention.py."""

import json
import os
import pathlib
import re
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import jax
import jax.numpy as jnp

from lumina_jax import sharding
from lumina_jax.models import attention as door
from lumina_jax.models import rope
from lumina_jax.models.layers import RMSNorm
from lumina_jax.planning.chips import Topology


def program(topology: str, name: str, model: int) -> dict:
    devices = Topology.parse(topology).devices()
    mesh = sharding.make_mesh(replica=1, data=-1, model=model, devices=devices)
    heads = sharding.named(mesh, ("act_batch", "act_heads"))
    tokens = sharding.named(mesh, ("act_batch",))

    def array(*sizes, dtype=jnp.float32, place=tokens):
        return jax.ShapeDtypeStruct((16, *sizes), dtype, sharding=place)

    qkv = [array(n, 640, 96, dtype=jnp.bfloat16, place=heads) for n in (24, 8, 8)]
    place = (array(640, 96), array(640, 96))
    norms = RMSNorm(96, eps=1e-5), RMSNorm(96, eps=1e-5)
    found = {}

    def loss(q, k, v, ids, cos, sin):
        found["auto"] = door.choose("auto", q.dtype, 96)
        if name == "flash":
            out = door.flash_attention(q, k, v, ids, *norms, rope.Freqs(cos, sin))
        else:
            out = door.attention(q, k, v, ids, name)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(
            *qkv, array(640, dtype=jnp.int32), *place
        )
    text = lowered.compile().as_text()
    return found | {
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "named": f"{name}_" in text,
        "scores": bool(re.search(r"\[(\d+,)*640,640\]", text)),
    }


if __name__ == "__main__":
    print(
        json.dumps(
            {
                f"{topology} {name} {model}": program(topology, name, model)
                for topology in ("v5e:2x4", "v6e:2x4", "v5p:2x2x2")
                for name in ("flash", "splash")
                for model in (1, 2)
            }
        )
    )
