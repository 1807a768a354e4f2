"""Constants of the TPU generations, per TensorCore, from the vendor's tables unless a comment says otherwise."""

import dataclasses

DMA_LATENCY_S = 0.6e-6


@dataclasses.dataclass(frozen=True)
class Generation:
    """One generation. `cores` TensorCores share one program (megacore); the other figures are per core.

    `mxu_cycles`: cycles in which an MXU takes 16 rows of bfloat16. `delay_slots`: bundles that run after a branch.
    """

    topology: str
    cores: int
    peak_flops: float
    hbm_bytes_per_s: float
    mxus: int
    mxu_width: int
    mxu_cycles: int
    delay_slots: int
    dma_granule_bytes: int = 32

    @property
    def flops_per_issue(self) -> int:
        """Of one matrix instruction: 16 rows times a square of weights."""
        return 2 * 16 * self.mxu_width**2

    @property
    def clock_hz(self) -> float:
        """The clock at which all MXUs together reach the peak."""
        return self.peak_flops * self.mxu_cycles / (self.mxus * self.flops_per_issue)


GENERATIONS = {
    "v4": Generation("v4:2x2x1", 2, 275e12 / 2, 1.23e12 / 2, 4, 128, 16, 4, dma_granule_bytes=512),
    "v5e": Generation("v5e:2x2", 1, 197e12, 8.2e11, 4, 128, 16, 4),
    "v5p": Generation("v5p:2x2x1", 2, 459e12 / 2, 2.46e12 / 2, 4, 128, 16, 4),
    "v6e": Generation("v6e:2x2", 1, 918e12, 1.64e12, 2, 256, 8, 4),
    # mxu_cycles is inferred: with 4 the simulated time would exceed published ones. Its two cores are two devices.
    "tpu7x": Generation("tpu7x:2x2x1", 1, 2307e12 / 2, 7.38e12 / 2, 2, 256, 8, 1),
}
