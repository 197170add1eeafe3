"""From what a trainer is given to what it works with: arguments, optimizer, schedule."""

from typing import Literal

import torch
from torch import nn

from truestep.batch import Batch
from truestep.config import TrainingConfig
from truestep.runtime import resolve_deterministic
from truestep.training.companion import Companion
from truestep.training.muon import Muon, MuonAdamW, hidden_matrices
from truestep.training.optim import adamw, embedding_matrices, trainable_parameters
from truestep.training.probe import probe
from truestep.training.schedule import (
    Schedule,
    constant,
    resolve_decay_steps,
    warmup_cosine,
    warmup_stable_decay,
)


def resolve_settings(
    config: TrainingConfig, precision: Literal["float32", "bfloat16"], device: torch.device
) -> TrainingConfig:
    """Return the settings in plain values, as far as they can be known before a batch."""
    resolved = {
        "precision": precision,
        "deterministic": resolve_deterministic(config.deterministic, device),
        "decay_steps": resolve_decay_steps(
            config.decay_steps, config.warmup_steps, config.num_steps
        ),
    }
    return config.model_copy(update=resolved)


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Return the optimizer that `config` names, over every parameter that requires a gradient.

    `config` has its precision in a plain value: Muon iterates in bfloat16 where that is it.
    """
    parameters = trainable_parameters(model)
    matrices = _muon_matrices(model) if config.optimizer == "muon" else []
    embeddings = _faster_embeddings(model, config)
    chosen = {id(parameter) for parameter in (*matrices, *embeddings)}
    rest = adamw(
        [parameter for parameter in parameters if id(parameter) not in chosen],
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        betas=config.betas,
        eps=config.eps,
    )
    if embeddings:
        rate = config.embedding_learning_rate_factor * config.learning_rate
        rest.add_param_group({"params": embeddings, "lr": rate})
    if not matrices:
        return rest
    wide = torch.promote_types(matrices[0].dtype, torch.float32)
    muon = Muon(
        matrices,
        lr=config.muon_learning_rate,
        momentum=config.muon_momentum,
        weight_decay=config.weight_decay,
        dtype=torch.bfloat16 if config.precision == "bfloat16" else wide,
    )
    return MuonAdamW(rest, muon)


def _faster_embeddings(model: nn.Module, config: TrainingConfig) -> list[nn.Parameter]:
    """Return the embeddings that have a learning rate of their own."""
    factor = config.embedding_learning_rate_factor
    if factor == 1.0:
        return []
    if embeddings := embedding_matrices(model):
        return embeddings
    raise ValueError(
        f"embedding_learning_rate_factor={factor}, but {type(model).__name__} has no embedding "
        "apart from its head; leave it at 1"
    )


def _muon_matrices(model: nn.Module) -> list[nn.Parameter]:
    tokens = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    facts = probe(model, Batch(tokens, tokens))
    if facts is None or facts.head is None:
        raise ValueError(
            f"optimizer=muon finds no module in {type(model).__name__} that produces its logits, "
            "and must not take that matrix; use optimizer=adamw, or give Trainer an optimizer"
        )
    return hidden_matrices(model, facts.head)


def build_schedule(config: TrainingConfig) -> Schedule:
    """Return the schedule that `config` names."""
    warmup_steps, num_steps = config.warmup_steps, config.num_steps
    final_factor = config.final_learning_rate_factor
    if config.schedule == "cosine":
        return warmup_cosine(
            warmup_steps=warmup_steps, num_steps=num_steps, final_factor=final_factor
        )
    if config.schedule == "wsd":
        return warmup_stable_decay(
            warmup_steps=warmup_steps,
            num_steps=num_steps,
            decay_steps=config.decay_steps,
            final_factor=final_factor,
        )
    return constant(warmup_steps=warmup_steps)


def check_arguments(
    model: object, config: object, optimizer: object, companions: list[Companion]
) -> None:
    """Refuse, in one line each, what a trainer cannot work with."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    if not isinstance(config, TrainingConfig):
        raise TypeError(
            f"config is a {type(config).__name__}; give TrainingConfig(learning_rate=…, …)"
        )
    if optimizer is not None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer is a {type(optimizer).__name__}; it must be a torch.optim.Optimizer, "
                'or name one by TrainingConfig(optimizer="muon")'
            )
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError("optimizer LBFGS needs a closure, which a training step has not")
        own = {id(parameter) for parameter in model.parameters()}
        if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            raise ValueError(
                "the optimizer has none of the model's parameters; build it from this model's"
            )
    for companion in companions:
        if not isinstance(companion, Companion):
            raise TypeError(
                f"companion {companion!r} has no interval; wrap the function: every(100, function)"
            )
