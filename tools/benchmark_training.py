"""Training steps on this device: seconds, MFU, memory; and those of the same model in PyTorch.

    python tools/benchmark_training.py --config=configs/stage2.py --config.train.batch_size=2 \
        --config.model.remat=attention
    python tools/benchmark_training.py --config=configs/stage1.py --config.model.preset=tiny \
        --config.train.batch_size=2 --rounds=1 --steps=2

Random weights and features; loader, encoders and checkpoints take no part. Ours is the step of the
config, jitted for one device. The other is `diffusers.Lumina2Transformer2DModel` of the same sizes
on the same batch: parameters in float32, autocast to bfloat16, gradient checkpointing unless
--nocheckpointing, fused AdamW, blocks compiled by torch.compile unless --nocompile, and no average
of the weights, which ours keeps. The auxiliary loss is left out of both. Both take turns, each turn
in a process of its own, since two states of 2.6 billion parameters do not fit a GPU. Each turn
prints the median of --steps steps after three.

MFU counts the operations of the model, forward and backward and not those repeated, over what the
device can do in bfloat16 (lumina_jax/metrics.py). Needs the `dev` extra, unless --side=lumina_jax.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import config_flags

from lumina_jax import cli, metrics, sharding, train
from lumina_jax.data.records import num_tokens
from lumina_jax.models import next_dit
from lumina_jax.planning import programs
from lumina_jax.train_step import init_state

SIDES = ("lumina_jax", "torch")


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "A file in configs/.")
    flags.DEFINE_integer("rounds", 2, "Turns of each.", lower_bound=1)
    flags.DEFINE_integer("steps", 8, "Timed in each turn.", lower_bound=1)
    flags.DEFINE_multi_enum("side", list(SIDES), SIDES, "What is timed.")
    flags.DEFINE_bool("turn", False, "One turn, in this process; prints JSON.")
    flags.DEFINE_bool("compile", True, "torch.compile of its blocks.")
    flags.DEFINE_bool("checkpointing", True, "Gradient checkpointing in torch.")


def main() -> None:
    args = flags.FLAGS
    args.config.flow.auxiliary_weight = 0.0
    if args.turn:
        turn = {"lumina_jax": time_ours, "torch": time_torch}[args.side[-1]]
        print(json.dumps(turn(args)))
        return
    found: dict[str, list[dict]] = {side: [] for side in args.side}
    for index in range(args.rounds * len(args.side)):
        side = args.side[index % len(args.side)]
        command = [*sys.argv, "--turn", f"--side={side}"]
        output = subprocess.run(
            [sys.executable, *command], check=True, stdout=subprocess.PIPE, text=True
        ).stdout
        result = json.loads(output.splitlines()[-1])
        found[side].append(result)
        print(
            f"{side}: {result['seconds']:.4g} s a step, "
            f"{result['batch_size'] / result['seconds']:.3g} pictures/s, MFU "
            f"{result['mfu'] * 100:.1f} %, {result['memory'] / 2**30:.1f} GiB at most, "
            f"first step {result['first']:.1f} s, on {result['device']}",
            flush=True,
        )
    if len(found) == 2:
        pairs = zip(found["torch"], found["lumina_jax"], strict=True)
        ratios = [theirs["seconds"] / ours["seconds"] for theirs, ours in pairs]
        print(
            f"lumina_jax is {statistics.median(ratios):.2f} times as fast as torch "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )


def sizes(config) -> tuple[next_dit.NextDiTConfig, int, int]:
    """The model, and how many slots its sequences have for the picture and for text."""
    text_encoder, autoencoder = programs.encoders(config)
    model = train.model_config(config, text_encoder, autoencoder)
    slots = num_tokens(config.data.resolution, autoencoder.downscale * model.patch_size)
    return model, slots, text_encoder.max_tokens


def time_ours(args) -> dict:
    """The jitted step of `lumina_jax.train`, its state donated."""
    config = args.config
    mesh = sharding.make_mesh(replica=1, data=1, model=1, devices=jax.devices()[:1])
    model, slots, _ = sizes(config)
    lowered = programs.lower_train(config, mesh)
    program = train.step_program(config, model, mesh, slots)
    with jax.set_mesh(mesh):
        make = jax.jit(
            lambda key: init_state(next_dit.init_params(model, key), program.optimizer),
            out_shardings=program.shardings,
        )
        state = make(jax.random.key(0))
        batch = random_batch(lowered.lowered)
        key = jax.random.key(1)
        began = time.perf_counter()
        compiled = lowered.lowered.compile(compiler_options=dict(lowered.compiler_options))
        times = []
        for _ in range(3 + args.steps):
            state, found = compiled(state, batch, key)
            loss = float(found["loss"])
            times.append(time.perf_counter() - began)
            began = time.perf_counter()
    if not np.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}")
    stats = jax.devices()[0].memory_stats() or {}
    return describe(config, lowered.flops, times, stats.get("peak_bytes_in_use", 0))


def random_batch(lowered: jax.stages.Lowered):
    """What the step takes: captions and pictures without padding, in a square."""
    _, abstract, _ = lowered.args_info[0]
    rng = np.random.default_rng(0)

    def fill(path, info):
        name, shape = jax.tree_util.keystr(path), info.shape
        if info.dtype == bool:
            return jnp.ones(shape, bool)
        if info.dtype == jnp.int32:  # rows or columns
            side = round(shape[1] ** 0.5)
            place = np.arange(shape[1])
            return jnp.broadcast_to(place // side if "rows" in name else place % side, shape)
        return jnp.asarray(rng.normal(size=shape), info.dtype)

    return jax.tree_util.tree_map_with_path(fill, abstract)


def time_torch(args) -> dict:
    """The step of a usual training program around the model of diffusers."""
    import diffusers
    import torch

    config = args.config
    model, slots, text_slots = sizes(config)
    flops = train.step_flops(config, model, slots, text_slots)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        network = diffusers.Lumina2Transformer2DModel(
            sample_size=config.data.resolution // 8,
            in_channels=model.in_channels,
            hidden_size=model.dim,
            num_layers=model.num_layers,
            num_refiner_layers=model.num_refiner_layers,
            num_attention_heads=model.num_heads,
            num_kv_heads=model.num_kv_heads,
            axes_dim_rope=model.axes_dims,
            cap_feat_dim=model.cap_feat_dim,
        )
    network.train()
    if args.checkpointing:
        network.enable_gradient_checkpointing()
    if args.compile:
        for block in (*network.context_refiner, *network.noise_refiner, *network.layers):
            block.compile()
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=2e-4, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    batch, side = config.train.batch_size, round(slots**0.5) * model.patch_size
    rng = np.random.default_rng(0)

    def normal(*shape):
        return torch.tensor(rng.normal(size=shape), dtype=torch.float32, device=device)

    latents = normal(batch, model.in_channels, side, side)
    captions = normal(batch, text_slots, model.cap_feat_dim)
    mask = torch.ones(batch, text_slots, dtype=torch.bool, device=device)
    times, began = [], time.perf_counter()
    for _ in range(3 + args.steps):
        noise = torch.randn_like(latents)
        t = torch.sigmoid(torch.randn(batch, device=device))
        noised = t[:, None, None, None] * latents + (1 - t[:, None, None, None]) * noise
        with torch.autocast(device, torch.bfloat16):
            velocity = network(noised, t, captions, mask, return_dict=False)[0]
        loss = torch.mean((velocity.float() - (latents - noise)) ** 2)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = float(loss)  # waits for the device
        times.append(time.perf_counter() - began)
        began = time.perf_counter()
    if not np.isfinite(value):
        raise FloatingPointError(f"the loss is {value}")
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return describe(config, flops, times, memory)


def describe(config, flops: float, times: list[float], memory: int) -> dict:
    """Of a turn; the first three steps compile and warm up."""
    seconds = statistics.median(times[3:])
    device = jax.devices()[0]
    return {
        "seconds": seconds,
        "all_seconds": times[3:],
        "first": times[0],
        "mfu": flops / seconds / metrics.peak_flops(device),
        "memory": memory,
        "batch_size": config.train.batch_size,
        "flops": flops,
        "device": device.device_kind,
    }


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # for configs
    define_flags()
    cli.run(main, required=("config",))
