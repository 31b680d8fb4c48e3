"""GPUs that the cuda backend knows: peaks that its performance model is made of. Data, nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Capability = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU's dense peaks, as its maker publishes them.

    Args:
      name: of the product.
      capability: compute capability, (9, 0) for sm_90.
      multiprocessors: number of them.
      int8_tops, fp16_tflops: dense tensor-core peaks, 10^12 operations a second; fp16 with fp32 accumulation.
      bandwidth: of its memory, 10^9 bytes a second.
      gigahertz: boost clock.
      shared_memory: bytes that one block may have.
      source: where the figures stand.
    """

    name: str
    capability: Capability
    multiprocessors: int
    int8_tops: float
    fp16_tflops: float
    bandwidth: float
    gigahertz: float
    shared_memory: int
    source: str

    @property
    def architecture(self) -> str:
        """As compilers write it: sm_90."""
        return f"sm_{self.capability[0]}{self.capability[1]}"


GPUS: Mapping[Capability, Gpu] = {
    gpu.capability: gpu
    for gpu in (
        Gpu(
            name="A100 SXM 80 GB",
            capability=(8, 0),
            multiprocessors=108,
            int8_tops=624,
            fp16_tflops=312,
            bandwidth=2039,
            gigahertz=1.41,
            shared_memory=163 * 1024,
            source="NVIDIA A100 Tensor Core GPU data sheet (2021)",
        ),
        Gpu(
            name="GeForce RTX 3090",
            capability=(8, 6),
            multiprocessors=82,
            int8_tops=284,
            fp16_tflops=71,
            bandwidth=936,
            gigahertz=1.695,
            shared_memory=99 * 1024,
            source="NVIDIA Ampere GA102 GPU architecture white paper (2021), table 9",
        ),
        Gpu(
            name="GeForce RTX 4090",
            capability=(8, 9),
            multiprocessors=128,
            int8_tops=660.6,
            fp16_tflops=165.2,
            bandwidth=1008,
            gigahertz=2.52,
            shared_memory=99 * 1024,
            source="NVIDIA Ada GPU architecture white paper (2022), appendix A",
        ),
        Gpu(
            name="H100 SXM 80 GB",
            capability=(9, 0),
            multiprocessors=132,
            int8_tops=1979,
            fp16_tflops=989.4,
            bandwidth=3350,
            gigahertz=1.83,
            shared_memory=227 * 1024,
            source="NVIDIA H100 Tensor Core GPU data sheet (2023); sparse peaks halved",
        ),
        Gpu(
            name="B200",
            capability=(10, 0),
            multiprocessors=148,
            int8_tops=4500,
            fp16_tflops=2250,
            bandwidth=8000,
            gigahertz=1.85,
            shared_memory=227 * 1024,
            source="NVIDIA DGX B200 data sheet (2024), one of eight; sparse peaks halved",
        ),
    )
}
"""By compute capability; one product stands for each."""

MINIMUM_CAPABILITY: Capability = (8, 0)


def gpu_for(capability: Capability) -> Gpu:
    """The known GPU of this capability, or the nearest older one."""
    older = [item for item in GPUS if item <= capability]
    return GPUS[max(older)] if older else GPUS[MINIMUM_CAPABILITY]


def refusal(capability: Capability) -> str | None:
    """Why a GPU of this capability cannot run the kernels, None if it can."""
    if capability >= MINIMUM_CAPABILITY:
        return None
    return (
        f"the GPU is sm_{capability[0]}{capability[1]}, want sm_80 or newer: older ones have neither bf16 nor the "
        "asynchronous copies that the kernels are built on; use backend='reference', or the original model in fp16"
    )
