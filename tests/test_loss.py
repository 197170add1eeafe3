"""Laws 1 to 3 and 6 to 10: the loss against float64, closed forms and its own other paths."""

import math
import subprocess
import sys

import pytest
import torch
from torch import nn

import truestep.loss as loss_module
from truestep import IGNORE_INDEX, DeferredLogits, compute_loss
from truestep.training.footprint import _Ledger
from truestep.training.probe import logits_of


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


# -- Deferred logits -------------------------------------------------------------------------------


def deferred_case(rows, *, dtype=torch.float64, vocab=31, width=6):
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(1, rows, width, generator=generator, dtype=dtype)
    weight = torch.randn(
        vocab, width, generator=generator, dtype=torch.promote_types(dtype, torch.float32)
    )
    targets = torch.randint(vocab, (1, rows), generator=generator)
    targets[0, ::3] = IGNORE_INDEX
    return hidden, weight, targets


def loss_and_gradients(form, hidden, weight, targets, compute=compute_loss):
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = compute(form(h, w), targets)
    loss.backward()
    return loss.detach(), h.grad, w.grad


def compiled_by(backend):
    if backend is None:
        return compute_loss
    return torch.compile(compute_loss, fullgraph=True, dynamic=False, backend=backend)


def plain(hidden, weight):
    return hidden @ weight.to(hidden.dtype).T


@pytest.mark.parametrize(
    ("rows", "logits_at_a_time"), [(3, 1), (3, 2**25), (1024, 31 * 700), (2500, 31 * 700)]
)
def test_deferred_logits_agree_with_plain_logits_in_value_and_gradient(
    rows, logits_at_a_time, monkeypatch
):
    monkeypatch.setattr(loss_module, "LOGITS_PER_CHUNK", logits_at_a_time)
    case = deferred_case(rows)
    results = [loss_and_gradients(form, *case) for form in (DeferredLogits, plain)]
    for chunked, whole in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", [None, "inductor"])
def test_deferred_logits_in_bfloat16_are_as_near_to_float64_as_plain_ones(backend, monkeypatch):
    monkeypatch.setattr(loss_module, "LOGITS_PER_CHUNK", 512 * 90)  # the last has fewer rows
    hidden, weight, targets = deferred_case(600, dtype=torch.bfloat16, vocab=512, width=64)
    weight = weight.bfloat16().float()  # exact in both, so that only the computation differs
    exact = loss_and_gradients(plain, hidden.double(), weight.double(), targets)

    def errors(form, compute):
        found = loss_and_gradients(form, hidden, weight, targets, compute)
        assert [tensor.dtype for tensor in found] == [torch.float32, torch.bfloat16, torch.float32]
        return [
            float((mine.double() - true).norm() / true.norm())
            for mine, true in zip(found, exact, strict=True)
        ]

    deferred, whole = errors(DeferredLogits, compiled_by(backend)), errors(plain, compute_loss)
    assert deferred[0] <= 1e-4  # the logits are rounded to bfloat16, the loss of them is not
    assert all(mine <= 1.25 * theirs for mine, theirs in zip(deferred[1:], whole[1:], strict=True))


