"""Other trainers' own models, optimizers and steps, for the same shapes and tokens.

nanoGPT is read from a checkout; litgpt and transformers must be installed beside truestep. Each is
stepped as its own training script does it by default, with dropout off and clipping at 1.0: nanoGPT
and litgpt fuse AdamW on a GPU only.
"""

import importlib.util
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from workloads import Workload

from truestep.runtime import resolve_device

Step = Callable[[], float]  # one update, returning its loss


def nanogpt_model(workload: Workload, path: Path, vocab_size: int) -> Any:
    """nanoGPT's own model, from a checkout, on the device."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", path / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    config = module.GPTConfig(
        block_size=workload.context_length,
        vocab_size=vocab_size,
        n_layer=workload.num_layers,
        n_head=workload.num_heads,
        n_embd=workload.width,
        dropout=0.0,
        bias=False,
    )
    return module.GPT(config).to(resolve_device("auto"))


def nanogpt_step(workload: Workload, path: Path, *, compiled: bool) -> Step:
    """nanoGPT's own model and optimizer, stepped as its train.py does: float32 on a CPU.

    Its train.py, too, takes 50304 ids where GPT-2 has 50257: that is faster.
    """
    vocab_size = 50304 if workload.vocab_size == 50257 else workload.vocab_size
    torch.manual_seed(0)
    raw = nanogpt_model(workload, path, vocab_size)
    device = resolve_device("auto")
    optimizer = raw.configure_optimizers(0.1, 3e-4, (0.9, 0.95), device.type)
    model: Any = torch.compile(raw) if compiled else raw
    precision = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    steps = itertools.count()

    def step() -> float:
        batch = workload.batch(next(steps)).to(device)
        with precision:
            _, loss = model(batch.tokens, batch.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.item())

    return step


def litgpt_model(workload: Workload, seed: int = 0) -> torch.nn.Module:
    """litgpt's model, which any trainer may train: tokens in, logits out."""
    from litgpt.config import Config
    from litgpt.model import GPT

    torch.manual_seed(seed)
    model: Any = GPT(
        Config(
            block_size=workload.context_length,
            n_layer=workload.num_layers,
            n_head=workload.num_heads,
            n_embd=workload.width,
            vocab_size=workload.vocab_size,
            padding_multiple=64,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
            intermediate_size=workload.mlp_width,
            parallel_residual=False,
            rotary_percentage=1.0,
            bias=False,
        )
    )
    if workload.tied:
        model.lm_head.weight = model.transformer.wte.weight
    return model  # type: ignore[no-any-return]


def litgpt_step(workload: Workload) -> Step:
    """litgpt's model as its pretrain.py trains it: compiled, bf16-mixed, losses by chunks."""
    import lightning
    from litgpt.utils import chunked_cross_entropy

    device = resolve_device("auto")
    fabric = lightning.Fabric(accelerator=device.type, devices=1, precision="bf16-mixed")
    raw = litgpt_model(workload)
    model = fabric.setup(torch.compile(raw))
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=3e-4,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        fused=device.type == "cuda",
    )
    optimizer = fabric.setup_optimizers(optimizer)
    steps = itertools.count()

    def step() -> float:
        batch = workload.batch(next(steps)).to(device)
        loss = chunked_cross_entropy(model(batch.tokens), batch.targets)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.item())

    return step


def transformers_step(workload: Workload) -> Step:
    """A Llama of `transformers` under bfloat16 autocast, stepped as its Trainer does."""
    from transformers import LlamaConfig, LlamaForCausalLM

    device = resolve_device("auto")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=workload.vocab_size,
            hidden_size=workload.width,
            intermediate_size=workload.mlp_width,
            num_hidden_layers=workload.num_layers,
            num_attention_heads=workload.num_heads,
            max_position_embeddings=workload.context_length,
            tie_word_embeddings=workload.tied,
            use_cache=False,
        )
    ).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    steps = itertools.count()

    def step() -> float:
        batch = workload.batch(next(steps)).to(device)
        targets = batch.targets
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(batch.tokens, labels=batch.tokens, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.item())

    return step
