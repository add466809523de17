"""XLA's options: each has a reason and the type that XLA wants, and the user's own win."""

import contextlib

import jax
import pytest

from gpt3jax import errors
from gpt3jax.hardware import gpus, xla_flags

HOPPER, AMPERE, BLACKWELL = (9, 0), (8, 0), (10, 0)
MAP = "xla_gpu_analytical_latency_estimator_options"


def test_what_depends_on_stages_goes_with_the_program():
    plain, staged = (xla_flags.compiler_options(HOPPER, n_stages, {}) for n_stages in (1, 4))
    assert plain.items() > staged.items()
    alone = {"optimization_level", "xla_gpu_experimental_parallel_collective_overlap_limit"}
    assert set(plain) - set(staged) == alone


def test_the_scheduler_may_use_what_the_state_leaves_of_the_allocators_memory():
    """XLA takes the percentage of 80% of the GPU less the step's arguments."""
    name = "xla_gpu_memory_limit_slop_factor"
    for share in (0.0, 0.2, 0.4):
        percent = xla_flags.compiler_options(HOPPER, 1, {}, share)[name]
        allowed = percent / 100 * (0.8 - share) + share
        assert xla_flags.MEMORY_FRACTION - 0.01 < allowed <= xla_flags.MEMORY_FRACTION


def test_only_gpus_with_tables_have_the_estimator_and_cpus_have_no_option():
    name = "xla_gpu_enable_analytical_sol_latency_estimator"
    assert xla_flags.compiler_options(HOPPER, 1, {})[name] is True
    assert xla_flags.compiler_options(AMPERE, 1, {})[name] is False
    assert xla_flags.compiler_options(None, 1, {}) == {}


@pytest.mark.parametrize("capability", [HOPPER, AMPERE, BLACKWELL])
def test_every_option_has_a_reason_and_xla_takes_it(capability):
    settings = (*xla_flags.of_step(capability, 1), *xla_flags.of_plan())
    assert all(setting.reason for setting in settings)
    options = xla_flags.compiler_options(capability, 1, {})
    assert set(options) == {setting.name for setting in xla_flags.of_step(capability, 1)}
    jax.jit(lambda x: x + 1, compiler_options=options).lower(1.0).compile()  # XLA checks the types
    xla_flags.check(xla_flags.text(xla_flags.of_plan()))


def test_a_deterministic_step_has_one_option_more_that_xla_takes():
    plain = xla_flags.compiler_options(HOPPER, 1, {})
    strict = xla_flags.compiler_options(HOPPER, 1, {}, deterministic=True)
    assert strict == plain | {"xla_gpu_exclude_nondeterministic_ops": True}
    jax.jit(lambda x: x + 1, compiler_options=strict).lower(1.0).compile()


def test_the_rate_of_the_network_is_that_of_every_gpu_with_the_estimator():
    (setting,) = xla_flags.of_process()
    assert setting.name == MAP
    for gpu in gpus.GPUS.values():
        rate = gpus.network_of(gpu).nic_bandwidth / 1e9
        assert gpu.capability < HOPPER or f"nic_speed_gbps={rate:g}," in setting.value


def test_a_users_own_options_are_not_overruled():
    own = {
        "XLA_FLAGS": "--xla_gpu_memory_limit_slop_factor=50 --xla_gpu_enable_triton_gemm=false",
        "JAX_OPTIMIZATION_LEVEL": "O0",
        "JAX_COMPILER_ENABLE_REMAT_PASS": "true",
    }
    ours, left = (xla_flags.compiler_options(HOPPER, 1, env) for env in ({}, own))
    given = {"xla_gpu_memory_limit_slop_factor", "optimization_level", "xla_disable_hlo_passes"}
    assert left == {name: value for name, value in ours.items() if name not in given}


def test_an_option_that_this_xla_does_not_have_is_left_out(monkeypatch):
    @contextlib.contextmanager
    def another_xla():
        yield b"xla_gpu_enable_latency_hiding_scheduler\0"

    monkeypatch.setattr(xla_flags, "_library", another_xla)
    xla_flags._unknown.cache_clear()
    options = xla_flags.compiler_options(HOPPER, 1, {})
    assert set(options) == {"xla_gpu_enable_latency_hiding_scheduler", "optimization_level"}
    assert xla_flags.variables({})["XLA_FLAGS"] == ""
    xla_flags._unknown.cache_clear()


def test_variables_that_must_be_there_before_jax_starts_leave_a_users_own():
    added = xla_flags.variables({})
    assert added["XLA_CLIENT_MEM_FRACTION"] == "0.92" and f"--{MAP}=" in added["XLA_FLAGS"]
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        assert set(xla_flags.variables({name: "0.5"})) == {"XLA_FLAGS"}
    mine = f"--{MAP}=nic_speed_gbps=90"
    assert xla_flags.variables({"XLA_FLAGS": mine})["XLA_FLAGS"].endswith(f" {mine}")


def test_one_queue_up_to_hopper_unless_the_user_says_how_many():
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    assert xla_flags.variables({}, {AMPERE})[name] == xla_flags.variables({}, {HOPPER})[name] == "1"
    for capabilities in ({BLACKWELL}, {HOPPER, BLACKWELL}, {(12, 0)}, ()):
        assert name not in xla_flags.variables({}, capabilities)
    assert name not in xla_flags.variables({name: "8"}, {HOPPER})


def test_launches_are_joined_on_blackwell_alone_unless_the_user_says():
    name = "xla_gpu_enable_command_buffer"
    chosen = [xla_flags.compiler_options(gpu, 1, {})[name] for gpu in (AMPERE, HOPPER, BLACKWELL)]
    assert chosen == ["", "", "FUSION,CUSTOM_CALL"]
    assert name not in xla_flags.compiler_options(HOPPER, 1, {"XLA_FLAGS": f"--{name}=FUSION"})


def test_an_unknown_option_of_xla_is_named_with_its_nearest():
    with pytest.raises(errors.UserError, match="did you mean xla_gpu_enable_triton_gemm"):
        xla_flags.check("--xla_gpu_enable_triton_gem=false")
