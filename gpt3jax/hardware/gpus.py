"""Facts about GPUs and the networks between them, and the text that describes a GPU to XLA.

Imports no JAX. Achieved bandwidths are assumptions, and marked so, but for `MEASURED`. All other
figures are from data sheets or from XLA's own target descriptions (openxla/xla,
xla/backends/gpu/target_config/specs, commit 4336d12e, B200: 300ec95a).
"""

import dataclasses
import math
import re

from gpt3jax import errors

# The version of cuDNN that a run has: pip's for jax[cuda13] at the time of writing.
CUDNN = (9, 28, 1)

# XLA's PrimitiveType numbers (xla_data.proto).
_TYPES = {
    "s8": 2, "s32": 4, "u8": 6, "u32": 8, "f16": 10, "f32": 11, "f64": 12, "bf16": 16,
    "f8e5m2": 19, "f8e4m3fn": 20,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU."""

    name: str
    """CUDA's device name, by which XLA picks cost constants, and `flops` the peak."""
    capability: tuple[int, int]
    """Compute capability."""
    accelerated: bool
    """Whether to compile for architecture-specific features (sm_90a, sm_100a)."""
    n_cores: int
    """Streaming multiprocessors."""
    fp32_per_core: int
    """FP32 units of a multiprocessor."""
    clock_ghz: float
    """Boost clock."""
    matrix_clock_ghz: float
    """Clock at which the tensor cores reach the data sheet's peak."""
    scalar_ops: dict[str, tuple[int, int]]
    """By type: units of a multiprocessor, operations of a unit in a clock."""
    matrix_ops: dict[str, int]
    """By type: multiply-adds of a tensor core (4 a multiprocessor) in a clock."""
    memory_bytes: int
    """Total memory as CUDA reports it."""
    memory_bandwidth: float
    """Bytes a second."""
    memory_clock_khz: int
    l2_bytes: int
    shared_per_core: int
    """Shared memory of a multiprocessor (bytes)."""
    shared_per_block: int
    """The most shared memory that a block may opt in to (bytes)."""
    pcie_bandwidth: int
    """Bytes a second to the host, each way."""
    nvlink_bandwidth: float
    """NVLink bytes a second in one direction: half of the sum in the data sheet."""
    nic_bandwidth: float
    """Bytes a second in one direction of the network card that serves a GPU of a DGX."""
    source: str


def _scalar_ops(n_units: int, f16: int, bf16: int) -> dict[str, tuple[int, int]]:
    """Return `Gpu.scalar_ops` from the FP32 units, of which FP64 has half, and 16-bit rates."""
    return {
        "s32": (64, 1), "u32": (64, 1), "f16": (n_units, f16), "f32": (n_units, 1),
        "f64": (n_units // 2, 1), "bf16": (n_units, bf16),
    }  # fmt: skip


def _matrix_ops(bf16: int, f64: int, f8: int | None) -> dict[str, int]:
    """Return `Gpu.matrix_ops`: int8 has twice the 16-bit rate, TF32 half; FP8 where it exists."""
    ops = {"s8": 2 * bf16, "u8": 2 * bf16, "f16": bf16, "f32": bf16 // 2, "f64": f64, "bf16": bf16}
    return ops | ({"f8e5m2": f8, "f8e4m3fn": f8} if f8 else {})


_H100 = Gpu(
    name="NVIDIA H100 80GB HBM3",
    capability=(9, 0),
    accelerated=True,
    n_cores=132,
    fp32_per_core=128,
    clock_ghz=1.98,
    # 132 x 4 x 512 x 2 x 1.8295201e9 = 989.2 TFLOP/s
    matrix_clock_ghz=1.8295201,
    scalar_ops=_scalar_ops(128, f16=2, bf16=2),
    matrix_ops=_matrix_ops(bf16=512, f64=32, f8=1024),
    memory_bytes=84_942_979_072,
    memory_bandwidth=3.35232e12,
    memory_clock_khz=2_619_000,
    l2_bytes=52_428_800,
    shared_per_core=233_472,
    shared_per_block=232_448,
    pcie_bandwidth=34_359_738_368,
    nvlink_bandwidth=450e9,
    nic_bandwidth=50e9,  # 400 Gb/s
    source="XLA h100_sxm.txtpb; NVLink: H100 data sheet (900 GB/s both ways); NIC: DGX H100 data "
    "sheet (8 x 400 Gb/s)",
)

GPUS: dict[str, Gpu] = {
    "h100": _H100,
    "h200": dataclasses.replace(
        _H100,
        name="NVIDIA H200 141GB HBM3e",
        # 139.81 GiB: nvidia-smi's 143,771 MiB less what the driver keeps. XLA's file has 141 GiB.
        memory_bytes=round(139.81 * 2**30),
        memory_bandwidth=4.8e12,
        memory_clock_khz=3_750_000,
        source="XLA h200.txtpb; memory: PyTorch on H200s; NVLink: H200 data sheet; NIC: DGX H200 "
        "data sheet (8 x 400 Gb/s)",
    ),
    "a100": Gpu(
        name="NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        accelerated=False,
        n_cores=108,
        fp32_per_core=64,
        clock_ghz=1.41,
        matrix_clock_ghz=1.41,  # 108 x 4 x 256 x 2 x 1.41e9 = 311.9 TFLOP/s
        scalar_ops=_scalar_ops(64, f16=4, bf16=2),
        matrix_ops=_matrix_ops(bf16=256, f64=16, f8=None),
        memory_bytes=85_100_068_864,
        memory_bandwidth=2.03904e12,
        memory_clock_khz=1_593_000,
        l2_bytes=41_943_040,
        shared_per_core=167_936,
        shared_per_block=166_912,
        pcie_bandwidth=34_359_738_368,
        nvlink_bandwidth=300e9,
        nic_bandwidth=25e9,  # 200 Gb/s
        source="XLA a100_sxm_80.txtpb; units and rates: A100 architecture white paper, table 1; "
        "NIC: DGX A100 data sheet (8 x 200 Gb/s)",
    ),
    "b200": Gpu(
        name="NVIDIA B200",
        capability=(10, 0),
        accelerated=True,
        n_cores=148,
        fp32_per_core=128,
        clock_ghz=1.965,
        # 148 x 4 x 1024 x 2 x 1.8353101e9 = 2225 TFLOP/s
        matrix_clock_ghz=1.8353101,
        scalar_ops=_scalar_ops(128, f16=1, bf16=1),
        matrix_ops=_matrix_ops(bf16=1024, f64=16, f8=2048),
        memory_bytes=191_514_411_008,
        memory_bandwidth=7.67232e12,
        memory_clock_khz=3_996_000,
        l2_bytes=132_644_864,
        shared_per_core=233_472,
        shared_per_block=232_448,
        pcie_bandwidth=68_719_476_736,
        nvlink_bandwidth=900e9,
        nic_bandwidth=50e9,  # 400 Gb/s
        source="XLA b200.txtpb; NVLink: HGX B200 data sheet (1.8 TB/s both ways); NIC: DGX B200 "
        "data sheet (8 x 400 Gb/s)",
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """What GPUs of one kind reach of a peak, as `benchmarks/gpu.py` measured it."""

    share: float
    spread: float
    """How far other sizes and other GPUs of the kind were from it, as a part of it."""
    source: str
    """The hardware, the versions and the date."""


MEASURED: dict[str, dict[str, Measured]] = {}
"""By `Gpu.name` and by names of `time_model.ASSUMED` that are shares of a GPU's peaks: matmul,
cudnn, triton, float8, memory. Empty: nothing has run on a GPU yet."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """The network between GPUs; rates are those that large collectives are assumed to reach."""

    gpus_per_node: int
    """GPUs joined by NVLink."""
    nvlink_bandwidth: float
    """Bytes a second that a GPU reaches inside a node."""
    nic_bandwidth: float
    """Bytes a second that a GPU reaches between nodes."""
    latency: float
    """Seconds to start a collective, and as many again for each doubling of its group."""

    def bandwidth(self, group_size: int, in_node: int) -> tuple[str, float]:
        """Return a collective's network, "NVLink" or "NIC", and its bytes a second for each GPU.

        `in_node` members of a group share a node. Between nodes, these members use the network
        cards of all of them, and the bytes that leave the node are the same for each.
        """
        if in_node >= group_size:
            return "NVLink", self.nvlink_bandwidth
        return "NIC", min(self.nvlink_bandwidth, in_node * self.nic_bandwidth)

    def seconds(self, crossing_bytes: float, group_size: int, in_node: int) -> float:
        """Return the time of one collective in which this many bytes leave each GPU."""
        start = self.latency * (1 + math.log2(max(group_size, 1)))
        return start + crossing_bytes / self.bandwidth(group_size, in_node)[1]


# Assumed, not measured here: NCCL's bus bandwidth as a share of the link's.
NVLINK_SHARE, NIC_SHARE = 0.8, 0.9  # H100: 360 of 450 GB/s, 45 of 50


def network_of(
    gpu: Gpu,
    gpus_per_node: int = 8,  # DGX and HGX
    nvlink_bandwidth: float | None = None,
    nic_bandwidth: float | None = None,
    latency: float = 10e-6,  # assumed
) -> Network:
    """Return the network of a pod of DGXs; given values replace the usual ones."""
    return Network(
        gpus_per_node=gpus_per_node,
        nvlink_bandwidth=nvlink_bandwidth or NVLINK_SHARE * gpu.nvlink_bandwidth,
        nic_bandwidth=nic_bandwidth or NIC_SHARE * gpu.nic_bandwidth,
        latency=latency,
    )


def find(name: str) -> Gpu:
    """Return a GPU by its short name.

    Raises:
        UserError: no GPU has this name.
    """
    if name not in GPUS:
        raise errors.UserError(
            f"--gpu={name} is not known: use one of {', '.join(GPUS)}", page="plan.md"
        )
    return GPUS[name]


def like(name: str, capability: tuple[int, int] | None) -> Gpu:
    """Return the GPU of this name (CUDA's); of others the one whose capability is nearest below.

    A driver may call a GPU less than XLA does: "NVIDIA H200".
    """
    for short, gpu in GPUS.items():
        if re.search(rf"\b{short}\b", name, re.IGNORECASE):
            return gpu
    major = capability[0] if capability else 0
    return GPUS["b200" if major >= 10 else "h100" if major == 9 else "a100"]


def target_text(gpu: Gpu) -> str:
    """Return the GPU as XLA's `stream_executor.GpuTargetConfigProto`, in protobuf's text form."""
    capability = ".".join(map(str, gpu.capability)) + ("a" if gpu.accelerated else "")
    feature = "ACCELERATED_FEATURES" if gpu.accelerated else "NONE"
    cudnn = ".".join(map(str, CUDNN))
    scalar = "".join(_rate(kind, gpu.clock_ghz, *units) for kind, units in gpu.scalar_ops.items())
    # FP64 runs at the boost clock.
    matrix = "".join(
        _rate(kind, gpu.clock_ghz if kind == "f64" else gpu.matrix_clock_ghz, 4, ops)
        for kind, ops in gpu.matrix_ops.items()
    )
    major, minor = gpu.capability
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {gpu.shared_per_core}
  shared_memory_per_block_optin: {gpu.shared_per_block}
  core_count: {gpu.n_cores} fpus_per_core: {gpu.fp32_per_core} clock_rate_ghz: {gpu.clock_ghz}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: {gpu.memory_bandwidth:.0f} l2_cache_size: {gpu.l2_bytes}
  device_memory_size: {gpu.memory_bytes}
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {feature} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  scalar_unit_description {{ {scalar} }}
  matrix_unit_description {{ {matrix} }}
  device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability {capability}"
  model_str: "sm_{capability} with {gpu.memory_bytes}B RAM, {gpu.n_cores} cores, \
{gpu.clock_ghz * 1e6:.0f}KHz clock, {gpu.memory_clock_khz}KHz mem clock, {gpu.l2_bytes}B L2$"
  device_address_bits: 64 pcie_bandwidth: {gpu.pcie_bandwidth} ecc_enabled: true
  name: "{gpu.name}" driver_version: "13.0.0" runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0" dnn_version: "{cudnn}" cub_version: "3.1.2"
}}
platform_name: "CUDA"
dnn_version_info {{ major: {CUDNN[0]} minor: {CUDNN[1]} patch: {CUDNN[2]} }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{gpu.name}"
"""


def _rate(kind: str, clock_ghz: float, units: int, ops: int) -> str:
    rate = f"clock_rate_ghz: {clock_ghz} units_per_core: {units} ops_per_clock: {ops}"
    return f"rate_infos {{ key: {_TYPES[kind]} value {{ {rate} }} }} "
