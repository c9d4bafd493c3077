"""Public specifications of GPUs."""

from __future__ import annotations

from typing import NamedTuple

GB, TERA = 1e9, 1e12


class Gpu(NamedTuple):
    """What a data sheet says of a GPU; products without sparsity.

    Attributes:
        name: What it is called here.
        memory: Bytes of its memory.
        half: Products in bfloat16 with float32 sums, FLOP/s. Of a GPU whose matrix units know no bfloat16 (T4, V100) it
            is that of float32, since the stages ask for bfloat16.
        single: Products in float32, FLOP/s, without TF32, which PyTorch leaves off.
        bandwidth: Bytes/s from its memory.
        link: Bytes/s to one neighbour and in one direction: NVLink, where the usual machine has it, or PCIe.
    """

    name: str
    memory: float
    half: float
    single: float
    bandwidth: float
    link: float


def _gpu(name: str, memory: float, half: float, single: float, bandwidth: float, link: float) -> Gpu:
    return Gpu(name, memory * GB, half * TERA, single * TERA, bandwidth * GB, link * GB)


# GB, TFLOP/s bfloat16, TFLOP/s float32, GB/s memory, GB/s link. From NVIDIA's data sheets and architecture papers: T4,
# V100 SXM2, A10G (of AWS G5: an A10 with fewer matrix units), L4, L40S, A100 SXM, H100 SXM, H200 SXM, HGX B200 (one of
# its GPUs), GeForce RTX by the papers on GA102, Ada and RTX Blackwell, RTX A6000.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("T4", 16, 8.1, 8.1, 320, 16),
        _gpu("V100", 32, 15.7, 15.7, 900, 150),
        _gpu("A10G", 24, 70, 35, 600, 32),
        _gpu("L4", 24, 121, 30.3, 300, 32),
        _gpu("L40S", 48, 362, 91.6, 864, 32),
        _gpu("RTX3090", 24, 71, 35.6, 936, 32),
        _gpu("RTX4090", 24, 165.2, 82.6, 1008, 32),
        _gpu("RTX5090", 32, 209.5, 104.8, 1792, 64),
        _gpu("A6000", 48, 154.8, 38.7, 768, 32),
        _gpu("A100-40", 40, 312, 19.5, 1555, 300),
        _gpu("A100-80", 80, 312, 19.5, 2039, 300),
        _gpu("H100", 80, 989, 67, 3350, 450),
        _gpu("H200", 141, 989, 67, 4800, 450),
        _gpu("B200", 180, 2250, 75, 7700, 900),
    )
}


def find_gpu(name: str) -> Gpu:
    """The GPU of a name, whatever its case and its blanks.

    Raises:
        ValueError: There is none of that name.

    Examples:
        >>> find_gpu("rtx 4090").memory
        24000000000.0
    """
    plain = {key.replace("-", "").lower(): gpu for key, gpu in GPUS.items()}
    found = plain.get("".join(c for c in name if c not in " -_").lower())
    if found is None:
        raise ValueError(f"--gpu: expected one of {', '.join(GPUS)}, got {name!r}")
    return found
