"""The reference model: what its arithmetic is, and that nothing looks ahead."""

import cmath
import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from truestep import DeferredLogits, GPTConfig, compute_loss
from truestep.model.attention import KVCache, RotaryPositions, attend, rotate
from truestep.model.gpt import DEFERRED_VOCAB_SIZE, GPT

SMALL = {"vocab_size": 13, "context_length": 12, "num_layers": 2, "num_heads": 4, "width": 16}
SWITCHES = [
    {"num_kv_heads": kv, "qk_norm": qk_norm, "tie_embeddings": tie}
    for kv, qk_norm, tie in itertools.product([1, 2, 4], [False, True], [False, True])
]


def build(seed=0, std=0.3, **settings):
    """Return a small model in evaluation mode whose every weight matters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT(GPTConfig(**SMALL | settings)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=std)
    return model


def some_tokens(*shape, vocab_size=13, seed=0):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# -- An independent transcription in float64, one position and one head at a time ------------------


def plain_norm(x, weight, eps):
    return [
        w * v / math.sqrt(sum(u * u for u in x) / len(x) + eps)
        for v, w in zip(x, weight, strict=True)
    ]


def plain_rotation(x, position, theta):
    half = len(x) // 2
    turned = [
        complex(x[i], x[i + half]) * cmath.exp(1j * position * theta ** (-i / half))
        for i in range(half)
    ]
    return [z.real for z in turned] + [z.imag for z in turned]


def plain_sum(x, y):
    return [a + b for a, b in zip(x, y, strict=True)]


def plain_product(matrix, x):
    return [sum(a * b for a, b in zip(row, x, strict=True)) for row in matrix]


def plain_logits(model, tokens):
    """Return [T][V] logits of one sequence from the model's weights alone."""
    weights = {name: value.tolist() for name, value in model.state_dict().items()}
    c = model.config
    size, groups = c.width // c.num_heads, c.num_heads // c.num_kv_heads
    stream = [weights["embedding.weight"][token] for token in tokens]
    for layer in range(c.num_layers):
        w = {n.split(".", 2)[2]: v for n, v in weights.items() if n.startswith(f"layers.{layer}.")}
        read = {"q": [], "k": [], "v": []}
        for position, x in enumerate(stream):
            x = plain_norm(x, w["attention_norm.weight"], c.norm_eps)
            for name, rows in read.items():
                flat = plain_product(w[f"attention.{name}.weight"], x)
                heads = [flat[i : i + size] for i in range(0, len(flat), size)]
                if name != "v":
                    if c.qk_norm:
                        scale = w[f"attention.{name}_norm.weight"]
                        heads = [plain_norm(head, scale, c.norm_eps) for head in heads]
                    heads = [plain_rotation(head, position, c.rope_theta) for head in heads]
                rows.append(heads)
        for t, x in enumerate(stream):
            joined = []
            for h in range(c.num_heads):
                q = read["q"][t][h]
                scores = [
                    math.exp(sum(map(float.__mul__, q, read["k"][s][h // groups])) / size**0.5)
                    for s in range(t + 1)
                ]
                joined += [
                    sum(e * read["v"][s][h // groups][i] for s, e in enumerate(scores))
                    / sum(scores)
                    for i in range(size)
                ]
            x = plain_sum(x, plain_product(w["attention.o.weight"], joined))
            y = plain_norm(x, w["mlp_norm.weight"], c.norm_eps)
            gate, up = (plain_product(w[f"mlp.{n}.weight"], y) for n in ("gate", "up"))
            hidden = [g / (1 + math.exp(-g)) * u for g, u in zip(gate, up, strict=True)]
            stream[t] = plain_sum(x, plain_product(w["mlp.down.weight"], hidden))
    final = [plain_norm(x, weights["norm.weight"], c.norm_eps) for x in stream]
    return [plain_product(weights["head.weight"], x) for x in final]


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_logits_equal_a_plain_transcription_in_float64(switches):
    model = build(**switches, norm_eps=1e-3, rope_theta=500.0).double()
    tokens = some_tokens(1, 7)
    expected = torch.tensor(plain_logits(model, tokens[0].tolist()), dtype=torch.float64)
    # Logits are of order 1; two orders of summation of 16 terms in float64 differ by 1e-14.
    torch.testing.assert_close(model(tokens)[0], expected, rtol=1e-11, atol=1e-11)


# -- Positions -------------------------------------------------------------------------------------


def test_attention_scores_depend_on_distance_alone():
    rotary = RotaryPositions(64, 8, theta=100.0).double()
    q, k = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned_q = rotate(q.expand(1, 64, 1, 8), *rotary(0, 64))[0, :, 0]
    turned_k = rotate(k.expand(1, 64, 1, 8), *rotary(0, 64))[0, :, 0]
    scores = turned_q @ turned_k.T
    for distance in (-9, 0, 1, 30):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert (scores[1:, 0].diff().abs() > 1e-6).all()  # and on distance they do depend


def test_position_tables_survive_bfloat16_and_are_exact_in_float64():
    angles = [position * 10000.0 ** (-i / 2) for position in range(12) for i in range(2)]
    exact = torch.tensor([math.cos(a) for a in angles], dtype=torch.float64).view(12, 2)
    model = GPT(GPTConfig(**SMALL))
    assert torch.equal(model.rotary.cos, exact.float())
    assert torch.equal(model.bfloat16().rotary.cos, exact.float())
    torch.testing.assert_close(model.double().rotary.cos, exact, rtol=0, atol=1e-15)


# -- Causality and the cache -----------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_a_later_token_never_moves_earlier_logits(switches, precision):
    model, tokens = build(**switches), some_tokens(2, 12)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        before = model(tokens)
        for t in (0, 1, 7, 11):
            changed = tokens.clone()
            changed[:, t] = (tokens[:, t] + 1) % 13
            after = model(changed)
            assert torch.equal(after[:, :t], before[:, :t])
            assert (after[:, t:] != before[:, t:]).any(-1).all()  # everything later does see it


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.1)])
@pytest.mark.parametrize("pieces", [[1] * 12, [5, 1, 1, 1, 4], [12]], ids=str)
def test_cached_logits_equal_the_full_forward(pieces, precision, tolerance):
    model, tokens = build(num_kv_heads=2, qk_norm=True), some_tokens(2, 12)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        full, cache = model(tokens), KVCache()
        parts = [model(piece, cache) for piece in tokens.split(pieces, dim=1)]
    assert [part.shape for part in parts] == [(2, length, 13) for length in pieces]
    # bfloat16 rounds to 2^-8, and the logits are of order 4.
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=0, atol=tolerance)
    assert cache.length == 12


@pytest.mark.parametrize(("num_queries", "num_keys"), [(9, 9), (1, 9), (4, 9)])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_both_ways_to_attend_agree_with_a_float64_average(num_queries, num_keys, kv_heads):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, num_queries, 8, generator=generator).bfloat16()
    k, v = torch.randn(2, 2, kv_heads, num_keys, 8, generator=generator).bfloat16()
    heads = torch.arange(4) // (4 // kv_heads)
    scores = torch.einsum("bhtd,bhsd->bhts", q.double(), k[:, heads].double()) / 8**0.5
    for t in range(num_queries):
        scores[:, :, t, num_keys - num_queries + t + 1 :] = -math.inf
    expected = torch.einsum("bhts,bhsd->bhtd", scores.softmax(-1), v[:, heads].double())
    torch.testing.assert_close(attend(q, k, v).double(), expected, rtol=0.02, atol=0.02)  # bfloat16
    fused = attend(q.double(), k.double(), v.double())
    torch.testing.assert_close(fused, expected, rtol=1e-12, atol=1e-12)


def exact_attention(q, k, v):
    """Attention written out in float64, all queries at once, for as many heads of each."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    scores = torch.einsum("bhtd,bhsd->bhts", q, k) / q.shape[3] ** 0.5
    seen = torch.arange(num_keys) <= torch.arange(num_queries)[:, None] + num_keys - num_queries
    return torch.einsum("bhts,bhsd->bhtd", scores.masked_fill(~seen, -math.inf).softmax(-1), v)


@pytest.mark.parametrize(
    ("num_queries", "num_keys", "backend"),
    [
        *((64, 64, "eager"), (65, 65, "eager"), (200, 230, "eager")),
        *((300, 300, "eager"), (300, 300, "inductor")),
    ],
)
def test_attention_by_blocks_agrees_in_value_and_gradient(num_queries, num_keys, backend):
    generator = torch.Generator().manual_seed(0)

    def draw(length):
        return torch.randn(2, 3, length, 8, generator=generator).bfloat16()

    inputs = [draw(num_queries), draw(num_keys), draw(num_keys)]
    grad = draw(num_queries)
    narrow = [tensor.clone().requires_grad_() for tensor in inputs]
    wide = [tensor.double().requires_grad_() for tensor in inputs]
    compute = torch.compile(attend, fullgraph=True, dynamic=False, backend=backend)
    output, exact = compute(*narrow), exact_attention(*wide)
    output.backward(grad)
    exact.backward(grad.double())
    found = [output.detach(), *(tensor.grad for tensor in narrow)]
    for mine, true in zip(found, [exact.detach(), *(t.grad for t in wide)], strict=True):
        assert mine.dtype == torch.bfloat16
        error = float((mine.double() - true).norm() / true.norm())
        assert error < 6e-3  # bfloat16 rounds to 4e-3 at most, and several roundings add up


def test_attention_by_blocks_is_differentiated_once_and_refuses_a_second_time():
    queries, keys, values = torch.randn(3, 1, 1, 4, 8).bfloat16().unbind()
    output = attend(queries.requires_grad_(), keys, values)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(output.sum(), queries, create_graph=True)


def test_a_block_of_queries_never_sees_a_later_key():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 300, 8, generator=generator).bfloat16()
    output = attend(q, k, v)
    for t in (1, 64, 75, 76, 150, 299):
        k2, v2 = k.clone(), v.clone()
        k2[:, :, t:], v2[:, :, t:] = 7.0, -7.0
        assert torch.equal(attend(q, k2, v2)[:, :, :t], output[:, :, :t])
        assert not torch.equal(attend(q, k2, v2)[:, :, t], output[:, :, t])


# -- Precision and compilation ---------------------------------------------------------------------


class FloatingDtypes(TorchDispatchMode):
    """Collects the floating dtype of every tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                self.seen.add(value.dtype)
        return result


@pytest.mark.parametrize("autocast", [False, True])
def test_a_float64_model_computes_in_float64_only(autocast):
    model = build(qk_norm=True).double().train()
    with FloatingDtypes() as dtypes, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        compute_loss(model(some_tokens(2, 5)), some_tokens(2, 5, seed=1)).backward()
    assert dtypes.seen == {torch.float64}


def test_autocast_gives_a_bfloat16_stream_and_float32_gradients():
    model, tokens, outputs = build().train(), some_tokens(2, 8), {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, __, y, name=name: outputs.__setitem__(name, y))
    expected = model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens)
    logits.float().square().sum().backward()
    assert outputs["head"].shape == (2, 8, 13)  # who looks for the output layer finds it
    streams = [outputs[name].dtype for name in ("layers.0", "layers.1", "norm", "head")]
    assert streams == [torch.bfloat16] * 4
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}
    assert 0 < (logits - expected).norm() / expected.norm() < 0.05


