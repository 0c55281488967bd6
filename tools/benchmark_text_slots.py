"""Pictures a second in training with 256, 128 and 64 text slots, on this machine.

    python tools/benchmark_text_slots.py --text_slots=256,128,64 --rounds=5

A model of the released architecture with fewer and narrower layers takes train steps on random
batches of 256 image tokens (256 px); the numbers of slots take turns, so that whatever else the
machine does meets all alike. What a data set gains follows from the share of its batches that has
each number: `tools/show_data.py --tokens` says it.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from lumina_jax import cli, flow
from lumina_jax.models import embed, next_dit
from lumina_jax.train_step import init_state, make_train_step
from lumina_jax.types import Batch

_TEXT_SLOTS = flags.DEFINE_list("text_slots", ["256", "128", "64"], "Numbers of slots.")
_IMAGE_SIDE = flags.DEFINE_integer("image_side", 16, "Of the square of image tokens.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 4, "Pictures in a step.")
_DIM = flags.DEFINE_integer("dim", 384, "Width of the model, a multiple of 96.")
_NUM_LAYERS = flags.DEFINE_integer("num_layers", 6, "Layers of the model.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns of each.")


def main() -> None:
    model = next_dit.NextDiTConfig.preset(
        "2b",
        dim=_DIM.value,
        num_layers=_NUM_LAYERS.value,
        num_heads=_DIM.value // 96,
        num_kv_heads=_DIM.value // 96,
        hidden_dim=4 * _DIM.value,
        dtype="float32",
        remat="none",
        cap_feat_dim=_DIM.value,
    )
    optimizer = optax.adamw(2e-4)
    step = jax.jit(
        make_train_step(
            next_dit.make_forward_many(model),
            optimizer,
            time_distribution="logit_normal",
            time_shift=flow.resolution_shift(_IMAGE_SIDE.value**2),
            ema_decay=0.99,
        ),
        donate_argnums=0,
    )
    state = init_state(next_dit.init_params(model, jax.random.key(0)), optimizer)
    slots = [int(text) for text in _TEXT_SLOTS.value]
    batches = {num: make_batch(model, num) for num in slots}
    rates: dict[int, list[float]] = {num: [] for num in slots}
    for turn in range(-1, _ROUNDS.value):  # the first one compiles, and is not counted
        for num in slots:
            began = time.perf_counter()
            for _ in range(3):
                state, metrics = step(state, batches[num], jax.random.key(1))
            jax.block_until_ready(metrics)
            if turn >= 0:
                rates[num].append(3 * _BATCH_SIZE.value / (time.perf_counter() - began))
    print(f"{'text slots':<12}{'images/s':>10}{'times':>8}{'min':>8}{'max':>8}{'by FLOPs':>10}")
    first, image_slots = slots[0], _IMAGE_SIDE.value**2
    for num in slots:
        ratios = [a / b for a, b in zip(rates[num], rates[first], strict=True)]
        flops = [next_dit.forward_flops(model, image_slots, n) for n in (first, num)]
        print(
            f"{num:<12}{statistics.median(rates[num]):>10.2f}{statistics.median(ratios):>8.2f}"
            f"{min(ratios):>8.2f}{max(ratios):>8.2f}{flops[0] / flops[1]:>10.2f}"
        )


def make_batch(model: next_dit.NextDiTConfig, text_slots: int) -> Batch:
    rng, side, size = np.random.default_rng(0), 2 * _IMAGE_SIDE.value, _BATCH_SIZE.value
    latents = rng.normal(size=(size, side, side, model.in_channels)).astype(np.float32)
    cap_feats = rng.normal(size=(size, text_slots, model.cap_feat_dim)).astype(np.float32)
    cap_mask = np.arange(text_slots) < rng.integers(8, 49, (size, 1))
    image = embed.patchify(jnp.asarray(latents), model.patch_size, _IMAGE_SIDE.value**2)
    return Batch(image, None, jnp.asarray(cap_feats), jnp.asarray(cap_mask))


if __name__ == "__main__":
    cli.run(main)