@pytest.mark.parametrize("backend", [None, "inductor"])
def test_gradients_of_confident_deferred_logits_in_bfloat16_do_not_cancel(backend):
    """Each label has a probability of 0.999: the gradient is what is left of 1 minus that."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.zeros(1, 64, 64, dtype=torch.bfloat16)
    hidden[0].fill_diagonal_(1.0)
    weight = torch.randn(64, 64, generator=generator).bfloat16().float() / 64
    weight.fill_diagonal_(12.0)
    targets = torch.arange(64)[None]
    exact = loss_and_gradients(plain, hidden.double(), weight.double(), targets)
    assert 0.999 < float((-exact[0]).exp()) < 1
    found = loss_and_gradients(DeferredLogits, hidden, weight, targets, compiled_by(backend))
    for mine, true in zip(found[1:], exact[1:], strict=True):
        assert float((mine.double() - true).norm() / true.norm()) < 6e-3  # two roundings


def test_the_deferred_loss_is_that_of_the_rounded_logits():
    hidden, weight, targets = deferred_case(600, dtype=torch.bfloat16, vocab=512, width=64)
    logits = plain(hidden, weight)
    for requires_grad in (True, False):
        deferred = DeferredLogits(hidden.clone().requires_grad_(requires_grad), weight)
        loss = float(compute_loss(deferred, targets).detach())
        assert loss == pytest.approx(float(float64_loss(logits, targets)), rel=2e-6)


def test_gradcheck_holds_for_deferred_logits():
    hidden, weight, targets = deferred_case(5, vocab=7, width=3)
    assert torch.autograd.gradcheck(
        lambda h, w: compute_loss(DeferredLogits(h, w), targets),
        (hidden.requires_grad_(), weight.requires_grad_()),
    )


def test_ignored_rows_of_deferred_logits_get_exactly_no_gradient():
    hidden, weight, targets = deferred_case(40)
    _, grad, _ = loss_and_gradients(DeferredLogits, hidden, weight, targets)
    assert bool((grad[targets == IGNORE_INDEX] == 0).all())
    assert bool((grad[targets != IGNORE_INDEX] != 0).all())
    nothing = torch.full_like(targets, IGNORE_INDEX)
    loss, *grads = loss_and_gradients(DeferredLogits, hidden, weight, nothing)
    assert float(loss) == 0.0
    assert all(bool((grad == 0).all()) for grad in grads)


@pytest.mark.parametrize("backend", [None, "inductor"])
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_half_of_deferred_logits_may_be_frozen(frozen, backend, monkeypatch):
    monkeypatch.setattr(loss_module, "LOGITS_PER_CHUNK", 31 * 16)
    hidden, weight, targets = deferred_case(40)
    _, hidden_grad, weight_grad = loss_and_gradients(plain, hidden, weight, targets)
    hidden.requires_grad_(frozen != "hidden")
    weight.requires_grad_(frozen != "weight")
    compiled_by(backend)(DeferredLogits(hidden, weight), targets).backward()
    for tensor, expected in ((hidden, hidden_grad), (weight, weight_grad)):
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad, expected, rtol=1e-12, atol=1e-14)
        else:
            assert tensor.grad is None


def test_huge_deferred_logits_are_finite_and_overflow_is_not_hidden():
    weight = torch.tensor([[1e4], [0.0], [-1e4]])
    targets = torch.tensor([[1, 2]])
    loss, *grads = loss_and_gradients(DeferredLogits, torch.ones(1, 2, 1), weight, targets)
    assert float(loss) == 1.5e4
    assert all(bool(grad.isfinite().all()) for grad in grads)
    loss, *_ = loss_and_gradients(DeferredLogits, torch.full((1, 2, 1), 1e38), weight, targets)
    assert not loss.isfinite()


@pytest.mark.parametrize("label", [31, -1, -31, -101])
@pytest.mark.parametrize("with_gradient", [True, False])
def test_a_target_outside_the_vocabulary_of_deferred_logits_is_an_index_error(label, with_gradient):
    hidden, weight, targets = deferred_case(4)
    targets[0, 1] = label
    with pytest.raises(IndexError):
        compute_loss(DeferredLogits(hidden.requires_grad_(with_gradient), weight), targets)
    with pytest.raises(IndexError):
        compute_loss(plain(hidden, weight), targets)


@pytest.mark.parametrize("backend", [None, "inductor"])
def test_a_small_loss_of_huge_deferred_logits_is_not_rounded_away(backend):
    weight = torch.tensor([[1e4], [1e4 - 3]])
    loss, *_ = loss_and_gradients(
        DeferredLogits, torch.ones(1, 1, 1), weight, torch.tensor([[0]]), compiled_by(backend)
    )
    assert float(loss) == pytest.approx(math.log1p(math.exp(-3)), rel=2e-6)


def test_deferred_logits_in_float16_have_finite_gradients_near_the_plain_ones():
    hidden, weight, targets = deferred_case(5, dtype=torch.float16, vocab=90_000, width=8)
    found = loss_and_gradients(DeferredLogits, hidden, weight * 0.01, targets)
    exact = loss_and_gradients(plain, hidden.double(), weight.double() * 0.01, targets)
    for mine, true in zip(found, exact, strict=True):
        assert float((mine.double() - true).norm() / true.norm()) < 2e-3


@pytest.mark.parametrize(
    ("dtype", "under"), [(torch.float32, torch.bfloat16), (torch.float64,) * 2]
)
def test_deferred_logits_of_a_model_under_autocast_are_multiplied_as_its_head_would(dtype, under):
    hidden, weight, _ = deferred_case(4, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert logits_of(DeferredLogits(hidden, weight)).hidden.dtype == under
    assert logits_of(DeferredLogits(hidden, weight)).hidden.dtype == dtype


def test_deferred_logits_without_a_row_cost_zero():
    hidden = torch.zeros(0, 3, 4, requires_grad=True)
    loss = compute_loss(DeferredLogits(hidden, torch.ones(5, 4)), torch.zeros(0, 3).long())
    loss.backward()
    assert float(loss.detach()) == 0


def test_deferred_logits_are_differentiated_once_and_refuse_a_second_time():
    hidden, weight, targets = deferred_case(4)
    loss = compute_loss(DeferredLogits(hidden.requires_grad_(), weight), targets)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_the_peak_memory_of_deferred_logits_grows_only_by_the_rows_themselves(monkeypatch):
    monkeypatch.setattr(loss_module, "LOGITS_PER_CHUNK", 4096 * 8)
    peaks = {}
    for rows in (64, 256):
        case = deferred_case(rows, dtype=torch.float32, vocab=4096, width=4)
        with _Ledger(case) as ledger:
            loss_and_gradients(DeferredLogits, *case)
        peaks[rows] = ledger.peak
    assert peaks[64] > 8 * 4096 * 4
    assert peaks[256] - peaks[64] <= 5 * (256 - 64) * 4 * 4  # copies of hidden and its gradient


# What the allocator gave, not resident memory, which depends on the system's own reclaiming.
COMPILED = """
import itertools, sys, torch
from truestep import DeferredLogits, compute_loss, loss

loss.LOGITS_PER_CHUNK = 4 * 40_000  # four rows
rows = 4 * int(sys.argv[1])
hidden = torch.randn(1, rows, 64).bfloat16().requires_grad_()
weight = torch.randn(40_000, 64).requires_grad_()
targets = torch.randint(40_000, (1, rows))
call = torch.compile(lambda: compute_loss(DeferredLogits(hidden, weight), targets), fullgraph=True)
call()
on_cpu = [torch.profiler.ProfilerActivity.CPU]
with torch.profiler.profile(activities=on_cpu, profile_memory=True) as p:
    call()
events = [e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
held = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
print(max(held) // 1024)
"""


@pytest.mark.xdist_group("compile")
def test_the_peak_memory_of_compiled_deferred_logits_does_not_grow_with_their_chunks():
    def peak_kib(chunks):
        command = [sys.executable, "-W", "ignore", "-c", COMPILED, str(chunks)]
        done = subprocess.run(command, capture_output=True, check=True, text=True)
        return int(done.stdout.splitlines()[-1])

    of_the_head = 40_000 * 64 * 4 / 1024  # 10 MiB of sums: the compiler kept one for each chunk
    assert peak_kib(80) - peak_kib(4) < 0.1 * of_the_head


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