def test_autocast_computes_what_a_bfloat16_copy_of_the_model_computes():
    model, tokens = build(num_kv_heads=2, qk_norm=True).bfloat16().float(), some_tokens(2, 8)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(tokens)
        assert torch.equal(logits, model.bfloat16()(tokens))


@pytest.mark.parametrize("vocab_size", [13, DEFERRED_VOCAB_SIZE])
def test_model_and_loss_compile_whole_under_autocast_and_agree_with_plain(vocab_size):
    model = build(vocab_size=vocab_size, num_kv_heads=2, qk_norm=True, num_layers=1).train()
    tokens, targets = some_tokens(2, 8), some_tokens(2, 8, seed=1)

    def loss_and_gradients(compute):
        model.zero_grad()
        loss = compute(tokens, targets)
        loss.backward()
        return [loss.detach(), *(parameter.grad for parameter in model.parameters())]

    def compute(tokens, targets):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(tokens)
        return compute_loss(logits, targets)

    compiled = torch.compile(compute, fullgraph=True, dynamic=False, backend="aot_eager")
    results = zip(loss_and_gradients(compiled), loss_and_gradients(compute), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in results)  # the same operations


# -- The head of a large vocabulary ----------------------------------------------------------------


def test_deferred_and_plain_logits_agree_in_loss_and_gradients():
    model = build(vocab_size=DEFERRED_VOCAB_SIZE, width=8, num_layers=1, tie_embeddings=True)
    model.double()
    tokens = some_tokens(2, 8, vocab_size=DEFERRED_VOCAB_SIZE)
    targets = some_tokens(2, 8, vocab_size=DEFERRED_VOCAB_SIZE, seed=1)
    results = []
    for training, kind in ((True, DeferredLogits), (False, torch.Tensor)):
        logits = model.train(training)(tokens)
        assert isinstance(logits, kind)
        assert logits.shape == (2, 8, DEFERRED_VOCAB_SIZE)
        model.zero_grad()
        loss = compute_loss(logits, targets)
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for deferred, plain in zip(*results, strict=True):
        torch.testing.assert_close(deferred, plain, rtol=1e-12, atol=1e-14)


