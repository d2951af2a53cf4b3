"""GPUs as their vendors describe them: what a cluster of them can hold, compute, send and draw at best."""

from dataclasses import dataclass

from benthic.errors import InputError


@dataclass(frozen=True)
class Gpu:
    """One GPU of a server. Rates are peaks; dense, without structured sparsity."""

    name: str
    bf16_tflops: float
    """Of matrix products, summed in fp32."""
    memory_gb: float
    """1e9 bytes, as vendors count."""
    memory_gb_s: float
    link_gb_s: float
    """To other GPUs of its node, one way."""
    network_gb_s: float
    """To other nodes, one way: its share of what such servers usually have."""
    watts: float
    """Design power of the GPU alone."""
    usd_per_hour: float
    per_node: int = 8

    @property
    def memory_bytes(self) -> int:
        """What it can hold."""
        return round(self.memory_gb * 1e9)


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("H800", 989, 80, 3350, 200, 50, 700, 2.0),
        Gpu("H100", 989, 80, 3350, 450, 50, 700, 2.7),
        Gpu("H200", 989, 141, 4800, 450, 50, 700, 3.6),
        Gpu("A100", 312, 80, 2039, 300, 25, 400, 1.4),
        Gpu("B200", 2250, 180, 8000, 900, 50, 1000, 6.0),
        Gpu("MI300X", 1307, 192, 5300, 448, 50, 750, 1.8),
        Gpu("RTX 4090", 165, 24, 1008, 32, 12.5, 450, 0.35),
    )
}
"""SXM or OAM modules, the RTX 4090 as a card in a PCIe 4.0 slot. Compute, memory, links and watts: data sheets of
NVIDIA (H100, H200, A100 80GB, HGX B200, the Ada architecture's white paper) and AMD (MI300X). The H800 is an H100 with
NVLink at 400 GB/s both ways (arXiv 2412.19437, section 3.1). Network: one adapter of 400 Gb/s for each GPU, as in
DeepSeek's cluster; 200 Gb/s with A100s, 100 Gb/s with cards. Dollars: $2 for the H800 is what DeepSeek reckons with
(section 1); the rest is about what clouds asked on demand in spring 2026, and will have moved."""


def gpu_named(name: str) -> Gpu:
    """A GPU of the table, whichever way its name is capitalised. Raises InputError if it has none such."""
    for known, gpu in GPUS.items():
        if known.replace(" ", "").lower() == name.replace(" ", "").replace("-", "").lower():
            return gpu
    raise InputError(f"--gpu {name}: no such GPU is known; allowed are {', '.join(GPUS)}")
