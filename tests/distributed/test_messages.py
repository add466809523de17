"""Joining processes: no proxy stands between them and process 0."""

import os
import socket
import subprocess
import sys

import jax
import pytest

from gpt3jax import errors
from gpt3jax.config import schema
from gpt3jax.distributed import joining, messages

import corpus

NAMES = ("grpc_proxy", "https_proxy", "http_proxy", "HTTP_PROXY", "A_PROXY_ID")
PROXIES = dict.fromkeys(NAMES, "http://127.0.0.1:9")
OF_TWO = schema.Distributed(n_processes=2, process_id=0, coordinator_address="node0:6000")


def test_a_proxy_is_not_asked_for_the_first_process(monkeypatch):
    """Hidden while JAX makes its client, and there again for all else; so without a proxy."""
    seen = []
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda **given: seen.append(dict(os.environ))
    )
    for proxies in (PROXIES, {}):
        for name in PROXIES:
            monkeypatch.delenv(name, raising=False)
        for name, value in proxies.items():
            monkeypatch.setenv(name, value)
        before = dict(os.environ)
        joining.start(OF_TWO, schema.Mesh())
        assert not PROXIES.keys() & seen.pop().keys()
        assert dict(os.environ) == before


def test_a_proxy_is_there_again_after_an_error(monkeypatch):
    def fail(**given):
        raise RuntimeError("no")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(errors.TransientError, match="2 processes were expected"):
        joining.start(OF_TWO, schema.Mesh())
    assert os.environ["http_proxy"] == "http://127.0.0.1:9"


@pytest.mark.parametrize("name", ["http_proxy", "grpc_proxy"])
def test_two_processes_join_behind_a_proxy_that_does_not_answer(name):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    code = """
import sys
from gpt3jax import config
from gpt3jax.distributed import joining, messages
options = config.Distributed(
    n_processes=2, process_id=int(sys.argv[1]), coordinator_address=sys.argv[2], start_timeout=60
)
joining.start(options, config.Mesh(cpu_devices=1))
print(messages.process())
messages.meet("end", 30)
messages.leave()
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(i), address],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {name: "http://127.0.0.1:9", "PYTHONPATH": str(corpus.REPOSITORY)},
        )
        for i in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [out for out, _ in outputs] == ["(0, 2)\n", "(1, 2)\n"], outputs
    assert not any(process.returncode for process in processes)
    assert not any("proxy" in err for _, err in outputs), "JAX warns although we hide the proxy"


def test_jax_itself_warns_of_a_proxy():
    """Otherwise the silence above proves nothing. gRPC ignores this variable."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    code = "import jax, sys; jax.distributed.initialize(sys.argv[1], 1, 0)"
    done = subprocess.run(
        [sys.executable, "-c", code, address], capture_output=True, text=True, timeout=120,
        env=os.environ | {"A_PROXY_ID": "7", "JAX_PLATFORMS": "cpu"}, check=True,
    )  # fmt: skip
    assert "proxy" in done.stderr


def test_the_error_of_the_first_process_is_raised_in_all_with_its_page(monkeypatch):
    board, raised = {}, []
    error_of_first = errors.TransientError("it is full", page="checkpoints.md#saving")
    monkeypatch.setattr(messages, "publish", board.__setitem__)
    monkeypatch.setattr(messages, "receive", lambda name, timeout: board[name])
    monkeypatch.setattr(messages, "leave", lambda: None)
    for me, own in enumerate((error_of_first, None)):
        monkeypatch.setattr(messages, "process", lambda me=me: (me, 2))
        with pytest.raises(errors.TransientError) as error:
            messages.raise_of_first("folders", own, 1.0)
        raised.append(str(error.value))
    assert raised == [str(error_of_first)] * 2


class _Overslept:
    """A service that answers only after the time that a caller gave it."""

    def blocking_key_value_get(self, key, milliseconds):
        raise jax.errors.JaxRuntimeError(f"DEADLINE_EXCEEDED: {key}")

    def key_value_try_get(self, key):
        if key != "gpt3jax/told/1":
            raise jax.errors.JaxRuntimeError(f"NOT_FOUND: {key}")
        return "here"


def test_a_text_that_is_there_is_received_however_short_the_time(monkeypatch):
    """Else a process that answered is named beside the silent one that used up the time."""
    monkeypatch.setattr(messages, "_client", _Overslept)
    monkeypatch.setattr(messages, "process", lambda: (0, 3))
    assert messages.receive("told/1", 0) == "here"
    assert messages.receive("told/2", 0) is None
    assert messages.gather("told", "mine", 0) == ["mine", "here", None]
