"""Generation over HTTP: both schemas, limits, and many requests at once."""

import concurrent.futures
import contextlib
import http.client
import json
import socket
import threading
import time

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from gpt3jax import errors
from gpt3jax.data import tokenizer, tokenizer_sources, tokenizer_training
from gpt3jax.model import gpt
from gpt3jax.sample import generate, generation_job, megatron_api, openai_api

import tiny

uvicorn = pytest.importorskip("uvicorn")
http_server = pytest.importorskip("gpt3jax.sample.http_server")

LIMITS = generation_job.Limits(max_rows=4, max_queue=3, max_body_bytes=2000)
GREEDY = {"temperature": 0, "max_tokens": 9, "ignore_eos": True}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    tokenizer_training.train(["no merges"], 257, *files)
    return tokenizer_sources.from_files(*files)


CFG = tiny.make_config(model={"n_layers": 1, "vocab_size": 257, "init_std": 0.3}).model


@pytest.fixture(scope="module")
def params():
    return gpt.GPT(CFG, jax.random.key(0))


@contextlib.contextmanager
def serving(generator, text):
    """Serve in a thread, and yield the port."""
    before = set(threading.enumerate())
    served = generation_job.ServedModel(
        generator=generator, tokenizer=text, name="tiny", limits=LIMITS
    )
    app = http_server.make_app(served)
    [answering] = set(threading.enumerate()) - before
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(timeout=30)
    assert not thread.is_alive() and not answering.is_alive()


@pytest.fixture(scope="module")
def port(params, text):
    """Serve random weights."""
    copy = jax.tree.map(jnp.copy, params)  # its arrays are given up
    mesh = tiny.one_device_mesh()
    with serving(generate.Generator(copy, gpt.Compute(), mesh, text.eod_id), text) as port:
        yield port


class Letters(generate.Generator):
    """Gives one letter after another without a network, and counts them."""

    def __init__(self, eod_id, seconds, tokens=range(65, 91)):
        self.model, self.eod_id, self._seconds, self._tokens = CFG, eod_id, seconds, tokens
        self.n_steps = 0

    def steps(self, rows, *, scored):  # noqa: D102
        limits = [self.limit(row.prompt, row.options) for row in rows]
        for i in range(max(limits)):
            self.n_steps += 1
            time.sleep(self._seconds)
            tokens = [
                [self._tokens[i % len(self._tokens)]] if i < limit else [] for limit in limits
            ]
            scores = [[SCORE] * len(t) if scored else [] for t in tokens]
            yield generate.Step(tokens, scores)

    def score(self, prompts):  # noqa: D102
        return [[SCORE] * (len(prompt) - 1) for prompt in prompts]


SCORE = generate.Score(-1.5, tuple((i, -float(i)) for i in range(5)))


@pytest.fixture(scope="module")
def letters_port(text):
    with serving(Letters(text.eod_id, 0), text) as port:
        yield port


