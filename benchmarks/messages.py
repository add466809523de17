"""Count the messages and bytes that the coordination service gets, by the number of processes.

    python benchmarks/messages.py --processes 64 1024 16384

The code of the checks before a run, and of the posts in its course, runs for every process, each in
a thread, against a service that counts. Nothing of JAX is asked. A message is a request of a
process; its bytes are those of keys and texts, either way. Files are those that processes ask a
shared disk for: sources, corpus, folders.
"""

import argparse
import collections
import sys
import threading

from gpt3jax.config import schema
from gpt3jax.distributed import messages, node_speaker
from gpt3jax.preflight import across_processes, process_facts
from gpt3jax.watch import phases, stragglers

PER_NODE = 8
EVERY = 10.0  # seconds between two posts
_of_host = process_facts.of_host
_here = threading.local()  # .process: the number of the process whose code a thread runs


class Service:
    """What JAX's client does, for all processes, with a count."""

    def __init__(self):
        self._texts, self._there = {}, collections.defaultdict(threading.Event)
        self._folders = collections.defaultdict(dict)
        self._lock = threading.Lock()
        self.n_messages, self.n_bytes = 0, 0

    def _count(self, *texts):
        with self._lock:
            self.n_messages += 1
            self.n_bytes += sum(map(len, texts))

    def key_value_set(self, key, text, allow_overwrite=False):
        """Keep a text."""
        self._count(key, text)
        with self._lock:
            assert allow_overwrite or key not in self._texts, key
            self._texts[key] = text
            self._folders[key.rpartition("/")[0]][key] = text
            event = self._there[key]
        event.set()

    def blocking_key_value_get(self, key, milliseconds):
        """Return a text once it is there."""
        with self._lock:
            event = self._there[key]
        assert event.wait(600), key
        self._count(key, self._texts[key])
        return self._texts[key]

    def key_value_dir_get(self, prefix):
        """Return all texts of a folder, with their keys."""
        with self._lock:
            entries = list(self._folders[prefix.removesuffix("/")].items())
        self._count(prefix, *(text for entry in entries for text in entry))
        return entries


def before_a_run(n):
    """Return the messages, bytes and looks at files of the checks that need no device."""
    service, looks = _service_of(n), collections.Counter()
    facts = _facts_here()

    def of_host(cfg, token, *, first, with_files=True):
        looks["processes"] += with_files
        without = dict.fromkeys(process_facts.OF_FILES) if not with_files else {}
        return {**facts, "folders": {}, **without}

    node_speaker.speaks = lambda: n < node_speaker.LARGE or _here.process % PER_NODE == 0
    process_facts.of_host = of_host
    process_facts.devices = lambda: {process_facts.N_DEVICES: "1", process_facts.KIND: "H100"}
    process_facts.plant = lambda cfg, token: ([], {})
    process_facts.host = lambda: f"node{_here.process // PER_NODE:05}"
    failures = []

    def run(process):
        _here.process = process
        try:
            session = across_processes.Session(_config())
            session.on_hosts()
            session.on_devices()
        except BaseException as error:
            failures.append(error)
            raise

    _in_threads(run, n)
    assert not failures
    return service.n_messages, service.n_bytes, looks["processes"]


def in_its_course(n):
    """Return the messages and bytes a second of the posts, in a run that goes on."""
    service = _service_of(n)
    clock, is_large, peers = phases.Phases(), n >= node_speaker.LARGE, []
    for i in range(n):
        if i % PER_NODE == 0:
            speaker = _Speaker()
        node = speaker if i % PER_NODE == 0 else _Member(speaker)
        peers.append(stragglers.Peers(clock, i, n, EVERY, node if is_large else None))
    for i in reversed(range(n)):  # members first, so that the one that speaks has theirs
        peers[i].exchange()
    return service.n_messages / EVERY, service.n_bytes / EVERY


class _Speaker:
    """Stands for the node of a process that speaks for it."""

    speaks = True

    def __init__(self):
        self.texts = []

    def told(self):
        """Return the texts since the last call."""
        texts, self.texts = self.texts, []
        return texts


class _Member:
    """Stands for the node of another of its processes."""

    speaks = False

    def __init__(self, speaker):
        self._speaker = speaker

    def tell(self, text):
        """Give a text to the speaker."""
        self._speaker.texts.append(text)
        return True


def _service_of(n):
    service = Service()
    messages._client = lambda: service
    messages.process = lambda: (_here.process, n)
    return service


def _config():
    return schema.Config(
        model=schema.Model(n_layers=96, d_model=12288, n_heads=96, seq_len=2048),
        optimizer=schema.Optimizer(peak_lr=6e-5),
        batch=schema.Batch(global_batch_size=1536),
    )


def _facts_here():
    facts = _of_host(_config(), "", first=True)
    prints = [(f"/data/part{i}.bin", f"1,234,567,890 bytes, digest {i:012x}") for i in range(16)]
    corpus = dict(prints)
    return {**facts, "corpus": corpus}


def _in_threads(function, n):
    threading.stack_size(256 << 10)
    threads = [threading.Thread(target=function, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def parse(args):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[64, 1024, 16384])
    return parser.parse_args(args)


def main(args):
    given = parse(args)
    print(f"{'':9}  {'checks before a run':^35}  {'posts in its course':^21}")
    print("processes     messages       MB  look at files  messages/s       kB/s")
    for n in given.processes:
        n_messages, n_bytes, looks = before_a_run(n)
        rate, byte_rate = in_its_course(n)
        print(
            f"{n:9,}  {n_messages:11,}  {n_bytes / 1e6:7.1f}  {looks:13,}  {rate:10,.1f}  "
            f"{byte_rate / 1e3:9,.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
