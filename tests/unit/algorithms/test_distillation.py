import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdar.algorithms.distillation import (
    compute_gate,
    compute_gated_distillation,
    compute_reverse_kl_distillation,
    compute_rlsd_advantages,
    compute_rlsd_mixing,
    compute_skill_sd,
    compute_teacher_gap,
)
from sdar.algorithms.reductions import masked_mean

from .builders import central_difference

STUDENT, TEACHER = [-1.0, -2.0, -0.5, -3.0], [-0.5, -2.5, -0.5, -1.0]
MASK = torch.tensor([True, True, True, False])


def sdar_loss(student, teacher=TEACHER, mask=MASK, sharpness=5.0):
    gap = compute_teacher_gap(student, torch.as_tensor(teacher, dtype=student.dtype), mask)
    gate = compute_gate("gap", gap, torch.zeros_like(gap), sharpness)
    return masked_mean(
        compute_gated_distillation(student, gap, gate), mask, denominator=int(mask.sum())
    )


def test_gap_gate_vector():
    gaps = torch.tensor([-1.0, -0.5, -0.2, 0.0, 0.2, 0.5, 1.0])
    want = [0.006693, 0.075858, 0.268941, 0.5, 0.731059, 0.924142, 0.993307]
    assert compute_gate("gap", gaps, torch.zeros(7), 5.0).tolist() == pytest.approx(want, abs=1e-6)


def test_sdar_loss_and_gradient_vector():
    student = torch.tensor(STUDENT, requires_grad=True)
    loss = sdar_loss(student)
    loss.backward()
    assert loss.item() == pytest.approx(0.141381, abs=1e-6)
    assert student.grad.tolist() == pytest.approx([-0.308047, -0.025286, -0.166667, 0.0], abs=1e-6)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_teacher_values_under_the_mask_change_nothing(poison):
    clean, poisoned = (
        torch.tensor(STUDENT, requires_grad=True),
        torch.tensor(STUDENT, requires_grad=True),
    )
    sdar_loss(clean).backward()
    loss = sdar_loss(poisoned, teacher=[*TEACHER[:3], poison])
    loss.backward()
    assert loss.item() == sdar_loss(clean).item()
    assert torch.equal(clean.grad, poisoned.grad)


