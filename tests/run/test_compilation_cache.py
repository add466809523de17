"""Compiled programs are kept beside the checkpoints, and cost no run more than a warning."""

import shutil

import jax
import pytest

from gpt3jax.checkpoint import listing, storage
from gpt3jax.run import compilation_cache

import corpus

# Prints what JAX says of its cache.
COUNT = """
import atexit, collections, jax
events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **rest: events.update([event]))
atexit.register(lambda: print("found:", events["/jax/compilation_cache/cache_hits"]))
"""


@pytest.fixture
def no_folder():
    """Leave JAX without a folder for compiled programs, as a user's process is."""
    name, caches = "jax_compilation_cache_dir", "jax_persistent_cache_enable_xla_caches"
    before = {key: jax.config.values[key] for key in (name, caches)}
    jax.config.update(name, None)
    yield
    for key, value in before.items():
        jax.config.update(key, value)


def test_the_folder_is_beside_the_checkpoints_and_the_log_says_so(tmp_path, no_folder):
    compilation_cache.keep_beside("")
    assert compilation_cache.describe() == []
    compilation_cache.keep_beside(str(tmp_path))
    assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "compiled")
    assert compilation_cache.describe() == [f"compiled programs are kept in {tmp_path}/compiled"]


def test_a_users_own_folder_stays(tmp_path):
    own = jax.config.values["jax_compilation_cache_dir"]
    compilation_cache.keep_beside(str(tmp_path))
    assert jax.config.values["jax_compilation_cache_dir"] == own
    assert compilation_cache.describe() == [f"compiled programs are kept in {own}"]


def test_nothing_is_said_where_a_user_wants_no_cache(no_compilation_cache):
    assert compilation_cache.describe() == []


def run(folder, **variables):
    """Train four steps in the folder; return (output, errors, number of programs found)."""
    process = corpus.start_main(
        folder, "--train.n-steps=4", patch=COUNT, JAX_COMPILATION_CACHE_DIR="", **variables
    )
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "the run is complete: step 4" in out, err
    return out, err, int(out.rpartition("found: ")[2])


def start_anew(folder):
    """Remove what a run left but its compiled programs."""
    shutil.rmtree(folder / "logs")
    for entry in listing.entries(str(folder / "checkpoints")):
        shutil.rmtree(folder / "checkpoints" / entry.name)


@pytest.mark.slow
def test_a_restart_finds_its_step_and_a_damaged_one_is_compiled_again(tmp_path):
    folder = corpus.write_run(tmp_path)
    programs = folder / "checkpoints" / compilation_cache.FOLDER
    out, _, n_found = run(folder)
    assert f"compiled programs are kept in {programs}" in out and n_found == 0
    assert list(programs.glob("jit_train_step-*"))
    assert storage.Checkpoints(str(folder / "checkpoints")).steps() == [4]
    assert [entry.name for entry in listing.entries(str(folder / "checkpoints"))] == ["4"]
    losses = [record["loss"] for record in corpus.records(folder) if "loss" in record]
    start_anew(folder)
    _, err, n_found = run(folder)
    assert n_found >= len(list(programs.iterdir())) and "persistent compilation cache" not in err
    assert [record["loss"] for record in corpus.records(folder) if "loss" in record] == losses
    start_anew(folder)
    for file in programs.iterdir():
        file.write_bytes(file.read_bytes()[:-9])  # cut off, as by a kill
    _, err, n_found = run(folder)
    assert n_found == 0 and "Error reading persistent compilation cache entry" in err


@pytest.mark.slow
def test_a_folder_that_cannot_be_made_costs_a_warning(tmp_path):
    folder = corpus.write_run(tmp_path)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / compilation_cache.FOLDER).write_text("a file in the way")
    _, err, _ = run(folder)
    assert "Error reading persistent compilation cache entry" in err