def ask(port, method, path, body=None):
    """Return the status and the answer's text."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    sent = body if isinstance(body, bytes | None) else json.dumps(body)
    connection.request(method, path, sent, {"Content-Type": "application/json"})
    response = connection.getresponse()
    content = response.read().decode()
    connection.close()
    return response.status, content


def complete(port, **fields):
    status, content = ask(port, "POST", "/v1/completions", GREEDY | fields)
    assert status == 200, content
    return json.loads(content)


def test_the_model_is_named(port):
    assert ask(port, "GET", "/health") == (200, '{"status":"ok"}')
    models = json.loads(ask(port, "GET", "/v1/models")[1])
    assert [entry["id"] for entry in models["data"]] == ["tiny"]
    assert json.loads(ask(port, "GET", "/v1/models/tiny")[1]) == models["data"][0]
    status, content = ask(port, "GET", "/v1/models/gpt-4")
    assert status == 404 and json.loads(content)["error"]["code"] == "model_not_found"


def test_completions_of_a_text_a_list_and_tokens(port, text):
    answer = complete(port, model="tiny", prompt="abc")
    choice = answer["choices"][0]
    assert answer["object"] == "text_completion" and choice["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 9, "total_tokens": 12}
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
    status, content = ask(
        port, "POST", "/v1/completions", GREEDY | {"prompt": "abc", "stream": True}
    )
    events = [line.removeprefix("data: ") for line in content.split("\n\n") if line]
    assert status == 200 and events[-1] == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events[:-1]]
    whole = complete(port, prompt="abc")["choices"][0]["text"]
    assert "".join(c["text"] for c in choices) == whole and len(choices) > 1
    assert [c["finish_reason"] for c in choices][-1] == "length"


def events(port, **fields):
    status, content = ask(port, "POST", "/v1/completions", GREEDY | {"stream": True} | fields)
    *parts, last = [line.removeprefix("data: ") for line in content.split("\n\n") if line]
    assert status == 200 and last == "[DONE]"
    return [json.loads(part) for part in parts]


@pytest.mark.parametrize("max_tokens", [9, 0])
def test_a_stream_says_all_that_the_whole_answer_does(port, max_tokens):
    fields = {"prompt": ["abc", "xy"], "max_tokens": max_tokens, "echo": True, "logprobs": 2}
    *parts, last = events(port, stream_options={"include_usage": True}, **fields)
    whole = complete(port, **fields)
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert all(part["usage"] is None for part in parts)
    for row in whole["choices"]:
        choices = [c for part in parts for c in part["choices"] if c["index"] == row["index"]]
        assert "".join(c["text"] for c in choices) == row["text"]
        assert [c["finish_reason"] for c in choices if c["finish_reason"]] == ["length"]
        for name, values in row["logprobs"].items():
            assert [v for c in choices for v in c["logprobs"][name]] == values
            assert len(values) == len(fields["prompt"][row["index"]]) + max_tokens


@pytest.mark.parametrize("echo", [True, False])
@pytest.mark.parametrize("n_likeliest", [0, 1, 5])
def test_logprobs_are_the_training_networks(port, params, text, echo, n_likeliest):
    """Echoed with max_tokens 0 and 1, as lm-eval's client asks for them, and without echo."""
    ids = text.encode("Friends, Romans")
    asked = {"prompt": ids, "echo": echo, "logprobs": n_likeliest}
    for max_tokens in (0, 1, 6):
        choice = complete(port, max_tokens=max_tokens, **asked)["choices"][0]
        logprobs = choice["logprobs"]
        assert {len(v) for v in logprobs.values()} == {len(ids) * echo + max_tokens}
        shown = [token_of(text, name) for name in logprobs["tokens"]]
        whole = shown if echo else ids + shown
        assert whole[: len(ids)] == ids
        expected = log_softmax(params, whole)
        n_first = 1 if echo else len(ids)
        if echo:
            assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
        for i in range(n_first, len(whole)):
            place = i if echo else i - len(ids)
            own, top = logprobs["token_logprobs"][place], logprobs["top_logprobs"][place]
            np.testing.assert_allclose(own, expected[i - 1, whole[i]], atol=1e-4)
            likeliest = {*np.argsort(-expected[i - 1])[:n_likeliest].tolist(), whole[i]}
            assert {token_of(text, name) for name in top} == likeliest
            assert own in top.values()
        for offset, name in zip(logprobs["text_offset"], logprobs["tokens"], strict=True):
            if not name.startswith("token_id:"):
                assert choice["text"][offset:].lstrip("\ufffd").startswith(name)


def token_of(text, name):
    if name.startswith("token_id:"):
        return int(name.removeprefix("token_id:"))
    return text.eod_id if name == tokenizer.END_OF_TEXT else text.encode(name)[0]


def log_softmax(params, ids):
    x_BTD = params(jnp.asarray([ids]), jnp.arange(len(ids))[None])
    return np.asarray(jax.nn.log_softmax((x_BTD[0] @ params.embedding_VD[...].T)[:, :257]))


def test_nothing_is_generated_where_nothing_is_asked_for(port):
    answer = complete(port, prompt=["abc", ""], max_tokens=0, echo=True)
    assert [c["text"] for c in answer["choices"]] == ["abc", ""]
    assert [c["finish_reason"] for c in answer["choices"]] == ["length"] * 2
    assert answer["usage"]["completion_tokens"] == 0
    assert complete(port, prompt="x" * 32, max_tokens=0)["choices"][0]["text"] == ""