def test_deferred_logits_carry_the_compute_dtype_and_leave_the_parameter_its_own():
    model = build(vocab_size=DEFERRED_VOCAB_SIZE, num_layers=1).train()
    with torch.autocast("cpu", torch.bfloat16):
        hidden, weight = model(some_tokens(1, 2))
    assert hidden.dtype == torch.bfloat16
    assert weight is model.head.weight


# -- Parameters ------------------------------------------------------------------------------------


def test_tied_embeddings_are_one_parameter():
    tied, untied = build(tie_embeddings=True), build()
    assert tied.head.weight is tied.embedding.weight
    assert untied.num_parameters - tied.num_parameters == 13 * 16
    assert len(list(tied.parameters())) == len(list(untied.parameters())) - 1


@pytest.mark.parametrize(("layers", "heads", "width"), [(6, 6, 384), (4, 4, 128)])
def test_parameters_follow_the_formula_of_a_transformer(layers, heads, width):
    config = GPTConfig(vocab_size=65, num_layers=layers, num_heads=heads, width=width)
    with torch.device("meta"):
        untied = GPT(config).num_parameters
        tied = GPT(config.model_copy(update={"tie_embeddings": True})).num_parameters
    body = 12 * layers * width**2  # attention 4, SwiGLU 3 x 8/3
    assert untied == pytest.approx(body + 2 * 65 * width, rel=0.01)
    assert tied == pytest.approx(body + 65 * width, rel=0.01)


