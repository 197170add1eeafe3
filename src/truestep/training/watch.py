"""Hooks that see which module first turns finite numbers into others.

Forward: a module's inputs are looked at before it runs and its outputs after. Backward: each node
of the autograd graph belongs to the innermost module that ran when it was made, and is looked at
when it runs itself. Hooks on tensors would not do: they see the sum over all readers, so on a
residual stream they cannot tell which branch went wrong. Nor would `register_full_backward_hook`:
it refuses in-place operations, and passes over outputs such as `DeferredLogits`.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle


class Place(NamedTuple):
    """A module by its qualified name and its class; both are "" outside of the model."""

    module: str
    kind: str


class Watch:
    """Watches a model until `close`; `begin` starts each micro-batch anew."""

    def __init__(self, model: nn.Module) -> None:
        self.forward: Place | None = None  # the first whose inputs were finite, its outputs not
        self.backward: Place | None = None  # that of the first node with a gradient that is not
        self._places: dict[nn.Module, Place] = {}
        self._owners: dict[Tensor, Place] = {}  # of parameters
        self._running: list[tuple[nn.Module, bool]] = []  # innermost last; were its inputs finite?
        self._nodes: dict[Node, RemovableHandle] = {}
        self._hooks: list[RemovableHandle] = []
        for name, parameter in model.named_parameters():
            self._owners[parameter] = owner_of(model, name)
        for name, module in model.named_modules():
            self._places[module] = Place(name, type(module).__name__)
            self._hooks.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            self._hooks.append(
                # Always: whoever catches a module's exception goes on outside of it.
                module.register_forward_hook(self._leave, with_kwargs=True, always_call=True)
            )

    def begin(self) -> None:
        """Forget the micro-batch before, and its graph."""
        self.forward = self.backward = None
        for handle in self._nodes.values():
            handle.remove()
        self._nodes.clear()

    def close(self) -> None:
        """Take every hook off."""
        self.begin()
        for hook in self._hooks:
            hook.remove()

    def claim(self, tensors: Iterable[Tensor]) -> None:
        """Give the nodes made since the last claim to the innermost module that is running."""
        running = self._places[self._running[-1][0]] if self._running else Place("", "")
        frontier = [tensor.grad_fn for tensor in tensors]
        while frontier:
            node = frontier.pop()
            if node is None or node in self._nodes:
                continue
            # The node that adds to a parameter's `.grad` belongs to the parameter's owner.
            leaf = getattr(node, "variable", None)
            place = self._owners.get(leaf, running) if isinstance(leaf, Tensor) else running
            self._nodes[node] = node.register_hook(functools.partial(self._ran, place))
            frontier += [following for following, _ in node.next_functions]

    def _ran(self, place: Place, *gradients: tuple[Tensor | None, ...]) -> None:
        if self.backward is None and not all(map(is_finite, _tensors(gradients))):
            self.backward = place

    def _enter(self, module: nn.Module, *inputs: Any) -> None:
        tensors = list(_tensors(inputs))
        self.claim(tensors)  # made outside of `module`
        # Looked at now: an in-place operation may change them.
        self._running.append((module, all(map(is_finite_or_mask, tensors))))

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self._running or self._running[-1][0] is not module:
            return  # a hook of the user's raised before `_enter` was called
        tensors = list(_tensors(output))
        self.claim(tensors)
        _, inputs_were_finite = self._running.pop()
        if self.forward is None and inputs_were_finite:
            self.forward = None if all(map(is_finite_or_mask, tensors)) else self._places[module]


def owner_of(model: nn.Module, name: str) -> Place:
    """Return the module that a parameter or buffer belongs to."""
    module = name.rpartition(".")[0]
    return Place(module, type(model.get_submodule(module)).__name__)


def is_finite(tensor: Tensor) -> bool:
    """Say whether all of a tensor is finite."""
    tensor = tensor.detach()  # else checkpointing finds more saved in forward than in backward
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()  # torch has no isfinite for some float8 types
    return bool(tensor.isfinite().all())


def is_finite_or_mask(tensor: Tensor) -> bool:
    """Take minus infinity for a mask where no gradient is needed."""
    if tensor.requires_grad or tensor.dtype.itemsize == 1:
        return is_finite(tensor)
    return is_finite(tensor.masked_fill(tensor == -math.inf, 0))


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in what a module takes or returns."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)
    elif (logits := getattr(value, "logits", None)) is not None:
        yield from _tensors(logits)
