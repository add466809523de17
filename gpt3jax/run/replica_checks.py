"""Checksums of the parameters' replicas: do devices hold the same bytes where they should?

Silent corruption changes one replica, and later sums over replicas hide it. Each device computes
the checksums of its own shards, so no parameter is moved.
"""

import collections
import functools
import socket
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec

from gpt3jax import errors
from gpt3jax.checkpoint import array_digests
from gpt3jax.model import gpt
from gpt3jax.sharding import layouts

_MOST_ARRAYS, _MOST_DEVICES = 16, 8  # that a message lists


class Difference(NamedTuple):
    """Devices that do not hold the same bytes of a parameter."""

    name: str
    suspects: tuple[int, ...]
    """Places in the mesh of the devices in the minority; of all devices without a majority."""
    n_replicas: int


class Replicas:
    """Compares the replicas of parameters every `interval` steps, and on demand."""

    def __init__(self, mesh: jax.sharding.Mesh, abstract_params: gpt.GPT, interval: int) -> None:
        """Compare nothing yet, and never if the interval is 0 or nothing is replicated."""
        self._mesh = mesh
        names = layouts.array_names(abstract_params)
        leaves = jax.tree.leaves(abstract_params)
        self._sizes = [leaf.size for leaf in leaves]
        groups = [replica_groups(leaf, mesh) for leaf in leaves]
        self._checked = [i for i, group in enumerate(groups) if len(group[0]) > 1]
        self._names = [names[i] for i in self._checked]
        self._groups = [groups[i] for i in self._checked]
        self._interval = interval if self._checked else 0
        self._is_wanted = interval > 0 and mesh.size > 1
        self._specs = [leaves[i].sharding.spec for i in self._checked]
        self._pending: tuple[int, jax.Array] | None = None
        self.last_good: int | None = None
        """The last step after which replicas were equal."""

    def describe(self) -> list[str]:
        """Return a line on which share of the parameters is compared, and when."""
        if not self._is_wanted:
            return []
        if not self._interval:
            return ["no parameter has a replica on this mesh: there are none to compare"]
        share = sum(self._sizes[i] for i in self._checked) / sum(self._sizes)
        return [
            f"replicas of {len(self._checked)} of {len(self._sizes)} parameter arrays ({share:.1%} "
            f"of the parameters) are compared every {self._interval} steps and before each save"
        ]

    def after_step(self, step_number: int, params: gpt.GPT) -> None:
        """Finish the comparison under way, and start another if it is due.

        Raises:
            TransientError: replicas differ.
        """
        self.finish()
        if self._interval and step_number % self._interval == 0:
            self._pending = step_number, self._sums(params)
            if jax.default_backend() == "cpu":
                self.finish()  # emulated devices may run two programs' collectives in any order

    def check(self, step_number: int, params: gpt.GPT) -> None:
        """Compare now.

        Raises:
            TransientError: replicas differ.
        """
        self.finish()
        if self._interval and self.last_good != step_number:
            self._pending = step_number, self._sums(params)
            self.finish()

    def finish(self) -> None:
        """Wait for a comparison under way.

        Raises:
            TransientError: replicas differ.
        """
        if self._pending is None:
            return
        (step_number, sums), self._pending = self._pending, None
        different = differences(np.asarray(sums), self._groups, self._names)
        if different:
            raise errors.TransientError(
                self._message(step_number, different), page="numerical_faults.md#comparing-replicas"
            )
        self.last_good = step_number

    def _sums(self, params: gpt.GPT) -> jax.Array:
        leaves = jax.tree.leaves(params)
        with jax.set_mesh(self._mesh):
            return _checksums([leaves[i] for i in self._checked], tuple(self._specs))

    def _message(self, step_number: int, different: Sequence[Difference]) -> str:
        devices, hosts = self._mesh.devices.flat, _host_names()
        lines = []
        for name, suspects, n_replicas in different[:_MOST_ARRAYS]:
            which = "differs from the majority"
            if len(suspects) == n_replicas:
                which = "replicas differ without a majority"
            where = "; ".join(_place(devices[i], hosts) for i in suspects[:_MOST_DEVICES])
            lines.append(f"  {name} ({n_replicas} replicas): {which}: {where}")
        if len(different) > _MOST_ARRAYS:
            lines.append(f"  and {len(different) - _MOST_ARRAYS} more")
        since = "the start" if self.last_good is None else f"step {self.last_good}"
        return (
            f"after step {step_number} replicas of parameters differ, which were equal at {since}: "
            "a device computes or remembers wrongly\n" + "\n".join(lines) + "\n"
            "checkpoints are good: replicas are compared before each save. Start again from the "
            "newest, without the device or its host"
        )


def replica_groups(
    leaf: jax.Array | jax.ShapeDtypeStruct, mesh: jax.sharding.Mesh
) -> list[list[int]]:
    """Return the places in the mesh of the devices that hold each part of an array."""
    index = leaf.sharding.devices_indices_map(leaf.shape)
    groups: dict[tuple[tuple[int, int, int], ...], list[int]] = collections.defaultdict(list)
    for place, device in enumerate(mesh.devices.flat):
        part = tuple(s.indices(n) for s, n in zip(index[device], leaf.shape, strict=True))
        groups[part].append(place)
    return list(groups.values())


def differences(
    sums: np.ndarray, groups: Sequence[list[list[int]]], names: Sequence[str]
) -> list[Difference]:
    """Return what differs, from checksums `[devices, arrays, 2]` and the groups of each array."""
    different = []
    for i, (name, of_array) in enumerate(zip(names, groups, strict=True)):
        for places in of_array:
            values = [tuple(sums[place, i].tolist()) for place in places]
            [(most, count), *others] = collections.Counter(values).most_common()
            if not others:
                continue
            majority = count > len(places) / 2
            suspects = [p for p, v in zip(places, values, strict=True) if v != most or not majority]
            different.append(Difference(name, tuple(suspects), len(places)))
    return different


@functools.partial(jax.jit, static_argnums=1)
def _checksums(leaves: list[jax.Array], specs: tuple[PartitionSpec, ...]) -> jax.Array:
    """Return uint32 `[devices, arrays, 2]` on every device: checksums of what each holds."""
    mesh = jax.sharding.get_abstract_mesh()

    def local(parts: list[jax.Array]) -> jax.Array:
        sums = jnp.stack([array_digests.digest(part) for part in parts])
        return jax.lax.all_gather(sums, mesh.axis_names)

    gathered = jax.shard_map(
        local, in_specs=(list(specs),), out_specs=PartitionSpec(), check_vma=False
    )
    return gathered(leaves)


def _place(device: jax.Device, hosts: Sequence[str]) -> str:
    process = device.process_index
    return f"process {process} on host {hosts[process]}, device {device}"


def _host_names() -> list[str]:
    """Return the name of each process's host.

    A collective: all processes come here, because all see the same checksums.
    """
    own_name = socket.gethostname()
    if jax.process_count() == 1:
        return [own_name]
    padded = np.frombuffer(own_name.encode()[:64].ljust(64), np.uint8)
    return [bytes(row).decode().strip() for row in multihost_utils.process_allgather(padded)]
