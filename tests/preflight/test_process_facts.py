"""What a process reports about itself: every difference that matters, and nothing of its own."""

import dataclasses
import os
import time
import types

import jax
import numpy as np
import pytest

from gpt3jax import errors, step
from gpt3jax.config import schema
from gpt3jax.hardware import devices
from gpt3jax.model import loss
from gpt3jax.preflight import across_processes, checks, process_facts, speed
from gpt3jax.run import numerical_faults

import tiny


def random_file(path, n):
    path.write_bytes(np.random.default_rng().bytes(n))
    return path


@pytest.mark.parametrize("n", [0, 1, 4096, 65_536, 3_000_000])
def test_a_file_is_known_by_its_size_its_head_and_its_end(tmp_path, n):
    file = random_file(tmp_path / "f", n)
    first = process_facts.fingerprint(str(file))
    os.utime(file, (1, 1))  # times differ between copies
    assert process_facts.fingerprint(str(file)) == first and first.startswith(f"{n:,} bytes")
    data = bytearray(file.read_bytes())
    for place in {0, n - 1} if n else ():
        changed = data[:]
        changed[place] ^= 1
        file.write_bytes(changed)
        assert process_facts.fingerprint(str(file)) != first
    file.write_bytes(data + b"x")
    assert process_facts.fingerprint(str(file)) != first


def test_a_file_that_is_not_there_is_told(tmp_path):
    fingerprint = process_facts.fingerprint(str(tmp_path / "no"))
    assert fingerprint == "cannot be read: no such file or directory"


def test_all_files_of_the_data_are_looked_at(tmp_path):
    prefix = tiny.write_corpus(tmp_path / "a", 1, 5)
    data = schema.Data(
        train_paths=("0.5", prefix, "0.5", "b"),
        test_paths=(prefix,),
        vocab_file="v",
        merge_file="m",
    )
    found = process_facts.corpus(data)
    assert list(found) == ["v", "m", f"{prefix}.idx", f"{prefix}.bin", "b.idx", "b.bin"]
    assert process_facts.corpus(schema.Data(mock=True)) == {}
    assert list(process_facts.corpus(schema.Data(mock=True, tokenizer="t"))) == ["t"]


def test_variables_of_one_process_are_left_out():
    shared = {"XLA_FLAGS": "--a", "NCCL_ALGO": "Ring", "JAX_ENABLE_X64": "1"}
    shared |= {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    own = {"JAX_PROCESS_ID": "3", "JAX_COMPILATION_CACHE_DIR": "x", "PATH": "/bin", "SECRET": "s"}
    assert process_facts.environment(shared | own) == shared


def run_config(tmp_path):
    folders = {"checkpoint": {"dir": str(tmp_path / "a" / "b")}, "log": {"dir": str(tmp_path)}}
    return tiny.make_config(**folders)


def test_shared_folders_are_found_and_left_as_they_were(tmp_path):
    cfg = run_config(tmp_path)
    planted, wrong = process_facts.plant(cfg, "t0")
    assert not wrong and process_facts.folders(cfg, "t0") == {}
    process_facts.uproot(planted)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_another_machine_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(process_facts.time, "sleep", lambda seconds: None)
    cfg = run_config(tmp_path)
    planted, _ = process_facts.plant(cfg, "t0")
    other = run_config(tmp_path / "elsewhere")
    assert set(process_facts.folders(other, "t0")) == {"checkpoint.dir", "log.dir"}
    process_facts.uproot(planted)


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "a").write_text("a file in the way")
    planted, wrong = process_facts.plant(run_config(tmp_path), "t0")
    assert "cannot be written" in wrong["checkpoint.dir"] and "log.dir" not in wrong
    process_facts.uproot(planted)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_is_one_checkpoint_is_told(tmp_path):
    (tmp_path / "a" / "b" / "meta").mkdir(parents=True)
    (tmp_path / "a" / "b" / "meta" / "metadata").touch()
    planted, wrong = process_facts.plant(run_config(tmp_path), "t0")
    process_facts.uproot(planted)
    assert list(wrong) == ["checkpoint.dir"] and "is itself a checkpoint" in wrong["checkpoint.dir"]


