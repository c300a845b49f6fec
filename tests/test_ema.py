import torch
from torch import nn

from util.ema import EMATeacher


def student_of(*layers):
    """A student with the one method that a teacher needs."""
    student = nn.Sequential(*layers)
    student.score_patches = student.forward
    return student


def test_the_teacher_follows_and_takes_no_gradient():
    student = student_of(nn.Linear(4, 4), nn.BatchNorm1d(4))
    teacher = EMATeacher(student)
    assert not teacher.module.training
    assert not any(p.requires_grad for p in teacher.module.parameters())
    before = teacher.module[0].weight.clone()
    with torch.no_grad():
        student[0].weight.add_(1.0)
        student[1].running_mean.fill_(3.0)
    teacher.update(0.9)
    torch.testing.assert_close(teacher.module[0].weight, before + 0.1)
    assert torch.equal(teacher.module[1].running_mean, student[1].running_mean)
    assert teacher.module[1].num_batches_tracked == student[1].num_batches_tracked


def test_the_student_is_left_alone():
    student = student_of(nn.Linear(3, 3))
    teacher = EMATeacher(student)
    weight = student[0].weight.clone()
    teacher.update(0.5)
    assert torch.equal(student[0].weight, weight)
    assert student[0].weight.requires_grad


def test_a_step_that_the_optimizer_skipped_leaves_the_teacher_finite():
    """The student is unchanged by such a step, so the teacher moves towards a finite student."""
    student = student_of(nn.Linear(3, 3))
    teacher = EMATeacher(student)
    optimizer = torch.optim.AdamW(student.parameters(), fused=True)
    with torch.no_grad():
        student[0].weight.add_(1.0)
    before, target = teacher.module[0].weight.clone(), student[0].weight.clone()
    student[0].weight.grad = torch.full_like(student[0].weight, torch.nan)
    optimizer.found_inf = torch.ones(())  # as `Amp.step` tells the fused kernel
    optimizer.step()
    teacher.update(0.9)
    assert torch.equal(student[0].weight, target)
    torch.testing.assert_close(teacher.module[0].weight, before + 0.1)


def test_the_average_is_that_of_torch_lerp():
    student = student_of(nn.Linear(64, 64))
    teacher = EMATeacher(student)
    with torch.no_grad():
        student[0].weight.normal_()
    expected = torch.lerp(teacher.module[0].weight, student[0].weight, 1.0 - 0.999)
    teacher.update(0.999)
    assert torch.equal(teacher.module[0].weight, expected)
