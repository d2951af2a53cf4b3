"""How long a training step takes on a cluster of GPUs, and what a run of them costs: time, money, energy.

What nobody can know beforehand is how much of a GPU's peak its kernels will reach. One published run tells:
DeepSeek-V3's own, whose step is broken down in arXiv 2505.09343, table 4. While they compute, 17.55 of 19.926 s, its
GPUs do 46% of their dense bf16 peak (in FP8, MTP counted). That share is assumed of every GPU; all else follows from
sizes.
"""

from dataclasses import dataclass

from benthic.plan.hardware import Gpu

BUSY_SHARE_OF_PEAK = 0.46
"""Of the dense bf16 peak. With bf16 instead of FP8 products, or with few tokens for each expert, it will be less."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, by what passes them."""

    computing: float
    """Forward and backward passes."""
    waiting: float
    """For other stages of the pipeline."""
    exchanging: float
    """Tokens with experts elsewhere, and states with other stages, as far as nothing is computed meanwhile."""
    reducing: float
    """Gradients to those that update the weights, and weights back."""
    updating: float
    """Reading and writing what the optimizer keeps."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.computing + self.waiting + self.exchanging + self.reducing + self.updating


def computing_seconds(flops: float, gpu: Gpu, share_of_peak: float = BUSY_SHARE_OF_PEAK) -> float:
    """For so many operations on one GPU."""
    return flops / (gpu.bf16_tflops * 1e12 * share_of_peak)


def waiting_seconds(computing: float, idle_share: float) -> float:
    """In a pipeline whose ranks are idle for this share of the time that it takes to compute a step."""
    return computing * idle_share / (1 - idle_share)


def sending_seconds(within_node: float, between_nodes: float, gpu: Gpu) -> float:
    """For bytes that one GPU sends over both kinds of links, which work at the same time."""
    return max(within_node / (gpu.link_gb_s * 1e9), between_nodes / (gpu.network_gb_s * 1e9))


def updating_seconds(state_bytes: float, gpu: Gpu) -> float:
    """The optimizer reads and writes its state once."""
    return 2 * state_bytes / (gpu.memory_gb_s * 1e9)


def gpu_hours(seconds: float, gpus: int) -> float:
    """Of so many GPUs for so long."""
    return seconds * gpus / 3600


def energy_kwh(hours: float, gpu: Gpu) -> float:
    """Of GPUs at their design power; the servers around them, networks and cooling are not counted."""
    return hours * gpu.watts / 1000
