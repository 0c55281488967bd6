"""Stage 1: 256 px, from nothing.

    python -m lumina_jax.train --config=configs/stage1.py --workdir=gs://bucket/stage1 \
        --config.data.directory=gs://bucket/data/256

    paper, table 3    pixels  pictures  steps    batch  learning rate  A100-days
                      256     100M      144,000  1024   2e-4           191

Every picture is seen 1.47 times. launch/stages.sh runs this stage and the two after it.

From the stage before: nothing; the model is drawn from the seed.

Topology: 256 v5e (16x16) as 8 replicas of 32 parts: 9216 and 2304 leave 288 and 72 rows of a kernel
to each of 32 devices, whole tiles of 8; at 256 parts they are not, and the compiler then reduces
gradients and gathers weights in ways that cost more. On 64 v5p (4x4x4): --config.mesh.replica=2.
Expected by tools/plan: 0.251 s a step, 4,080 images/s, 10.0 hours, 2,570 chip-hours on 256 v5e
(never run there); other topologies in docs/performance.md. The frozen encoders take 0.063 s more on
the same chips, unless their features are cached (docs/data.md).

The frozen text encoder and VAE are those of the released pipeline: name a local copy with
--config.text_encoder.path and --config.autoencoder.path where a host cannot reach the Hugging Face
hub. Pictures of two domains, such as photographs and renderings, may have system prompts of their
own, as in the paper: --config.data.datasets (docs/data.md).

What the paper leaves open is marked "Our choice". Betas (0.9, 0.95), eps 1e-15, no decay, gradients
clipped at 2.0, a constant rate and dropout of 0.1 are the released program's, and are in base.py.
"""

from ml_collections import ConfigDict

from configs import base

RELEASED = "Alpha-VLLM/Lumina-Image-2.0"


def get_config() -> ConfigDict:
    config = base.get_config()
    config.text_encoder.update(kind="gemma2", path=RELEASED)
    config.autoencoder.update(kind="vae", path=RELEASED)
    config.mesh.update(replica=8, data=32)
    # 512 tokens a picture, or fewer: there is room for the results of all products.
    config.model.remat = "dots"

    config.data.resolution = 256  # 15 buckets of about 256 tokens
    # Our choice: most from long captions, whose loss is the lowest in the paper (figure 4); the
    # others too, since people write short prompts. Tags least: nobody's sentences.
    config.data.kinds = ConfigDict({"long": 0.4, "medium": 0.3, "short": 0.2, "tags": 0.1})
    # Our choice: the two languages of the paper, more of the one that most prompts are in. Captions
    # of other languages are not taken.
    config.data.languages = ConfigDict({"en": 0.8, "zh": 0.2})
    # Our choice: here the text is as long as the picture. These hold a system prompt and captions
    # of about the paper's lengths, and on average 160 slots instead of 256.
    config.data.text_slots = ConfigDict({"long": 256, "medium": 128, "short": 64, "tags": 64})

    # The shift of times follows from the tokens, 1.65 here and 3.16 at 1024 px, as in the released
    # program (flow.time_shift is None).

    # Our choice; the released program has none. Adam's first updates are as long as later ones,
    # whatever the gradient; 1000 of 144,000 steps are the cheapest cure.
    config.optim.warmup_steps = 1000
    # Our choice: a mean of ten thousand steps. The released program's 0.95 is one of twenty, which
    # is hardly an average. It grows from 0.1, so that the random start is forgotten.
    config.optim.ema_decay = 0.9999

    config.train.num_steps = 144_000
    config.train.batch_size = 1024

    config.preview.prompts = (
        "a red fox in the snow",
        "a glass of water on a wooden table, morning light",
        "一只橘猫坐在窗台上",
        "an old lighthouse on a cliff, oil painting",
    )
    config.sampling.update(height=256, width=256)
    return config
