"""In a large run one process of each node speaks for it; the others still can if it is gone."""

import json
import os
import secrets
import subprocess
import sys
import time

import jax
import pytest

from gpt3jax.checkpoint import storage
from gpt3jax.distributed import messages, node_speaker
from gpt3jax.watch import phases, stragglers

import corpus


@pytest.fixture
def node_of():
    """Return a function that makes a node; a process keeps its node to its end, a test does not."""
    made = []

    def make(run):
        made.append(node_speaker.Node(run))
        return made[-1]

    yield make
    for node in made:
        node._socket.close()


def wait_for(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_first_of_a_node_speaks_and_hears_the_others(node_of):
    run = secrets.token_hex(8)
    first, second, third = (node_of(run) for _ in range(3))
    assert [n.speaks for n in (first, second, third)] == [True, False, False]
    assert node_of(secrets.token_hex(8)).speaks, "another run on the same machine"
    assert second.tell("2") and third.tell("3")
    heard = []
    wait_for(lambda: heard.extend(first.told()) or len(heard) == 2)
    assert heard == ["2", "3"] and first.told() == []


TAKES_NOTHING = """
import sys, time
from gpt3jax.distributed import node_speaker
node_speaker.Node._listen = lambda self: None
node = node_speaker.Node(sys.argv[1])
print("ready", flush=True)
time.sleep(100)
"""


def test_a_process_notices_when_the_one_that_speaks_hangs_or_is_gone(node_of):
    run = secrets.token_hex(8)
    speaker = subprocess.Popen(
        [sys.executable, "-c", TAKES_NOTHING, run], stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(corpus.REPOSITORY)},
    )  # fmt: skip
    with speaker:
        assert speaker.stdout.readline() == b"ready\n"
        node = node_of(run)
        assert not node.speaks
        assert not all(node.tell("text") for _ in range(10_000)), "its socket is full"
        speaker.kill()
    assert not node.tell("text")


class Board:
    """What all processes of a run post; two of them read it."""

    def __init__(self, monkeypatch):
        self.posts, self.n_posts = {}, 0
        monkeypatch.setattr(messages, "post", self.post)
        monkeypatch.setattr(messages, "posted", lambda folder: self.posts)

    def post(self, name, text):
        """Keep a text."""
        self.posts[name.removeprefix("peers/")] = text
        self.n_posts += 1


def test_the_posts_of_a_node_are_one(monkeypatch, node_of):
    board, run = Board(monkeypatch), secrets.token_hex(8)
    peers, clocks = [], [phases.Phases() for _ in range(8)]
    for i, clock in enumerate(clocks):
        node = node_of(f"{run}/{i // 4}")
        peers.append(stragglers.Peers(clock, i, 8, 1000.0, node))
    for number in range(1, 4):
        for i, clock in enumerate(clocks):
            clock.stepped(number + (i == 6))
        for i in reversed(range(8)):
            speaker = peers[i - i % 4]._node
            if i % 4 == 0:
                wait_for(lambda node=speaker: len(node._texts) == 3)
            peers[i].exchange()
    assert board.n_posts == 3 * 2 and set(board.posts) == {"0", "4"}
    peers[0].exchange()
    assert {i: post.doing.step for i, post in peers[0]._posts.items()} == {
        i: 4 if i == 6 else 3 for i in range(8)
    }


def test_an_old_post_does_not_replace_a_new_one(monkeypatch):
    """A process posted by itself while the one that speaks did not answer."""
    board = Board(monkeypatch)
    doing = [0, phases.HOST, 1.0]
    board.posts = {
        "4": json.dumps({"4": ["b", doing, None, 7], "5": ["b", doing, None, 9]}),
        "5": json.dumps({"5": ["b", doing, None, 3]}),
    }
    reader = stragglers.Peers(phases.Phases(), 0, 8, 1000.0)
    for _ in range(2):
        reader.exchange()
        assert reader._posts[5].number == 9


@pytest.mark.parametrize("speaks", [True, False])
def test_one_process_of_a_node_tries_the_store_before_a_save(tmp_path, monkeypatch, speaks):
    store, answers = storage.Checkpoints(str(tmp_path)), []
    monkeypatch.setattr(jax, "process_count", lambda: 2048)
    monkeypatch.setattr(messages, "on_any_process", lambda answer: answers.append(answer))
    monkeypatch.setattr(node_speaker, "speaks", lambda: speaks)
    (tmp_path / "write-test-0").write_text("a file is in the way")
    assert bool(store._unwritable()) == speaks and answers == [speaks]
