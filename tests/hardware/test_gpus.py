"""Which GPU is here, and the network that connects GPUs."""

import pytest

from gpt3jax.hardware import gpus


def test_members_of_a_group_in_one_node_share_their_cards():
    network = gpus.network_of(gpus.GPUS["h100"])
    assert network.bandwidth(8, 8) == ("NVLink", 360e9)
    assert network.bandwidth(16, 1) == ("NIC", 45e9)
    assert network.bandwidth(256, 8) == ("NIC", 360e9)
    assert network.bandwidth(16, 2) == ("NIC", 90e9)


@pytest.mark.parametrize(
    ("name", "capability", "expected"),
    [
        ("NVIDIA H200", (9, 0), "h200"),  # as its driver names it
        ("NVIDIA H200 141GB HBM3e", (9, 0), "h200"),
        ("NVIDIA H100 80GB HBM3", (9, 0), "h100"),
        ("NVIDIA A100-SXM4-80GB", (8, 0), "a100"),
        ("NVIDIA GB200", (10, 0), "b200"),
        ("NVIDIA GH200 480GB", (9, 0), "h100"),
        ("NVIDIA L40S", (8, 9), "a100"),
        ("cpu", None, "a100"),
    ],
)
def test_a_gpu_is_known_by_its_drivers_name_or_taken_for_one_like_it(name, capability, expected):
    assert gpus.like(name, capability) is gpus.GPUS[expected]