@pytest.mark.parametrize("seed", [-1, 2**63, -(2**70), 0])
def test_any_integer_is_a_seed(port, seed):
    asked = {"prompt": "abc", "temperature": 2, "seed": seed}
    first, again = (complete(port, **asked)["choices"][0]["text"] for _ in range(2))
    assert first == again != complete(port, **asked | {"seed": seed + 1})["choices"][0]["text"]


def test_tokens_after_a_stop_are_not_counted(letters_port):
    answer = complete(letters_port, prompt="a", max_tokens=20, stop=[*"zyxwvut", "bcX", "de"])
    assert answer["choices"][0]["text"] == "abc"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == len("abcde")


def test_fields_without_effect_are_accepted(letters_port):
    neutral = {
        "model": "tiny", "best_of": 2, "n": 2, "suffix": "", "logit_bias": {}, "user": "me",
        "presence_penalty": 0.0, "frequency_penalty": 0, "stop": None, "stream_options": None,
        "seed": None, "logprobs": None, "top_p": 1,
    }  # fmt: skip
    assert len(complete(letters_port, prompt="a", **neutral)["choices"]) == 2


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/completions stream", "/api"])
def test_a_client_that_goes_away_holds_nothing_up(text, path):
    """Nor does one that went before its turn, or before the first token."""
    generator = Letters(text.eod_id, 0.05)
    path, _, stream = path.partition(" ")
    body = {"prompt": "a", "max_tokens": 30, "ignore_eos": True, "stream": bool(stream)}
    if path == "/api":
        body = {"prompts": ["a"], "tokens_to_generate": 30}
    content = json.dumps(body).encode()
    verb = "PUT" if path == "/api" else "POST"
    head = f"{verb} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    with serving(generator, text) as port:
        for seconds in (0, 0.1, 0):
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(head.encode() + content)
                time.sleep(seconds)
        assert complete(port, prompt="a", max_tokens=1)["choices"][0]["text"] == "a"
    assert generator.n_steps < 30


def test_a_short_answer_does_not_wait_for_a_long_one(text):
    """Both are in one batch."""
    generator = Letters(text.eod_id, 0.02)
    with serving(generator, text) as port, concurrent.futures.ThreadPoolExecutor(3) as pool:
        pool.submit(complete, port, prompt="a", max_tokens=20)  # the others wait together
        time.sleep(0.1)
        long = pool.submit(complete, port, prompt="a", max_tokens=30)
        pool.submit(complete, port, prompt="a", max_tokens=2).result()
        assert not long.done()


def test_the_space_after_the_prompt_is_in_the_text():
    """By a tokenizer of SentencePiece's kind, whose words begin with their space."""
    words = {tokenizer.END_OF_TEXT: 0, "\u2581the": 1, "\u2581cat": 2, "\u2581sat": 3}
    rust = tokenizers.Tokenizer(models.WordLevel(words, unk_token=tokenizer.END_OF_TEXT))
    rust.pre_tokenizer, rust.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    text = tokenizer.Tokenizer(rust, tokenizer.END_OF_TEXT, splits_at_blanks=False)
    with serving(Letters(0, 0, [3, 1]), text) as port:
        for prompt in ("the cat", [1, 2]):
            asked = {"prompt": prompt, "max_tokens": 2}
            assert complete(port, **asked)["choices"][0]["text"] == " sat the"
            parts = events(port, echo=True, **asked)
            assert "".join(p["choices"][0]["text"] for p in parts) == "the cat sat the"
        body = {"prompts": ["the cat"], "tokens_to_generate": 1}
        answer = json.loads(ask(port, "PUT", "/api", body)[1])
    assert answer["text"] == ["the cat sat"]
    assert answer["segments"] == [["the", " cat", " sat"]]


def test_megatrons_schema(port):
    body = {"prompts": ["abc", "xy"], "tokens_to_generate": 5, "top_k": 1, "random_seed": 3}
    status, content = ask(port, "PUT", "/api", body)
    answer = json.loads(content)
    assert status == 200 and answer["logprobs"] is None
    assert answer["text"][0].startswith("abc") and answer["text"][1].startswith("xy")
    assert answer["segments"][0][:3] == ["a", "b", "c"] and len(answer["segments"][1]) <= 7
    assert "".join(answer["segments"][0]) == answer["text"][0]
    with_bos = json.loads(ask(port, "PUT", "/api", body | {"add_BOS": True})[1])
    assert with_bos["segments"][0][:2] == [tokenizer.END_OF_TEXT, "a"]


