"""Generation over HTTP: both schemas, limits, and many requests at once."""

import concurrent.futures
import http.client
import json
import threading
import time

import jax
import pytest

from gpt3jax import config, model
from gpt3jax.data import tokenizer
from gpt3jax.sample import generate

import tiny

uvicorn = pytest.importorskip("uvicorn")
serve = pytest.importorskip("gpt3jax.sample.serve")

LIMITS = serve.Limits(max_rows=4, max_queue=3, max_body_bytes=2000)
GREEDY = {"temperature": 0, "max_tokens": 9, "ignore_eos": True}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    tokenizer.train(["no merges"], 257, *files)
    return tokenizer.from_files(*files)


@pytest.fixture(scope="module")
def port(text):
    """Serve random weights in a thread, and return the port."""
    cfg = tiny.make_config(model={"n_layers": 1, "vocab_size": 257, "init_std": 0.3}).model
    params = model.GPT(cfg, jax.random.key(0))
    mesh = tiny.one_device_mesh()
    generator = generate.Generator(params, model.Compute(), mesh, text.eod_id)
    app = serve.make_app(generator, text, "tiny", LIMITS)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(timeout=30)
    assert not thread.is_alive()
    assert not [t for t in threading.enumerate() if t.name == "batcher"]


def ask(port, method, path, body=None):
    """Return the status and the answer's text."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    content = body if isinstance(body, bytes | None) else json.dumps(body)
    connection.request(method, path, content, {"Content-Type": "application/json"})
    response = connection.getresponse()
    told = response.read().decode()
    connection.close()
    return response.status, told


def complete(port, **fields):
    status, told = ask(port, "POST", "/v1/completions", GREEDY | fields)
    assert status == 200, told
    return json.loads(told)


def test_what_is_served_is_told(port):
    assert ask(port, "GET", "/health") == (200, '{"status":"ok"}')
    models = json.loads(ask(port, "GET", "/v1/models")[1])
    assert [entry["id"] for entry in models["data"]] == ["tiny"]


def test_completions_of_a_text_a_list_and_tokens(port, text):
    one = complete(port, model="tiny", prompt="abc")
    choice = one["choices"][0]
    assert one["object"] == "text_completion" and choice["finish_reason"] == "length"
    assert one["usage"] == {"prompt_tokens": 3, "completion_tokens": 9, "total_tokens": 12}
    both = complete(port, prompt=["abc", "xy"], echo=True)["choices"]
    assert [c["index"] for c in both] == [0, 1]
    assert both[0]["text"] == "abc" + choice["text"] and both[1]["text"].startswith("xy")
    assert complete(port, prompt=text.encode("abc"))["choices"][0]["text"] == choice["text"]


def test_seeds_n_and_stop(port):
    drawn = {"prompt": "abc", "temperature": 1.5, "seed": 7}
    texts = [c["text"] for c in complete(port, n=3, **drawn)["choices"]]
    assert len(set(texts)) == 3
    assert [c["text"] for c in complete(port, n=3, **drawn)["choices"]] == texts
    whole = complete(port, prompt="abc")["choices"][0]["text"]
    stop = whole[3:5]
    cut = complete(port, prompt="abc", stop=[stop, "never"])["choices"][0]
    assert cut["text"] == whole[: whole.find(stop)] and cut["finish_reason"] == "stop"


def test_a_stream_adds_up_to_the_same_text(port):
    status, told = ask(port, "POST", "/v1/completions", GREEDY | {"prompt": "abc", "stream": True})
    events = [line.removeprefix("data: ") for line in told.split("\n\n") if line]
    assert status == 200 and events[-1] == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events[:-1]]
    whole = complete(port, prompt="abc")["choices"][0]["text"]
    assert "".join(c["text"] for c in choices) == whole and len(choices) > 1
    assert [c["finish_reason"] for c in choices][-1] == "length"


def test_megatrons_schema(port):
    body = {"prompts": ["abc", "xy"], "tokens_to_generate": 5, "top_k": 1, "random_seed": 3}
    status, told = ask(port, "PUT", "/api", body)
    answer = json.loads(told)
    assert status == 200 and answer["logprobs"] is None
    assert answer["text"][0].startswith("abc") and answer["text"][1].startswith("xy")
    assert answer["segments"][0][:3] == ["a", "b", "c"] and len(answer["segments"][1]) <= 7
    with_bos = json.loads(ask(port, "PUT", "/api", body | {"add_BOS": True})[1])
    assert with_bos["segments"][0][:2] == [tokenizer.END_OF_TEXT, "a"]


REFUSED = {
    b"{": 400,
    b"[1]": 400,
    b"\xff\xfe": 400,
    b'{"prompt": "' + b"x" * 3000 + b'"}': 413,
    b'{"prompt": "x", "model": "gpt-4"}': 404,
    b'{"prompt": 3.5}': 400,
    b'{"prompt": ["x", 1]}': 400,
    b'{"prompt": []}': 400,
    b'{"prompt": "\\ud800"}': 400,
    b'{"prompt": [[1, 400]]}': 400,
    b'{"prompt": "x", "max_tokens": 100}': 400,
    b'{"prompt": "x", "max_tokens": 0}': 400,
    b'{"prompt": "x", "max_tokens": true}': 400,
    b'{"prompt": "x", "temperature": -1}': 400,
    b'{"prompt": "x", "temperature": NaN}': 400,
    b'{"prompt": "x", "top_p": "high"}': 400,
    b'{"prompt": "x", "n": 5}': 400,
    b'{"prompt": "x", "n": 0}': 400,
    b'{"prompt": "x", "seed": -1}': 400,
    b'{"prompt": "x", "stop": ["a", "b", "c", "d", "e"]}': 400,
    b'{"prompt": "x", "stop": [""]}': 400,
    b'{"prompt": "x", "stream": 1}': 400,
    b'{"prompt": "x", "logprobs": 2}': 400,
    b'{"prompt": "x", "colour": "red"}': 400,
    b'{"prompt": "' + b"x" * 40 + b'"}': 400,
}


@pytest.mark.parametrize("body", REFUSED, ids=range(len(REFUSED)))
def test_a_bad_completion_is_refused_with_a_reason(port, body):
    status, told = ask(port, "POST", "/v1/completions", body)
    assert status == REFUSED[body] and json.loads(told)["error"]["message"]


@pytest.mark.parametrize(
    "body", [b"{", {"prompts": []}, {"prompts": [1]}, {"prompts": ["x"] * 5}, {"prompt": "x"},
             {"prompts": ["x"], "logprobs": True}, {"prompts": ["x"], "tokens_to_generate": 99}]
)  # fmt: skip
def test_a_bad_request_to_megatrons_is_refused(port, body):
    status, told = ask(port, "PUT", "/api", body)
    assert status == 400 and json.loads(told)


def test_an_address_in_use_is_one_clear_error(port):
    with pytest.raises(config.UserError, match=f"--server.port={port} cannot be listened on"):
        serve.run(None, "127.0.0.1", port)


def test_other_methods_and_paths_are_refused(port):
    assert ask(port, "GET", "/v1/completions")[0] == 405
    assert ask(port, "POST", "/api", {})[0] == 405
    assert ask(port, "GET", "/nothing")[0] == 404


def test_a_hundred_requests_at_once_are_answered_or_refused(port):
    expected = complete(port, prompt="abc")["choices"][0]["text"]

    def one(i):
        return ask(port, "POST", "/v1/completions", GREEDY | {"prompt": "abc"})

    with concurrent.futures.ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(one, range(100)))
    statuses = [status for status, _ in answers]
    assert set(statuses) == {200, 503}
    for status, told in answers:
        answer = json.loads(told)
        assert status == 503 or answer["choices"][0]["text"] == expected
    assert complete(port, prompt="abc")["choices"][0]["text"] == expected
