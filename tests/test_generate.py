"""Writing: the text is the model's own, and writing leaves no trace in training."""

import itertools
import math

import pytest
import torch

from truestep import GPTConfig
from truestep.model.generate import generate
from truestep.model.gpt import GPT


def build(**settings):
    shape = {"vocab_size": 17, "context_length": 16, "num_layers": 2, "num_heads": 2, "width": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT(GPTConfig(**shape | settings))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


PROMPT = torch.tensor([3, 1, 4])


def written(model, prompt=PROMPT, **options):
    return list(generate(model, prompt, **{"max_new_tokens": 12} | options))


def greedy(model, tokens, count):
    """Write the likeliest tokens with one full forward each, under the documented window rule."""
    tokens, context_length = list(tokens), model.config.context_length
    window = tokens[-context_length:]
    for _ in range(count):
        if len(window) > context_length:
            window = tokens[-(context_length // 2) :]
        with torch.no_grad():
            token = int(model.eval()(torch.tensor([window]))[0, -1].argmax())
        tokens.append(token)
        window = [*window, token]
    return tokens[-count:]


@pytest.mark.parametrize("switches", [{}, {"num_kv_heads": 1, "qk_norm": True}], ids=str)
@pytest.mark.parametrize("length", [1, 3, 16, 40])
def test_greedy_text_is_the_argmax_of_full_forwards_past_the_context_too(length, switches):
    model = build(**switches)
    prompt = torch.randint(17, (length,), generator=torch.Generator().manual_seed(length))
    text = written(model, prompt, temperature=0.0, max_new_tokens=50)
    assert text == greedy(model, prompt.tolist(), 50)
    assert len(set(text)) > 2
    assert written(model, prompt[None], temperature=0.0, max_new_tokens=50) == text


def test_a_context_of_two_tokens_goes_on():
    model = build(context_length=2)
    assert written(model, temperature=0.0) == greedy(model, PROMPT.tolist(), 12)


def test_the_seed_decides_the_text():
    model = build()
    assert written(model, seed=1) == written(model, seed=1)
    assert written(model, seed=1) != written(model, seed=2)


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 5e-324}])
def test_the_narrowest_choice_is_the_greedy_one(narrow):
    model = build()
    assert written(model, **narrow) == written(model, temperature=0.0)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, 6),
        ({"temperature": 2.0}, 6),
        ({"top_k": 3}, 3),
        ({"top_p": 0.8}, 3),
        ({"top_k": 99}, 6),
    ],
    ids=str,
)
def test_drawn_tokens_follow_the_softmax(options, kept):
    # Equal embeddings: the logits are the same after any text, so the draws are independent.
    model = build(vocab_size=6, num_layers=1, context_length=4)
    wanted = torch.tensor([0.1, 0.35, 0.05, 0.25, 0.22, 0.03], dtype=torch.float64)
    with torch.no_grad():
        model.embedding.weight.copy_(model.embedding.weight[:1].expand(6, -1))
        model.eval()
        features = []
        handle = model.norm.register_forward_hook(lambda _, __, y: features.append(y[0, -1]))
        model(torch.tensor([[0]]))
        handle.remove()
        direction = features[0] / features[0].square().sum()
        model.head.weight.copy_(wanted.log().float()[:, None] * direction)
    counts = torch.bincount(
        torch.tensor(written(model, torch.tensor([0]), max_new_tokens=500, **options)), minlength=6
    )
    expected = wanted ** (1 / options.get("temperature", 1.0))
    likeliest = expected.argsort(descending=True)
    expected[likeliest[kept:]] = 0
    expected *= 500 / expected.sum()
    assert (counts[expected == 0] == 0).all()
    drawn = expected > 0
    chi_square = ((counts - expected)[drawn] ** 2 / expected[drawn]).sum()
    assert chi_square < 25.7  # 5 degrees of freedom: exceeded once in 10,000 seeds


def test_the_stop_token_ends_the_text_and_is_not_part_of_it():
    model = build()
    text = written(model, seed=3)
    stop = text[5]
    assert written(model, seed=3, stop_token=stop) == text[: text.index(stop)]


def test_writing_leaves_random_numbers_and_modes_alone_and_builds_no_graph():
    model = build(dropout=0.5).train()
    model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    graphs = []
    model.head.register_forward_hook(lambda _, __, logits: graphs.append(logits.requires_grad))
    state = torch.get_rng_state()
    text = generate(model, PROMPT, max_new_tokens=9)
    for _ in itertools.islice(text, 4):
        assert [module.training for module in model.modules()] == modes
        assert torch.is_grad_enabled()
    text.close()  # abandoned half way
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert graphs == [False] * 4