def test_megatrons_logprobs_begin_with_the_second_token(port, params, text):
    body = {"prompts": ["abc", "xy"], "logprobs": True, "top_k": 1, "add_BOS": True}
    for n in (0, 4):
        answer = json.loads(ask(port, "PUT", "/api", body | {"tokens_to_generate": n})[1])
        for prompt, shown, logprobs in zip(
            body["prompts"], answer["text"], answer["logprobs"], strict=True
        ):
            ids = [text.eod_id, *text.encode(prompt)]
            assert len(logprobs) <= len(ids) - 1 + n and shown.startswith(prompt)
            expected = log_softmax(params, ids)[range(len(ids) - 1), ids[1:]]
            np.testing.assert_allclose(logprobs[: len(ids) - 1], expected, atol=1e-4)


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
    b'{"prompt": "x", "max_tokens": true}': 400,
    b'{"prompt": "x", "temperature": -1}': 400,
    b'{"prompt": "x", "temperature": NaN}': 400,
    b'{"prompt": "x", "top_p": "high"}': 400,
    b'{"prompt": "x", "n": 5}': 400,
    b'{"prompt": "x", "n": 0}': 400,
    b'{"prompt": "x", "stop": [""]}': 400,
    b'{"prompt": "x", "stream": 1}': 400,
    b'{"prompt": "x", "colour": "red"}': 400,
    b'{"prompt": "x", "\\ud800": 1}': 400,
    b"": 400,
    b"[" * 1999: 400,
    b'{"prompt": [-1]}': 400,
    b'{"prompt": [4294967296, 18446744073709551616]}': 400,
    b'{"prompt": [[1], []]}': 400,
    b'{"prompt": "x", "max_tokens": -1}': 400,
    b'{"prompt": "x", "max_tokens": 1' + b"0" * 400 + b"}": 400,
    b'{"prompt": "x", "temperature": 1' + b"0" * 400 + b"}": 400,
    b'{"prompt": "x", "temperature": 1e999}': 400,
    b'{"prompt": "x", "n": 1' + b"0" * 400 + b"}": 400,
    b'{"prompt": "x", "top_k": 4294967296}': 400,
    b'{"prompt": "x", "stop": [' + b'"a",' * 64 + b'"b"]}': 400,
    b'{"prompt": "x", "stop": 0}': 400,
    b'{"prompt": "x", "logprobs": 6}': 400,
    b'{"prompt": "x", "logprobs": -1}': 400,
    b'{"prompt": "x", "logprobs": true}': 400,
    b'{"prompt": "x", "best_of": 2}': 400,
    b'{"prompt": "x", "suffix": "y"}': 400,
    b'{"prompt": "x", "logit_bias": {"5": 1}}': 400,
    b'{"prompt": "x", "presence_penalty": 0.5}': 400,
    b'{"prompt": "x", "frequency_penalty": false}': 400,
    b'{"prompt": "x", "user": 5}': 400,
    b'{"prompt": "x", "model": 5}': 400,
    b'{"prompt": "x", "stream_options": {"include_usage": true}}': 400,
    b'{"prompt": "x", "stream": true, "stream_options": [1]}': 400,
    b'{"prompt": "x", "stream": true, "stream_options": {"include_usage": 1}}': 400,
    b'{"prompt": "' + b"x" * 40 + b'"}': 400,
}


@pytest.mark.parametrize("body", REFUSED, ids=range(len(REFUSED)))
def test_a_bad_completion_is_refused_with_a_reason(port, body):
    status, content = ask(port, "POST", "/v1/completions", body)
    assert status == REFUSED[body]
    check_error(content)
    if status == 400 and body.startswith(b'{"prompt": '):
        fields = json.loads(body).keys() | {r"\ud800", "include_usage"}
        assert json.loads(content)["error"]["param"] in fields


def check_error(content):
    """Check that it is OpenAI's body of an error."""
    error = json.loads(content)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"] and error["type"] == "invalid_request_error"


