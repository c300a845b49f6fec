import pytest
import torch
from torch import nn

from util.ema import EMATeacher, ema_decay_at


def test_decay_ramps_over_the_first_hundred_epochs():
    assert ema_decay_at(0) == 0.999
    assert ema_decay_at(50) == pytest.approx(0.99945)
    assert ema_decay_at(100) == ema_decay_at(1500) == 0.9999
    assert ema_decay_at(3, 0.9, 0.99, 0) == 0.99


def test_the_teacher_follows_and_takes_no_gradient():
    student = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
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
    student = nn.Linear(3, 3)
    teacher = EMATeacher(student)
    weight = student.weight.clone()
    teacher.update(0.5)
    assert torch.equal(student.weight, weight)
    assert student.weight.requires_grad
