"""What one step reports, and how much of the machine it used."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class StepMetrics:
    """One update, as it is logged.

    `step` counts updates: the first logs 1, and its data was `batch_at(0)`. `loss` is the mean
    over the valid targets of the whole global batch, in nats. `grad_norm` is measured before
    clipping. `skipped` says that parameters and optimizer state were left as they were.
    `batch_hash` is `Batch.hash()` of the step's data.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    step_seconds: float
    skipped: bool = False
    batch_hash: str | None = None

    @property
    def tokens_per_second(self) -> float:
        """Valid targets over the time of this step alone."""
        return self.num_tokens / self.step_seconds if self.step_seconds > 0 else 0.0

    def as_record(self) -> dict[str, Any]:
        """Return the record that sinks write."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


def model_flops_utilization(
    tokens_per_second: float, flops_per_token: float, peak_flops_per_second: float
) -> float:
    """Return the share of the machine's matmul rate that the model's arithmetic uses (MFU).

    Source: Chowdhery et al. 2022 (PaLM), appendix B; `flops_per_token` counts forward and backward.
    """
    return tokens_per_second * flops_per_token / peak_flops_per_second