def test_agreeing_teacher_gives_zero_loss_and_still_half_a_gradient():
    student = torch.tensor(STUDENT, requires_grad=True)
    loss = sdar_loss(student, teacher=STUDENT, mask=torch.ones(4, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad.tolist() == [-0.125] * 4  # -0.5 / N


@given(st.lists(st.floats(-30, 0, width=32), min_size=4, max_size=4))
def test_gated_gradient_always_raises_the_sampled_token(teacher):
    student = torch.tensor(STUDENT, requires_grad=True)
    sdar_loss(student, teacher=teacher).backward()
    assert (student.grad <= 0).all()


@given(st.lists(st.floats(-30, 0, width=32), min_size=4, max_size=4))
def test_at_sharpness_zero_the_gradient_does_not_depend_on_the_teacher(teacher):
    student = torch.tensor(STUDENT, requires_grad=True)
    sdar_loss(student, teacher=teacher, sharpness=0.0).backward()
    assert student.grad.tolist() == pytest.approx([-0.5 / 3] * 3 + [0.0])


@given(st.lists(st.floats(-30, 0, width=32), min_size=4, max_size=4))
def test_constant_gates_gradient_does_not_depend_on_the_teacher(teacher):
    student = torch.tensor(STUDENT, requires_grad=True)
    gap = compute_teacher_gap(student, torch.tensor(teacher), torch.ones(4, dtype=torch.bool))
    compute_gated_distillation(student, gap, 1.0).sum().backward()
    assert student.grad.tolist() == [-1.0] * 4


def test_gap_and_gates_send_no_gradient():
    student, entropy = torch.tensor(STUDENT, requires_grad=True), torch.ones(4, requires_grad=True)
    gap = compute_teacher_gap(student, torch.tensor(TEACHER, requires_grad=True), MASK)
    assert not gap.requires_grad
    assert not any(
        compute_gate(kind, gap, entropy, 5.0).requires_grad
        for kind in ("gap", "entropy", "soft_or")
    )


def test_entropy_gate_never_falls_under_a_half():
    entropy = torch.tensor([0.0, 0.3, 2.0])
    want = [1 / (1 + math.exp(-5 * h)) for h in entropy.tolist()]
    assert compute_gate("entropy", torch.full((3,), -9.0), entropy, 5.0).tolist() == pytest.approx(
        want
    )


def test_soft_or_gate_is_the_published_one_with_its_opening_at_high_entropy():
    gap, entropy = torch.tensor([0.2, -1.0, -1.0]), torch.tensor([0.5, 0.0, 2.0])
    # 1 - .5 * .8 = .6;  1 - 1 * 2 = -1;  1 - (-1) * 2 = 3: wide open although the teacher disagrees
    want = [1 / (1 + math.exp(-5 * score)) for score in (0.6, -1.0, 3.0)]
    assert compute_gate("soft_or", gap, entropy, 5.0).tolist() == pytest.approx(want)


def test_reverse_kl_lowers_what_the_teacher_finds_less_likely_and_bounds_the_gap():
    student = torch.tensor([-1.0, -2.0, -30.0, -1.0], requires_grad=True)
    gap = compute_teacher_gap(
        student, torch.tensor([-0.5, -2.5, -1.0, -90.0]), torch.ones(4, dtype=torch.bool)
    )
    loss = compute_reverse_kl_distillation(student, gap, gap_bound=10.0)
    loss.sum().backward()
    assert student.grad.tolist() == [-0.5, 0.5, -10.0, 10.0]
    assert loss.tolist() == [0.5, -1.0, 300.0, -10.0]


def test_reverse_kl_estimates_the_gradient_of_the_exact_reverse_kl():
    """Summed over the vocabulary with the student's own probabilities, the sampled gradient is the
    exact one.
    """
    logits = torch.tensor([0.3, -1.0, 2.0, 0.1], dtype=torch.float64, requires_grad=True)
    teacher = torch.log_softmax(torch.tensor([1.0, 0.5, -0.2, 0.0], dtype=torch.float64), -1)

    def exact(x):
        student = torch.log_softmax(x, -1)
        return (student.exp() * (student - teacher)).sum()

    student = torch.log_softmax(logits, -1)
    gap = compute_teacher_gap(student, teacher, torch.ones(4, dtype=torch.bool))
    (
        student.detach().exp() * compute_reverse_kl_distillation(student, gap, gap_bound=10.0)
    ).sum().backward()
    torch.testing.assert_close(
        logits.grad, central_difference(exact, logits.detach()), atol=1e-7, rtol=1e-6
    )


def test_skill_sd_by_hand_and_by_finite_differences():
    teacher, behavior = [-0.5, -2.5, -0.5, -1.0], [-1.2, -2.0, -0.1, -3.5]
    teacher, behavior = (
        torch.tensor(teacher, dtype=torch.float64),
        torch.tensor(behavior, dtype=torch.float64),
    )

    def live(
        student,
    ):  # the formula with T held fixed: what the gap must reproduce in value and gradient
        log_ratio = student - teacher
        return (student - behavior).exp() * ((-log_ratio).exp() - 1 + log_ratio)

    student = torch.tensor(STUDENT, dtype=torch.float64, requires_grad=True)
    gap = compute_teacher_gap(student, teacher, torch.ones(4, dtype=torch.bool))
    loss = compute_skill_sd(student, gap, behavior, gap_bound=20.0, log_ratio_bound=10.0)
    loss.sum().backward()
    torch.testing.assert_close(loss, live(student))
    numeric = central_difference(lambda x: live(x).sum(), student.detach())
    torch.testing.assert_close(student.grad, numeric, atol=1e-6, rtol=1e-6)


def test_skill_sd_stays_finite_far_off():
    student = torch.tensor([-200.0, -0.1], requires_grad=True)
    gap = compute_teacher_gap(
        student, torch.tensor([-0.1, -200.0]), torch.ones(2, dtype=torch.bool)
    )
    compute_skill_sd(
        student, gap, torch.tensor([-1.0, -200.0]), gap_bound=20.0, log_ratio_bound=10.0
    ).sum().backward()
    assert torch.isfinite(student.grad).all()


def test_rlsd_mixing_falls_linearly_to_zero():
    assert [compute_rlsd_mixing(0.5, 100, update) for update in (0, 50, 100, 500)] == [
        0.5,
        0.25,
        0.0,
        0.0,
    ]


def test_rlsd_shifts_credit_within_its_clip_and_keeps_signs():
    advantages, gap = (
        torch.tensor([2.0, 2.0, -2.0, -2.0, 0.0]),
        torch.tensor([0.1, 900.0, 0.1, -900.0, 5.0]),
    )
    want = [
        2 * (0.5 + 0.5 * math.exp(0.1)),
        2 * 1.1,
        -2 * (0.5 + 0.5 * math.exp(-0.1)),
        -2 * 1.1,
        0.0,
    ]
    got = compute_rlsd_advantages(advantages, gap, mixing=0.5, clip=0.2)
    assert got.tolist() == pytest.approx(want, rel=1e-6)
    assert torch.equal(compute_rlsd_advantages(advantages, gap, mixing=0.0, clip=0.2), advantages)
