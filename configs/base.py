"""Every key that a run has, with its unit. Other configs say what differs, and why."""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0

    # The network: a named size, and changes to it. A size that is None is the preset's.
    config.model = model = ConfigDict()
    model.preset = "2b"  # tiny, 2b, 3b, 4b or 7b
    model.dim = config_dict.placeholder(int)
    model.num_layers = config_dict.placeholder(int)
    model.num_refiner_layers = config_dict.placeholder(int)
    model.num_heads = config_dict.placeholder(int)
    model.num_kv_heads = config_dict.placeholder(int)
    model.hidden_dim = config_dict.placeholder(int)  # inside the feed-forward
    model.axes_dims = config_dict.placeholder(tuple)  # of a head: caption index, row, column
    model.patch_size = config_dict.placeholder(int)  # in latents
    model.dtype = "bfloat16"  # of the computation; parameters are float32 always
    # auto: flash on TPUs, cudnn on GPUs in bfloat16, xla elsewhere; or one of these, or splash.
    model.attention = "auto"
    # What the backward pass finds saved, from least to most: full, attention, offload, names, dots,
    # none (lumina_jax/models/stack.py).
    model.remat = "names"
    model.quantization = "none"  # products with the blocks' kernels in eight bits: int8 or fp8

    # How many devices along each axis; the product is their number. -1: what the others leave.
    config.mesh = mesh = ConfigDict()
    mesh.replica = 1  # copies of the parameters, each with its part of the batch
    mesh.data = -1  # the batch, the parameters, their average and moments are split
    mesh.model = 1  # heads and feed-forward width are split

    config.data = data = ConfigDict()
    data.directory = ""  # of a data set made by tools/prepare_data.py
    # Or several to mix, by a name: {"photos": {"directory": ..., "weight": 0.7}, ...}. Weights are
    # shares of the rows; without any, all records are equally likely. Each may have a system_prompt
    # of its own.
    data.datasets = ConfigDict()
    data.resolution = 1024  # pixels; a picture has at most as many tokens as a square of this side
    data.buckets = ()  # such as ("1024x1024", "1232x832"); all of the data set's by default
    # How often each kind of caption is taken, among those that a picture has, and then each
    # language of that kind, such as {"en": 0.8, "zh": 0.2}. Without, each caption is as likely.
    data.kinds = ConfigDict({"long": 1.0, "medium": 1.0, "short": 1.0, "tags": 1.0})
    data.languages = ConfigDict()
    data.shuffle_tags = False  # captions of tags: in another order each time
    data.caption_dropout = 0.1  # how often a caption is replaced by nothing
    data.dropout_keeps_system_prompt = False  # by the system prompt alone instead
    # Text slots of a batch, by the kind of its captions, such as {"long": 256, "short": 64}: then
    # all of a batch are of one kind. Without, text_encoder.max_tokens for all.
    data.text_slots = ConfigDict()
    # The text before every caption, by its name in lumina_jax/system_prompts.py: base, real, align,
    # aesthetics, 4grid or empty. The official fine-tuning takes base for ordinary captions.
    data.system_prompt = "base"
    data.cached = ()  # "latents", "cap_feats": read what tools/cache_features.py stored of them
    data.num_threads = 16
    data.prefetch = 8  # batches made ahead

    config.text_encoder = text_encoder = ConfigDict()
    text_encoder.kind = "use"  # small and multilingual, without a download; or gemma2
    text_encoder.path = ""  # of gemma2: a folder or a name on the Hugging Face hub
    text_encoder.max_tokens = 256  # longer captions are cut
    text_encoder.dtype = "bfloat16"  # of gemma2: its weights and features; or float32
    text_encoder.soft_cap = True  # of gemma2: bounds the logits of attention, as it was trained
    config.autoencoder = autoencoder = ConfigDict()
    autoencoder.kind = "pixels"  # no compression; or vae
    autoencoder.path = ""  # of vae: a folder, a name on the Hugging Face hub, a run of train_vae
    autoencoder.dtype = "bfloat16"  # of vae: its kernels and computation; or float32
    autoencoder.sample = False  # of vae: latents are drawn, or the likeliest (as upstream)

    config.flow = flow = ConfigDict()
    flow.time_distribution = "logit_normal"  # or uniform
    flow.time_shift = config_dict.placeholder(float)  # None: from the resolution's tokens
    flow.auxiliary_weight = 0.0  # of the loss on latents averaged 4 x 4 (high resolution)
    flow.auxiliary_shift = "main"  # main: as upstream, the same; own: of its own tokens

    config.optim = optim = ConfigDict()
    optim.name = "adamw"  # muon or adafactor: less memory
    optim.learning_rate = 2e-4
    optim.warmup_steps = 0
    optim.schedule = "constant"  # or cosine, down to zero at the last step
    optim.b1 = 0.9
    optim.b2 = 0.95
    optim.eps = 1e-15  # of Adam
    optim.muon_momentum = 0.95  # of the matrices that muon takes; b1, b2, eps are of the others
    optim.moment_dtype = "float32"  # what moments are kept in between steps; or bfloat16
    optim.weight_decay = 0.0
    optim.grad_clip = 2.0  # global norm
    optim.ema_decay = 0.9999

    config.train = train = ConfigDict()
    train.num_steps = 100_000
    train.batch_size = 1024  # over all devices and microbatches
    train.num_microbatches = 1  # through the model one after another, to save memory
    train.log_every = 50  # steps
    train.checkpoint_every = 1000  # steps
    train.keep_checkpoints = 3  # the newest ones
    train.keep_checkpoint_every = 10_000  # steps; these are kept for ever
    train.keep_best_checkpoints = 0  # those with the lowest validation loss, besides
    train.if_damaged = "stop"  # a checkpoint that cannot be read; or previous: take the one before
    # In a row, whose loss or gradient is not finite. They are not applied; then the run ends.
    train.max_skipped_steps = 10
    train.hang_timeout = (
        1800.0  # seconds without a step, a save or the like, then it ends; 0: never
    )
    # Steps to record with the profiler, such as (100, 110): 100 to 109. Also on demand: a file
    # `profile` in the workdir, see docs/training.md.
    train.profile_steps = ()
    train.init_from = ""  # workdir of the stage before, or published weights
    train.init_weights = "ema"  # of a workdir; or params
    train.init_optimizer = "fresh"  # or kept: the moments of a workdir, under a new schedule

    # Where compiled programs are kept for the next start, a local folder or a bucket that all
    # processes see. Empty: where JAX_COMPILATION_CACHE_DIR says, else <workdir>/compiled.
    config.compile = compile_ = ConfigDict({"cache_directory": ""})
    # For the compiler of the training step, by the kind of device, such as
    # {"TPU": {"xla_tpu_scoped_vmem_limit_kib": "65536"}}; over those of lumina_jax/compiler.py.
    compile_.options = ConfigDict()

    # The loss on pictures that are not trained on, each at one of the fixed times, the middles of
    # num_times equal parts of 0 to 1.
    config.validation = validation = ConfigDict()
    validation.every = 1000  # steps; 0: never
    validation.num_records = 2048  # held out, the last of each bucket, also if `every` is 0
    validation.directory = ""  # take them from this data set instead, and hold none out
    validation.batch_size = 256  # over all devices; of one bucket each, the last is filled up
    validation.num_times = 8

    # Pictures drawn while training, and what a checkpoint of this run samples with by default.
    config.preview = ConfigDict({"every": 1000, "prompts": ("",), "seed": 0})  # every 0: never
    config.sampling = sampling = ConfigDict()
    sampling.height = 1024  # pixels
    sampling.width = 1024
    sampling.num_steps = 50
    sampling.guidance_scale = 4.0
    sampling.guidance_truncation = 1.0
    sampling.guidance_renorm = 1.0
    sampling.semantics = "official"  # or diffusers
    sampling.solver = "euler"
    sampling.time_shift = 6.0
    sampling.cache_threshold = 0.0  # change of the layers' work up to which it is reused; 0: off
    sampling.cache_interval = 1  # or run them in every n-th evaluation; 1: in all
    sampling.cache_order = 1  # 0: reuse the last work; 1: follow the last two
    sampling.cache_coefficients = (
        1.0,
        0.0,
    )  # distance of input -> change; tools/calibrate_cache.py
    sampling.merge_ratio = 0.0  # share of image tokens that go with a similar one; 0.75 at most
    sampling.merge_layers = (0.5, 0.75)  # in these layers, as fractions of the depth
    sampling.merge_steps = (0.5, 1.0)  # and evaluations
    sampling.rope_scaling = "none"  # or time_aware, for pictures larger than those trained on
    sampling.rope_watershed = 0.3  # t from which on only slow rotations are stretched
    sampling.proportional_attention = False  # sharper where more tokens share it than in training
    sampling.system_prompt = "real"  # as upstream samples, whichever a picture was trained with
    return config
