"""Records as a trainer writes them, for the tests of what people see."""


def training(step, loss=2.5, **changes):
    record = {
        "step": step,
        "loss": loss,
        "grad_norm": 0.5,
        "learning_rate": 3e-4,
        "num_tokens": 1000,
        "step_seconds": 0.25,
        "skipped": False,
        "tokens_per_second": 4000.0,
    }
    return record | changes
