import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdar.algorithms.distillation import compute_gated_distillation, compute_teacher_gap
from sdar.algorithms.gates import compute_gate
from sdar.algorithms.reductions import masked_mean
from sdar.algorithms.schedules import SCHEDULES
from sdar.algorithms.shaping import SHAPINGS
from sdar.algorithms.terms.opsd import compute_reverse_kl_distillation
from sdar.algorithms.terms.skill_sd import compute_skill_sd
from sdar.config import MethodConfig

from .builders import central_difference, make_inputs

STUDENT, TEACHER = [-1.0, -2.0, -0.5, -3.0], [-0.5, -2.5, -0.5, -1.0]
MASK = torch.tensor([True, True, True, False])


def sdar_loss(student, teacher=TEACHER, mask=MASK, sharpness=5.0):
    gap = compute_teacher_gap(student, torch.as_tensor(teacher, dtype=student.dtype), mask)
    gate = compute_gate("gap", make_inputs(gap), sharpness)
    return masked_mean(
        compute_gated_distillation(student, gap, gate), mask, denominator=int(mask.sum())
    )


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


def test_the_gap_sends_no_gradient():
    student = torch.tensor(STUDENT, requires_grad=True)
    gap = compute_teacher_gap(student, torch.tensor(TEACHER, requires_grad=True), MASK)
    assert not gap.requires_grad


def test_reverse_kl_lowers_what_the_teacher_finds_less_likely_and_bounds_the_gap():
    student = torch.tensor([-1.0, -2.0, -30.0, -1.0], requires_grad=True)
    gap = compute_teacher_gap(
        student, torch.tensor([-0.5, -2.5, -1.0, -90.0]), torch.ones(4, dtype=torch.bool)
    )
    loss = compute_reverse_kl_distillation(student, gap)
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
    (student.detach().exp() * compute_reverse_kl_distillation(student, gap)).sum().backward()
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
    loss = compute_skill_sd(student, gap, behavior)
    loss.sum().backward()
    torch.testing.assert_close(loss, live(student))
    numeric = central_difference(lambda x: live(x).sum(), student.detach())
    torch.testing.assert_close(student.grad, numeric, atol=1e-6, rtol=1e-6)


def test_skill_sd_stays_finite_far_off():
    student = torch.tensor([-200.0, -0.1], requires_grad=True)
    gap = compute_teacher_gap(
        student, torch.tensor([-0.1, -200.0]), torch.ones(2, dtype=torch.bool)
    )
    compute_skill_sd(student, gap, torch.tensor([-1.0, -200.0])).sum().backward()
    assert torch.isfinite(student.grad).all()


def test_rlsd_mixing_falls_linearly_to_zero():
    settings = MethodConfig(rlsd={"mixing": 0.5, "decay_updates": 100})
    factors = [SCHEDULES["rlsd_decay"](update, settings) for update in (0, 50, 100, 500)]
    assert [settings.rlsd.mixing * factor for factor in factors] == [0.5, 0.25, 0.0, 0.0]


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
    settings = MethodConfig(rlsd={"mixing": 0.5, "clip": 0.2})
    got = SHAPINGS["rlsd"](make_inputs(gap, advantages=advantages), settings)
    assert got.tolist() == pytest.approx(want, rel=1e-6)
    faded = make_inputs(gap, advantages=advantages, teacher_weight=0.0)
    assert torch.equal(SHAPINGS["rlsd"](faded, settings), advantages)
