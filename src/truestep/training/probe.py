"""What one forward pass says about a model, learnt without computing it."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from truestep.batch import Batch
from truestep.loss import DeferredLogits
from truestep.runtime import module_modes, plain_attention


@dataclass(frozen=True)
class ModelFacts:
    """What a model does with a batch."""

    vocab_size: int
    flops_per_token: float  # forward and backward, by their matrix products
    head: nn.Module | None  # the module whose matrix produced the logits


class NotTraceableError(Exception):
    """A model does not run on tensors without values, because what it does depends on these."""


@contextlib.contextmanager
def traced(model: nn.Module) -> Iterator[None]:
    """Let a model run on tensors without values, and leave none of them in its modules.

    What its own code keeps for the next call, a mask or a cache, goes again, but for what lies
    deeper than a list or a dictionary of a module.
    Errors: NotTraceableError in place of any that comes from inside.
    """
    before = [(module, _Attributes(module)) for module in model.modules()]
    try:
        yield
    except Exception as error:
        raise NotTraceableError(str(error)) from error
    finally:
        for module, attributes in before:
            attributes.restore(module)


class _Attributes:
    """What a module has, and what stands in its lists, dictionaries and sets."""

    def __init__(self, module: nn.Module) -> None:
        self._values = dict(vars(module))
        self._contents = [
            (value, type(value)(value))
            for value in self._values.values()
            if type(value) in {dict, list, set}
        ]

    def restore(self, module: nn.Module) -> None:
        vars(module).clear()
        vars(module).update(self._values)
        for value, content in self._contents:
            value.clear()
            value.extend(content) if isinstance(value, list) else value.update(content)


def logits_of(output: Any) -> Tensor | DeferredLogits:
    """Return the logits in what a model's forward returned: they, or an object's `.logits`.

    Under autocast, deferred logits are multiplied in its dtype, as a head would be.
    Errors: TypeError naming what was returned and what is wanted.
    """
    logits = getattr(output, "logits", output)
    if isinstance(logits, Tensor):
        return logits
    if isinstance(logits, DeferredLogits):
        hidden, device_type = logits.hidden, logits.hidden.device.type
        if hidden.dtype == torch.float32 and torch.is_autocast_enabled(device_type):
            hidden = hidden.to(torch.get_autocast_dtype(device_type))
        return DeferredLogits(hidden, logits.weight)
    raise TypeError(
        f"the model returned {type(output).__name__}; "
        "its forward must return logits [B, T, V], or an object with .logits"
    )


def probe(model: nn.Module, batch: Batch) -> ModelFacts | None:
    """Run the model once on fake tensors, which have shapes and no content, and return its facts.

    None for a model that cannot run so, because what it does depends on the values.
    """
    columns: dict[nn.Module, int] = {}  # in the order of the calls

    def note(module: nn.Module, _: Any, output: Any) -> None:
        columns[module] = output.shape[-1] if isinstance(output, Tensor) and output.dim() else 0

    hooks = [m.register_forward_hook(note) for m in model.modules() if _has_matrix(m)]
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    counter = FlopCounterMode(display=False)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    modes = module_modes(model, training=False)
    try:
        # The counter knows no fused attention of a CPU: as plain products it is counted anywhere.
        with traced(model), modes, plain_attention(), torch.no_grad(), fake, counter:
            output = torch.func.functional_call(
                model,
                {name: fake.from_tensor(tensor) for name, tensor in tensors.items()},
                (fake.from_tensor(batch.tokens),),
                {name: fake.from_tensor(value) for name, value in batch.inputs.items()},
            )
    except NotTraceableError:
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
    heads = [module for module, count in columns.items() if count == shape[-1]]
    flops = 3.0 * counter.get_total_flops() / batch.tokens.numel()  # backward costs two forwards
    return ModelFacts(int(shape[-1]), flops, heads[-1] if heads else None)


def _has_matrix(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2
