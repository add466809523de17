"""XLA's options: each has a reason, the user's own win, and a shell reads nothing else."""

import subprocess

import pytest

from gpt3jax import errors
from gpt3jax.hardware import gpus, xla_flags


@pytest.mark.parametrize("n_stages", [1, 4])
@pytest.mark.parametrize("name", ["h100", "a100"])
def test_flags_of_a_plan_are_those_of_a_run_and_every_one_has_a_reason(name, n_stages):
    gpu = gpus.GPUS[name]
    network = gpus.network_of(gpu)
    run = xla_flags.of_run(gpu, network, n_stages)
    planned = xla_flags.of_plan(gpu, network, n_stages)
    assert planned[: len(run)] == run
    assert all(setting.reason for setting in (*planned, *xla_flags.variables(n_stages)))


def test_an_unknown_option_of_xla_is_named_with_its_nearest():
    h100 = gpus.GPUS["h100"]
    xla_flags.check(xla_flags.text(xla_flags.of_plan(h100, gpus.network_of(h100), 1)))
    with pytest.raises(errors.UserError, match="did you mean xla_gpu_enable_triton_gemm"):
        xla_flags.check("--xla_gpu_enable_triton_gem=false")


def test_a_shell_gets_the_settings_and_those_of_the_user_win(repository, capsys):
    recipe_file = f"--config={repository / 'configs' / '175b.py'}"
    assert xla_flags.main([recipe_file, "--data.mock"]) == 0
    script = (
        capsys.readouterr().out + 'echo "$XLA_FLAGS / $JAX_OPTIMIZATION_LEVEL / $JAX_PLATFORMS"'
    )
    environment = {"XLA_FLAGS": "--xla_mine=1", "JAX_OPTIMIZATION_LEVEL": "O0"}
    done = subprocess.run(
        ["bash", "-euc", script], env=environment, text=True, capture_output=True, check=True
    )
    assert (
        done.stdout.endswith("--xla_mine=1 / O0 / cuda,cpu\n") and "latency_hiding" in done.stdout
    )
    assert xla_flags.main([recipe_file, "--data.mock", "--mesh.tensor=5"]) == 2
    assert "mesh.tensor=5" in capsys.readouterr().err
    assert xla_flags.main([recipe_file, "--data.mock", "--mesh.stage=-1", "--mesh.data=1"]) == 2
    assert "mesh.stage=-1" in capsys.readouterr().err


def test_a_shell_that_runs_what_it_reads_gets_settings_alone(
    repository, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi
    talks = tmp_path / "talks.py"
    path = repository / "configs" / "175b.py"
    talks.write_text(f"print('rm -rf /')\n{path.read_text()}")
    assert xla_flags.main([f"--config={talks}", "--data.mock"]) == 0
    shown = capsys.readouterr()
    assert all(line.startswith("export ") for line in shown.out.splitlines())
    assert "nic_speed_gbps=45" in shown.out and "rm -rf /" in shown.err  # as for H100s
    with pytest.raises(SystemExit):
        xla_flags.main([f"--config={talks}", "--help"])
    shown = capsys.readouterr()
    assert not shown.out and "--mesh.tensor" in shown.err