def test_saved_names_are_those_of_llama_one_to_one_and_hold_no_tables():
    model = GPT(GPTConfig(**SMALL | {"num_layers": 1, "qk_norm": True}))
    assert list(model.state_dict()) == [
        "embedding.weight",
        "layers.0.attention_norm.weight",
        "layers.0.attention.q.weight",
        "layers.0.attention.k.weight",
        "layers.0.attention.v.weight",
        "layers.0.attention.o.weight",
        "layers.0.attention.q_norm.weight",
        "layers.0.attention.k_norm.weight",
        "layers.0.mlp_norm.weight",
        "layers.0.mlp.gate.weight",
        "layers.0.mlp.up.weight",
        "layers.0.mlp.down.weight",
        "norm.weight",
        "head.weight",
    ]


@pytest.mark.parametrize(("residual_init", "scale"), [("scaled", 1 / 8**0.5), ("zero", 0)])
def test_initial_weights_have_the_standard_deviation_of_gpt2(residual_init, scale):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPTConfig(vocab_size=300, num_layers=4, width=128, residual_init=residual_init)
        model = GPT(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all()
            continue
        expected = 0.02 * (scale if name.endswith((".o.weight", ".down.weight")) else 1)
        # Of n >= 16384 draws, the deviation itself deviates by 1/sqrt(2n) = 0.6%.
        assert parameter.std().item() == pytest.approx(expected, rel=0.03), name
        assert abs(parameter.mean().item()) <= 5 * expected / parameter.numel() ** 0.5, name


def test_the_global_seed_decides_the_initial_weights():
    weights = []
    for seed in (0, 0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            weights.append(GPT(GPTConfig(**SMALL)).layers[1].mlp.down.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


# -- Dropout ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dropout", "draws"), [(0.0, False), (0.5, True)])
def test_random_numbers_are_drawn_only_where_something_is_dropped(dropout, draws):
    model, tokens = build(dropout=dropout), some_tokens(2, 12)
    with torch.random.fork_rng():
        state = torch.get_rng_state()
        expected = model(tokens)
        assert torch.equal(torch.get_rng_state(), state)
        logits = model.train()(tokens)
        assert torch.equal(torch.get_rng_state(), state) is not draws
    assert torch.equal(logits, expected) is not draws


def test_dropout_follows_embedding_attention_and_swiglu():
    model, shares = build(dropout=0.5, num_layers=1).train(), []
    model.layers[0].dropout.register_forward_hook(
        lambda _, __, y: shares.append((y == 0).float().mean().item())
    )
    model.dropout.register_forward_hook(
        lambda _, __, y: shares.append((y == 0).float().mean().item())
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model(some_tokens(64, 12))
    assert shares == pytest.approx([0.5, 0.5, 0.5], abs=0.03)


# -- Settings --------------------------------------------------------------------------------------


def test_the_model_keeps_its_config_with_every_auto_in_numbers():
    config = GPT(GPTConfig(vocab_size=7, width=128, num_heads=2)).config
    assert (config.num_kv_heads, config.mlp_width) == (2, 344)  # 341.3 to a multiple of 8
    given = GPTConfig(vocab_size=7, width=16, num_kv_heads=2, mlp_width=10)
    assert GPT(given).config == given


def test_an_unknown_vocabulary_and_too_long_a_context_are_refused_in_one_line():
    with pytest.raises(ValueError, match=r"vocab_size='auto'.*; give .*256 for bytes$"):
        GPT(GPTConfig())
    with pytest.raises(ValueError, match="13 tokens are more than context_length=12; give fewer"):
        build()(some_tokens(1, 13))
    cache = KVCache()
    build()(some_tokens(1, 12), cache)
    with pytest.raises(ValueError, match="13 tokens are more than context_length=12"):
        build()(some_tokens(1, 1), cache)
