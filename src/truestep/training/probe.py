"""What one forward pass says about a model, learnt without computing it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from truestep.batch import Batch
from truestep.loss import DeferredLogits
from truestep.runtime import module_modes


@dataclass(frozen=True)
class ModelFacts:
    """What a model does with a batch."""

    vocab_size: int
    flops_per_token: float  # forward and backward, by the matmuls executed
    head: nn.Module | None  # the module whose matrix produced the logits


def logits_of(output: Any) -> Tensor | DeferredLogits:
    """Return the logits in what a model's forward returned: they, or an object's `.logits`.

    Errors: TypeError naming what was returned and what is wanted.
    """
    logits = getattr(output, "logits", output)
    if isinstance(logits, (Tensor, DeferredLogits)):
        return logits
    raise TypeError(
        f"the model returned {type(output).__name__}; "
        "its forward must return logits [B, T, V], or an object with .logits"
    )


def probe(model: nn.Module, batch: Batch) -> ModelFacts | None:
    """Run the model once on fake tensors, which have shapes and no content, and return its facts.

    None for a model that cannot run so, because what it does depends on the values.
    """
    called: list[nn.Module] = []
    hooks = [
        module.register_forward_hook(lambda module, *_: called.append(module))
        for module in model.modules()
        if _matrix_rows(module)
    ]
    fake = FakeTensorMode()
    counter = FlopCounterMode(display=False)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    try:
        with module_modes(model, training=False), torch.no_grad(), fake, counter:
            output = torch.func.functional_call(
                model,
                {name: fake.from_tensor(tensor) for name, tensor in tensors.items()},
                (fake.from_tensor(batch.tokens),),
                {name: fake.from_tensor(value) for name, value in batch.inputs.items()},
            )
    except RuntimeError:
        return None
    finally:
        for hook in hooks:
            hook.remove()
    shape = logits_of(output).shape
    if len(shape) != 3:
        raise ValueError(
            f"the model returned logits of shape {list(shape)} for tokens "
            f"{list(batch.tokens.shape)}; they must be [B, T, V]"
        )
    head = called[-1] if called and _matrix_rows(called[-1]) >= shape[-1] else None
    flops = 3.0 * counter.get_total_flops() / batch.tokens.numel()  # backward costs two forwards
    return ModelFacts(int(shape[-1]), flops, head)


def _matrix_rows(module: nn.Module) -> int:
    """Return the rows of a module's own `weight` matrix, 0 if it has none."""
    weight = module._parameters.get("weight")
    return weight.shape[0] if weight is not None and weight.dim() == 2 else 0