def test_a_body_far_beyond_the_limit_is_refused_and_read_to_its_end(port):
    status, content = ask(port, "POST", "/v1/completions", b"x" * 20_000_000)
    assert status == 413
    check_error(content)


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
VALUES = {
    "prompt": st.lists(st.integers(-2, 260), max_size=40) | st.lists(st.text(), max_size=3),
    "prompts": st.lists(st.text(), max_size=5),
    "stop": st.text() | st.lists(st.text(), max_size=70),
    "model": st.just("tiny"),
    "stream_options": st.fixed_dictionaries({"include_usage": ANY_JSON}),
}
NUMBERS = st.integers(-2, 40) | st.integers() | st.floats() | st.booleans()


def bodies(fields):
    known = {name: VALUES.get(name, NUMBERS) | ANY_JSON for name in sorted(fields)}
    return st.fixed_dictionaries({}, optional=known) | st.dictionaries(st.text(), ANY_JSON)


@pytest.mark.parametrize(
    ("method", "path", "fields", "needed"),
    [
        ("POST", "/v1/completions", openai_api.FIELDS, {"max_tokens": 3}),
        ("PUT", "/api", megatron_api.FIELDS, {"prompts": ["a"], "tokens_to_generate": 3}),
    ],
)
@hypothesis.given(data=st.data())
@hypothesis.settings(deadline=None, max_examples=150)
def test_any_body_is_answered_or_refused(letters_port, method, path, fields, needed, data):
    """Also one field at a time, as else nearly all are refused."""
    if data.draw(st.booleans()):
        body = data.draw(bodies(fields))
    else:
        name = data.draw(st.sampled_from(sorted(fields)))
        body = needed | {name: data.draw(VALUES.get(name, NUMBERS) | ANY_JSON)}
    status, content = ask(letters_port, method, path, body)
    if status != 200:
        assert 400 <= status < 500, (status, content)
        error = json.loads(content)["error"]
        assert error["message"] and error["type"] == "invalid_request_error"
    elif not content.startswith("data: "):
        assert json.loads(content)
    else:
        assert content.endswith("data: [DONE]\n\n") and '"error"' not in content


@pytest.mark.parametrize(
    "body",
    [
        b"{", b"", {"prompts": []}, {"prompts": [1]}, {"prompts": "x"}, {"prompts": [[1, 2]]},
        {"prompts": ["x"] * 5}, {"prompt": "x"}, {"prompts": ["x"], "logprobs": 1},
        {"prompts": ["x"], "tokens_to_generate": 99}, {"prompts": ["x"], "tokens_to_generate": -1},
        {"prompts": ["x"], "tokens_to_generate": 10**400}, {"prompts": ["x"], "top_k": -1},
        {"prompts": ["x"], "temperature": 10**400}, {"prompts": ["\ud800"]},
        {"prompts": ["x"], "random_seed": 1.5}, {"prompts": ["x"], "top_p": -0.5},
    ],
    ids=str,
)  # fmt: skip
def test_a_bad_request_to_megatrons_is_refused(port, body):
    status, content = ask(port, "PUT", "/api", body)
    answer = json.loads(content)
    assert status == 400 and answer["message"] == answer["error"]["message"]


def test_an_address_in_use_is_one_clear_error(port):
    with pytest.raises(errors.UserError, match=f"--server.port={port} cannot be listened on"):
        http_server.run(None, "127.0.0.1", port)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/completions", 405), ("POST", "/api", 405), ("POST", "/v1/models", 405),
        ("DELETE", "/v1/models/tiny", 405), ("GET", "/nothing", 404), ("GET", "//[", 404),
        ("POST", "/v1/chat/completions", 404), ("GET", "/v1/models/%ff%00", 404),
    ],
)  # fmt: skip
def test_other_methods_and_paths_are_refused(port, method, path, status):
    answered, content = ask(port, method, path)
    assert answered == status
    check_error(content)


def test_a_hundred_requests_at_once_are_answered_or_refused(port):
    expected = complete(port, prompt="abc")["choices"][0]["text"]

    def ask_once(i):
        return ask(port, "POST", "/v1/completions", GREEDY | {"prompt": "abc"})

    with concurrent.futures.ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(ask_once, range(100)))
    statuses = [status for status, _ in answers]
    assert set(statuses) == {200, 503}
    for status, content in answers:
        answer = json.loads(content)
        assert status == 503 or answer["choices"][0]["text"] == expected
    assert complete(port, prompt="abc")["choices"][0]["text"] == expected
