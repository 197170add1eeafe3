"""Laws 1 to 3 and 6 to 10: the loss against float64, closed forms and its own other paths."""

import math

import pytest
import torch
from torch import nn

from truestep import IGNORE_INDEX, DeferredLogits, compute_loss


def random_case(seed, dtype=torch.float32, ignored=0.2):
    generator = torch.Generator().manual_seed(seed)
    batch, length, vocab = (int(torch.randint(1, n, (), generator=generator)) for n in (6, 40, 300))
    scale = 10.0 ** float(torch.rand((), generator=generator) * 3 - 2)
    logits = (torch.randn(batch, length, vocab, generator=generator) * scale).to(dtype)
    targets = torch.randint(vocab, (batch, length), generator=generator)
    hide = torch.rand(batch, length, generator=generator) < ignored
    hide[0, 0] = False
    return logits, targets.masked_fill(hide, IGNORE_INDEX)


def float64_loss(logits, targets):
    """Log-sum-exp written out, independent of torch's cross-entropy."""
    logits = logits.double()
    top = logits.max(dim=-1, keepdim=True).values
    normaliser = (logits - top).exp().sum(-1).log() + top[..., 0]
    valid = targets != IGNORE_INDEX
    picked = logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return (normaliser - picked)[valid].sum() / valid.sum()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_loss_equals_float64_log_sum_exp_on_200_random_shapes(dtype, tolerance):
    for seed in range(200):
        logits, targets = random_case(seed, dtype)
        loss = compute_loss(logits, targets)
        assert loss.dtype == dtype
        assert float(loss) == pytest.approx(float(float64_loss(logits, targets)), rel=tolerance)


@pytest.mark.parametrize("vocab", [2, 65, 50257])
def test_uniform_logits_cost_log_vocabulary(vocab):
    targets = torch.arange(6).reshape(2, 3) % vocab
    loss = compute_loss(torch.zeros(2, 3, vocab), targets)
    assert float(loss) == pytest.approx(math.log(vocab), rel=1e-6)


@pytest.mark.parametrize("margin", [-3.0, 0.5, 12.0])
def test_one_margin_costs_its_closed_form(margin):
    logits = torch.zeros(1, 1, 100, dtype=torch.float64)
    logits[0, 0, 7] = margin
    loss = compute_loss(logits, torch.tensor([[7]]))
    assert float(loss) == pytest.approx(math.log1p(99 * math.exp(-margin)), rel=1e-12)


@pytest.mark.parametrize("constant", [-100.0, 3.0, 100.0])
def test_adding_a_constant_to_all_logits_changes_nothing(constant):
    for seed in range(20):
        logits, targets = random_case(seed)
        moved = compute_loss(logits + constant, targets) - compute_loss(logits, targets)
        assert abs(float(moved)) <= 1e-5


def test_gradient_is_softmax_minus_onehot_over_the_count():
    for seed in range(30):
        logits, targets = random_case(seed)
        logits.requires_grad_()
        compute_loss(logits, targets).backward()
        valid = targets != IGNORE_INDEX
        count = int(valid.sum())
        onehot = nn.functional.one_hot(targets.clamp(min=0), logits.shape[-1])
        exact = (logits.detach().double().softmax(-1) - onehot) / count * valid[..., None]
        assert float((logits.grad - exact).abs().max()) <= 1e-6 / count
        assert float(logits.grad.double().sum(-1).abs().max()) <= 1e-5 / count
        assert bool((logits.grad[~valid] == 0).all())


def test_gradcheck_holds_in_float64():
    logits, targets = random_case(3, torch.float64)
    logits = logits[:2, :3, :7].clone().requires_grad_()
    targets = targets[:2, :3].clamp(max=6)
    assert torch.autograd.gradcheck(lambda x: compute_loss(x, targets), (logits,))


def test_changing_ignored_rows_leaves_the_loss_bit_identical_and_deleting_them_keeps_it():
    for seed in range(20):
        logits, targets = random_case(seed, ignored=0.5)
        loss = compute_loss(logits, targets)
        ignored = targets == IGNORE_INDEX
        changed = logits.clone()
        changed[ignored] = 1e4
        assert torch.equal(compute_loss(changed, targets), loss)
        kept = compute_loss(logits[~ignored][None], targets[~ignored][None])
        assert float(kept) == pytest.approx(float(loss), rel=1e-6)


def test_all_ignored_costs_exactly_zero_with_zero_gradient():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    loss = compute_loss(logits, torch.full((2, 3), IGNORE_INDEX))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert bool((logits.grad == 0).all())


def test_huge_logits_are_finite_and_right():
    logits = torch.tensor([[[1e4, 0.0, -1e4], [0.0, 1e4, 9999.0]]])
    targets = torch.tensor([[1, 2]])
    expected = (1e4 + (1.0 + math.log1p(math.exp(-1.0)))) / 2
    assert float(compute_loss(logits, targets)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits_cost_what_float64_says_of_the_same_rounded_logits(dtype):
    for seed in range(40):
        logits, targets = random_case(seed, dtype)
        loss = compute_loss(logits, targets)
        assert loss.dtype == torch.float32
        assert float(loss) == pytest.approx(float(float64_loss(logits, targets)), rel=2e-6)


def test_num_tokens_as_number_or_tensor_divides_the_sum():
    logits, targets = random_case(1)
    total = compute_loss(logits, targets, num_tokens=1)
    assert torch.equal(compute_loss(logits, targets, num_tokens=7), total / 7)
    assert torch.equal(compute_loss(logits, targets, num_tokens=torch.tensor(7)), total / 7)


@pytest.mark.parametrize("rows", [3, 1024, 2500])
def test_deferred_logits_agree_with_plain_logits_in_value_and_gradient(rows):
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(1, rows, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(31, 6, generator=generator, dtype=torch.float64)
    targets = torch.randint(31, (1, rows), generator=generator)
    targets[0, ::3] = IGNORE_INDEX
    results = []
    for deferred in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logits = DeferredLogits(h, w) if deferred else h @ w.T
        loss = compute_loss(logits, targets)
        loss.backward()
        results.append((loss.detach(), h.grad, w.grad))
    for chunked, plain in zip(*results, strict=True):
        torch.testing.assert_close(chunked, plain, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_compiled_loss_agrees_with_the_plain_one(backend):
    logits, targets = random_case(5)
    compiled = torch.compile(compute_loss, fullgraph=True, dynamic=False, backend=backend)
    results = []
    for function in (compute_loss, compiled):
        leaf = logits.clone().requires_grad_()
        loss = function(leaf, targets)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("logits", "targets", "error", "message"),
    [
        (torch.zeros(2, 5), torch.zeros(2, dtype=torch.long), ValueError, r"\[B, T, V\]"),
        (torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.long), ValueError, r"\[2, 3\]"),
        (torch.zeros(2, 3, 5), torch.zeros(2, 3), TypeError, "integer token ids"),
        (torch.zeros(2, 3, 5).long(), torch.zeros(2, 3).long(), TypeError, "floating point"),
    ],
)
def test_logits_and_targets_that_disagree_are_refused_in_one_line(logits, targets, error, message):
    with pytest.raises(error, match=message) as caught:
        compute_loss(logits, targets)
    assert "\n" not in str(caught.value)