def test_modes_come_back_when_the_forward_fails():
    model = build().train()

    def fail(*_):
        raise RuntimeError("planted")

    model.norm.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="planted"):
        written(model)
    assert all(module.training for module in model.modules())


def test_the_callers_autocast_applies():
    model, dtypes = build(), set()
    model.head.register_forward_hook(lambda _, __, logits: dtypes.add(logits.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert len(written(model, max_new_tokens=20)) == 20
    assert dtypes == {torch.bfloat16}


@pytest.mark.parametrize(
    ("error", "prompt", "options", "message"),
    [
        (ValueError, torch.tensor([], dtype=torch.long), {}, "tokens are empty.*; give one"),
        (ValueError, torch.zeros(2, 3, dtype=torch.long), {}, r"\[2, 3\].*call generate for each"),
        (ValueError, torch.tensor([1, 17]), {}, r"tokens\[1\] = 17 .* vocabulary of 17.*0 to 16"),
        (TypeError, torch.tensor([1.0]), {}, "torch.float32; token ids must be integers"),
        (ValueError, PROMPT, {"max_new_tokens": -1}, "max_new_tokens=-1 must be at least 0"),
        (ValueError, PROMPT, {"temperature": -0.5}, "temperature=-0.5 must be finite and at least"),
        (ValueError, PROMPT, {"temperature": math.nan}, "temperature=nan must be finite"),
        (ValueError, PROMPT, {"top_k": 0}, "top_k=0 must be at least 1, or None"),
        (ValueError, PROMPT, {"top_p": 0.0}, "top_p=0.0 must be above 0"),
        (ValueError, PROMPT, {"top_p": 1.5}, "top_p=1.5 must be above 0 and at most 1"),
        (ValueError, PROMPT, {"seed": -1}, "seed=-1 must be at least 0"),
        (ValueError, PROMPT, {"stop_token": 17}, "stop_token=17 must be an id from 0 to 16"),
    ],
)
def test_what_cannot_be_used_is_refused_at_the_call_in_one_line(error, prompt, options, message):
    with pytest.raises(error, match=message) as caught:
        generate(build(), prompt, **{"max_new_tokens": 1} | options)
    assert "\n" not in str(caught.value)


def test_logits_that_are_not_finite_are_named():
    model = build()
    with torch.no_grad():
        model.head.weight[5, 0] = math.nan
    with pytest.raises(ValueError, match=r"logits are not finite.*; load a checkpoint"):
        written(model, temperature=0.0)


def test_the_first_token_is_one_of_those_that_are_allowed():
    model = build()
    allowed = [2, 11, 16]
    seen = {
        written(model, first_tokens=allowed, seed=seed, max_new_tokens=1)[0] for seed in range(60)
    }
    assert seen <= set(allowed)
    assert len(seen) > 1
    with torch.no_grad():
        logits = model.eval()(PROMPT[None])[0, -1]
    likeliest = max(allowed, key=lambda token: float(logits[token]))
    (first, second) = written(model, first_tokens=allowed, temperature=0.0, max_new_tokens=2)
    assert first == likeliest
    then = torch.tensor([*PROMPT.tolist(), first])
    assert [second] == written(model, then, temperature=0.0, max_new_tokens=1)
    for wrong in ([17], [-1], []):
        with pytest.raises(ValueError, match="must be one or more ids, 0 to 16"):
            written(model, first_tokens=wrong)


def test_ids_that_the_tokenizer_does_not_have_are_not_drawn():
    model = build()
    with torch.no_grad():
        model.head.weight[11:] = 30 * model.head.weight[4]  # the padding is likeliest by far
    assert max(written(model)) >= 11
    seen = written(model, vocab_size=11, temperature=5.0, max_new_tokens=200)
    assert set(seen) <= set(range(11))
    with torch.no_grad():
        logits = model.eval()(PROMPT[None])[0, -1, :11]
    assert written(model, vocab_size=11, temperature=0.0)[0] == int(logits.argmax())
    assert written(model, vocab_size=17) == written(model)
    for wrong in (0, 18):
        with pytest.raises(ValueError, match=f"vocab_size={wrong} must be 1 to the model's 17"):
            written(model, vocab_size=wrong)
    with pytest.raises(ValueError, match="must be one or more ids, 0 to 10"):
        written(model, vocab_size=11, first_tokens=[11])
    assert max(written(model, torch.tensor([12]), vocab_size=11)) < 11  # a prompt may have them
