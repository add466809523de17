"""The network that connects GPUs."""

from gpt3jax.hardware import gpus


def test_members_of_a_group_in_one_node_share_their_cards():
    network = gpus.network_of(gpus.GPUS["h100"])
    assert network.bandwidth(8, 8) == ("NVLink", 360e9)
    assert network.bandwidth(16, 1) == ("NIC", 45e9)
    assert network.bandwidth(256, 8) == ("NIC", 360e9)
    assert network.bandwidth(16, 2) == ("NIC", 90e9)
