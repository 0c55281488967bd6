"""Profiles appear where they are asked for, and only there."""

import jax
import jax.numpy as jnp
import pytest

from lumina_jax.profiling import Profiler


def run(profiler, steps):
    """What the loop does; a line of the log after every second step."""
    for step in steps:
        if profiler.is_due(step):
            profiler.switch(step)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            jnp.square(jnp.float32(step)).block_until_ready()
        if step % 2 == 0:
            profiler.look_for_request(step)
    profiler.close()


def annotated_steps(workdir):
    """The steps in each profile, by its folder."""
    found = {}
    for folder in sorted((workdir / "profiles").glob("*")):
        (path,) = folder.rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
        found[folder.name] = sorted(
            {
                dict(event.stats)["step_num"]
                for plane in data.planes
                for line in plane.lines
                for event in line.events
                if event.name == "train"
            }
        )
    return found


def test_a_request_records_the_steps_it_asks_for_and_is_removed(tmp_path):
    (tmp_path / "profile").write_text("3\n")
    run(Profiler(str(tmp_path)), range(1, 9))
    assert not (tmp_path / "profile").exists()
    assert annotated_steps(tmp_path) == {"3": [3, 4, 5]}


def test_steps_named_before_and_an_empty_request_that_the_end_cuts_short(tmp_path):
    profiler = Profiler(str(tmp_path), (2, 4))
    run(profiler, range(1, 5))
    (tmp_path / "profile").touch()
    run(profiler, range(5, 9))
    assert annotated_steps(tmp_path) == {"2": [2, 3], "7": [7, 8]}


@pytest.mark.parametrize("text", ["many", "0", "-1"])
def test_a_request_that_is_no_number_is_removed_and_said_to_be_wrong(text, tmp_path, caplog):
    (tmp_path / "profile").write_text(text)
    run(Profiler(str(tmp_path)), range(1, 6))
    assert not (tmp_path / "profile").exists()
    assert not (tmp_path / "profiles").exists()
    assert "is no number of steps; nothing is recorded" in caplog.text
