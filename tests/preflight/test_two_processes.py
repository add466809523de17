"""Real processes that do not go together are refused, and what differs is named."""

import json
import os
import re
import shutil
import socket
import time

import pytest

from gpt3jax import errors
from gpt3jax.preflight import __main__ as preflight
from gpt3jax.preflight import speed

import corpus
import documents

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path):
    return corpus.write_run(tmp_path / "run")


def run_two(folder, module, *args, second=(), second_folder=None, **variables):
    """Run two processes, the second with further arguments or elsewhere; return what they say."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    shared = (
        "--mesh.cpu-devices=2", "--mesh.data=-1", "--distributed.n-processes=2",
        f"--distributed.coordinator-address={address}", "--distributed.heartbeat-timeout=10", *args,
    )  # fmt: skip
    processes = [
        corpus.start_main(folder, *shared, "--distributed.process-id=0", module=module),
        corpus.start_main(
            second_folder or folder, *shared, "--distributed.process-id=1", *second, module=module,
            **variables,
        ),
    ]  # fmt: skip
    told = [process.communicate(timeout=300) for process in processes]
    return [p.returncode for p in processes], [o for o, _ in told], [e for _, e in told]


def test_sound_processes_pass_in_a_minute_and_the_first_reports(folder):
    begin = time.monotonic()
    statuses, out, err = run_two(folder, "gpt3jax.preflight", "--mesh.fsdp=2", "--json=report.json")
    assert statuses == [0, 0], err
    assert time.monotonic() - begin < 120  # two on a busy machine; 17 s of checks on a free one
    report = json.loads((folder / "report.json").read_text())
    names = [check["name"] for check in report["checks"]]
    assert report["passed"] and {"all-reduce data", "all-gather fsdp", "matmul"} <= set(names)
    assert "Preflight" in out[0] and "Preflight" not in out[1]
    assert sorted(os.listdir(folder)) == ["corpus.bin", "corpus.idx", "recipe.py", "report.json"]


def test_training_with_unlike_configs_is_refused_with_each_field(folder):
    statuses, _, err = run_two(
        folder, "gpt3jax.main", second=("--optimizer.peak-lr=0.02", "--model.n-layers=1")
    )
    assert statuses == [errors.REFUSED] * 2
    for text in err:
        assert "optimizer.peak_lr=0.02 on process 1" in text and "0.01 on the others" in text
        assert "model.n_layers=1 on process 1" in text
        assert "Traceback" not in text and documents.points_on(text)
    assert not (folder / "checkpoints").exists()


def test_another_number_of_processes_is_refused(folder):
    statuses, _, err = run_two(folder, "gpt3jax.main", second=("--distributed.n-processes=3",))
    assert statuses == [errors.REFUSED] * 2
    assert "distributed.n_processes=3 on process 1" in err[0]


def test_training_with_unlike_programs_is_refused(folder):
    patched = "\nfrom gpt3jax import optimizer\noptimizer.clip_factor = lambda norm, limit: 1.0\n"
    (folder / "patched.py").write_text(corpus.RECIPE + patched)
    statuses, _, err = run_two(folder, "gpt3jax.main", second=("--config=patched.py",))
    assert statuses == [errors.REFUSED] * 2
    assert re.search(r"program: training step=[\d,]+ characters, .* on process 1", err[0]), err[0]


def test_other_options_of_xla_are_refused(folder):
    flags = "--xla_cpu_enable_fast_math=true"
    statuses, _, err = run_two(folder, "gpt3jax.main", XLA_FLAGS=flags)
    assert statuses == [errors.REFUSED] * 2
    assert f"environment: XLA_FLAGS={flags} on process 1" in err[0]


def test_another_number_of_devices_may_be_tried_again(folder):
    """The number is the config's on the CPU: a recipe hides that the processes differ in it."""
    hidden = "\nimport jax\njax.config.update('jax_num_cpu_devices', 1)\n"
    hidden += "jax.config.update = lambda name, value: None\n"
    (folder / "fewer.py").write_text(corpus.RECIPE + hidden)
    statuses, _, err = run_two(folder, "gpt3jax.main", second=("--config=fewer.py",))
    assert statuses == [errors.RETRY] * 2, err
    assert "devices of a process=1 on process 1" in err[0]


def test_folders_that_are_not_shared_and_another_corpus_are_named(folder, tmp_path):
    other = corpus.write_run(tmp_path / "other")
    data = bytearray((other / "corpus.bin").read_bytes())
    data[2] ^= 1
    (other / "corpus.bin").write_bytes(data)
    statuses, out, _ = run_two(folder, "gpt3jax.preflight", "--quick", second_folder=other)
    assert statuses == [errors.REFUSED] * 2
    assert re.search(r"corpus: corpus\.bin=[\d,]+ bytes, digest \w+ on process 1", out[0])
    assert "folders: checkpoint.dir: checkpoints is not the first process's" in out[0]
    assert "folders: log.dir: logs is not the first process's" in out[0]


def test_a_clock_that_is_wrong_is_told_and_hinders_nothing(folder):
    late = "\nimport time\nreal = time.time\ntime.time = lambda: real() - 7.5\n"
    (folder / "late.py").write_text(corpus.RECIPE + late)
    statuses, out, err = run_two(
        folder, "gpt3jax.preflight", "--quick", second=("--config=late.py",)
    )
    assert statuses == [0, 0], err
    found = re.search(r"clocks: process 1 .* is (\S+) s \(\+- (\S+)\) behind process 0", out[0])
    assert abs(float(found[1]) - 7.5) <= float(found[2]) + 0.001


def test_a_process_that_reads_for_ever_is_named(folder, tmp_path):
    """Its index is a pipe that nobody writes, as a network disk that does not answer."""
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "corpus.idx").unlink()
    os.mkfifo(other / "corpus.idx")
    statuses, _, err = run_two(folder, "gpt3jax.main", second_folder=other)
    assert statuses[0] == errors.RETRY and statuses[1] != 0
    assert re.search(r"no answer from process 1 \(\S+\)", err[0]) and "unknown" not in err[0]


def test_a_slow_device_is_named_and_strict_refuses_it(folder, monkeypatch, capsys):
    def rate(device, sizes):
        return 0.3 if device.id == 5 else 1.0 + device.id / 100

    monkeypatch.chdir(folder)
    monkeypatch.setattr(speed, "matmul_tflops", rate)
    monkeypatch.setattr(speed, "collective_gbytes", lambda *args: 1.0)
    assert preflight.main(["--config=recipe.py"]) == errors.DONE
    told = capsys.readouterr().out
    assert re.search(r"matmul: device 5 of process 0 .*: 0\.3 TFLOP/s, 29% of the median", told)
    assert "device 4" not in told
    assert preflight.main(["--config=recipe.py", "--strict"]) == errors.RETRY
