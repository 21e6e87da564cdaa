"""The machine of a plan: GPUs, their links, the network, and the software's share of the peaks."""

from dataclasses import dataclass

from trainer.config import Config, Precision
from trainer.runtime.devices import Gpu, find_gpu, launch_s

GB = 10**9
COLLECTIVE_SHARE = 0.8
"""Share of a link's rate that large collectives reach. NVIDIA's nccl-tests reach 230 to 240 GB/s of
bus bandwidth on a DGX A100 (github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md), of 300 GB/s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Nodes of equal GPUs; a node is the GPUs that GPU links join."""

    gpu: Gpu
    nodes: int
    gpus_per_node: int
    network_gbit_per_s: float
    """Rate between a node and the others."""
    peak_tflops: float
    """Peak of the products' precision."""
    mfu: float
    """Share of the peak that products reach in large micro batches."""
    launch_s: float
    """Seconds of an operator of a micro batch beside its products."""

    @property
    def ranks(self) -> int:
        """Number of GPUs."""
        return self.nodes * self.gpus_per_node

    def products_s(self, flops: float) -> float:
        """Return the seconds of one GPU's matrix products; flops: FLOPs."""
        return flops / (self.peak_tflops * 1e12 * self.mfu)

    def ring_s(self, sent: float) -> float:
        """Return the seconds of a ring over all GPUs: the slower of network and GPU links.

        sent: bytes through every link, in the limit of many ranks.
        """
        node, nodes = self.gpus_per_node, self.nodes
        within = (node - 1) / node / (self.gpu.link_gb_per_s * GB)
        between = (nodes - 1) / nodes / (self.network_gbit_per_s * GB / 8)
        return sent * max(within, between) / COLLECTIVE_SHARE


def software_of(config: Config) -> str:
    """Return the class of software: `eager` or `compiled`."""
    return "compiled" if config.train.compile else "eager"


def machine_of(config: Config) -> Machine:
    """Return the machine that the config plans for."""
    plan, gpu, software = config.plan, find_gpu(config.plan.gpu), software_of(config)
    bf16 = config.train.precision is Precision.bf16
    return Machine(
        gpu=gpu,
        nodes=plan.nodes,
        gpus_per_node=plan.gpus_per_node,
        network_gbit_per_s=plan.network_gbit_per_s or gpu.nic_gbit_per_s * plan.gpus_per_node,
        peak_tflops=gpu.bf16_tflops if bf16 else gpu.fp32_tflops,
        mfu=plan.mfu or gpu.mfu[software],
        launch_s=launch_s(software),
    )