def test_what_is_used_on_gpus_is_read_from_nvidia_smi(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf 'GPU-1, 1024\\nGPU-2, [N/A]\\nnonsense\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert process_facts.used_gpus() == {"GPU-1": 1 << 30}
    program.write_text("#!/bin/sh\nexit 9\n")
    assert process_facts.used_gpus() == {}


def test_the_number_of_the_process_is_not_part_of_its_config(tmp_path):
    cfg = run_config(tmp_path)
    mine, theirs = (
        process_facts.of_host(
            dataclasses.replace(cfg, distributed=schema.Distributed(process_id=i)), "t", first=True
        )
        for i in range(2)
    )
    assert mine == theirs
    assert mine["config"]["optimizer.peak_lr"] == "0.001"
    assert len(mine["code"]["gpt3jax/model/gpt.py"]) == 12 and "jaxlib" in mine["versions"]


@pytest.mark.parametrize("spike", ["off", "skip"])
def test_the_program_is_that_of_the_first_step_which_is_not_traced_again(monkeypatch, spike):
    """Where spikes are skipped the step takes one more number."""
    cfg = tiny.make_config(model={"n_layers": 1}, faults={"spike": spike})
    mesh = tiny.make_mesh(data=2, fsdp=4)
    built = step.build(cfg, mesh, 320)
    process_facts.program(built, cfg, cfg.batch.global_batch_size)

    def fail(*args):
        raise AssertionError("traced again")

    monkeypatch.setattr(loss, "token_weights", fail)
    batch, limit = tiny.make_batch(0, cfg, mesh, 2), numerical_faults.Faults(cfg, ()).step_args(1)
    assert len(limit) == (spike == "skip")
    with jax.set_mesh(mesh):  # as a call does before it compiles
        built.train.jitted.lower(built.init(), batch, *limit)
    with pytest.raises(AssertionError, match="traced again"):
        process_facts.program(built, cfg, 8)


def first_step(cfg):
    """Return the program that a preflight compares, and its batch size."""
    session = types.SimpleNamespace(cfg=cfg, on_program=lambda *args: [])
    laid, size = across_processes.first_step(session)
    return laid.program, size


MESH = {"data": 2, "fsdp": 4}


def test_programs_of_other_constants_differ():
    prints = set()
    for beta in (0.9, 0.95):
        cfg = tiny.make_config(optimizer={"beta2": beta}, model={"n_layers": 1}, mesh=MESH)
        built, size = first_step(cfg)
        prints.add(process_facts.program(built, cfg, size))
    assert len(prints) == 2


def test_programs_of_other_options_of_xla_differ(monkeypatch):
    """As where a user's own variables reached one process alone."""
    cfg = tiny.make_config(model={"n_layers": 1}, mesh=MESH)
    monkeypatch.setattr(devices, "compute_capability", lambda device: (9, 0))
    prints = set()
    for level in ("", "O0"):
        monkeypatch.setattr(os, "environ", {"JAX_OPTIMIZATION_LEVEL": level} if level else {})
        built, size = first_step(cfg)
        prints.add(process_facts.program(built, cfg, size))
    assert len(prints) == 2


def test_a_run_whose_schedule_does_not_fit_is_refused():
    cfg = tiny.make_config(optimizer={"decay": "wsd", "wsd_decay_samples": 300})
    with pytest.raises(errors.UserError, match="takes 364 samples, which exceeds the run's 320"):
        first_step(cfg)


SMALL = speed.Sizes(matrix=32, products=2, n_bytes=1 << 12, rounds=2)


def test_rates_are_positive_on_every_axis():
    mesh = tiny.make_mesh(data=2, fsdp=4)
    assert speed.matmul_tflops(mesh.devices.flat[3], SMALL) > 0
    for axis, kind in (("data", "all-reduce"), ("fsdp", "all-gather")):
        assert speed.collective_gbytes(mesh, axis, kind, SMALL) > 0


def test_a_measurement_that_hangs_is_ended_and_named():
    with pytest.raises(errors.TransientError, match=r"all-reduce along data did not end in 0 s"):
        speed.within(0.05, "all-reduce along data", lambda: time.sleep(1))
    with pytest.raises(ZeroDivisionError):
        speed.within(5, "this", lambda: 1 / 0)
    assert speed.within(5, "this", lambda: 7) == 7


def test_one_process_goes_through_every_round(tmp_path):
    session = across_processes.Session(run_config(tmp_path))
    with pytest.raises(errors.UserError, match=r"corpus: corpus\.idx: no such file"):
        session.on_hosts()
    assert session.on_devices()[0].status == "ok"
    assert [c.name for c in session.checks if c.status != "ok"] == ["corpus"]
    assert isinstance(session.checks[0], checks.Check)
