"""lumina_jax.train, in which one process hangs at its third batch, or finds no data."""

import os
import time

import jax

from lumina_jax import cli, train
from lumina_jax.data.loader import Loader


def hang(iterate):
    def hanging(loader, start_step=0):
        for number, batch in enumerate(iterate(loader, start_step)):
            if number == 2 and str(jax.process_index()) == os.environ.get("HANGING_PROCESS"):
                time.sleep(10_000)
            yield batch

    return hanging


def lose(make_loader):
    def losing(config, *parts):
        if str(jax.process_index()) == os.environ.get("FAILING_PROCESS"):
            with config.unlocked():
                config.data.directory = "/nowhere"
        return make_loader(config, *parts)

    return losing


if __name__ == "__main__":
    Loader.iterate = hang(Loader.iterate)
    train.make_loader = lose(train.make_loader)
    train.define_flags()
    cli.run(train.main, required=("config", "workdir"))
