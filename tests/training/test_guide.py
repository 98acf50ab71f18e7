"""The guide's terms: one pass sees what the student answers, the teacher stays as it is, exits are weighed by depth."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tinyusfm_edge.models.early_exit import all_exits
from tinyusfm_edge.models.encoder import EncoderShape
from tinyusfm_edge.models.student import StudentConfig, build_student
from tinyusfm_edge.models.teachers.dinov2 import Dinov2
from tinyusfm_edge.training.adapt.config import AdaptConfig
from tinyusfm_edge.training.adapt.guide import Guide, exits_loss, observe
from tinyusfm_edge.training.adapt.lora import TaskTeacher

SEGMENT = StudentConfig(image_size=32, width=48, heads=3, drop_path=0.0)
CLASSIFY = StudentConfig(task="classify", num_classes=3, image_size=32, width=48, heads=3, drop_path=0.0, exits=(5, 9))
IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def teacher(task: str, outputs: int) -> TaskTeacher:
    torch.manual_seed(1)
    encoder = Dinov2(EncoderShape(width=24, depth=12, heads=3, patch=14, grid=2, scale="timm"))
    return TaskTeacher(encoder, task=task, outputs=outputs, image_hw=(32, 32), rank=0)


@pytest.mark.parametrize("config", [SEGMENT, CLASSIFY], ids=lambda config: config.task)
def test_one_pass_sees_what_the_student_answers(config: StudentConfig) -> None:
    student = build_student(config).eval()
    with torch.no_grad():
        seen = observe(student, IMAGE)
        torch.testing.assert_close(seen.logits, student(IMAGE))
        if config.exits:
            torch.testing.assert_close(torch.stack([*seen.early, seen.logits]), all_exits(student, IMAGE))  # type: ignore[arg-type]
    assert [tokens.shape for tokens in seen.tokens] == [(2, 4, 48)] * 4
    plain = observe(nn.Flatten(), IMAGE)
    assert plain.tokens == [] and plain.logits.shape == (2, 3 * 32 * 32)


@pytest.mark.parametrize("kind", ["logits", "features", "csf", "patches"])
def test_each_term_teaches_the_student_and_leaves_the_teacher(kind: str) -> None:
    config = AdaptConfig(student=SEGMENT, kd=(kind,))
    guide, student = Guide(teacher("segment", 1), config), build_student(SEGMENT)
    guide.train()
    assert not guide.teacher.training, "its statistics are not this batch's"
    before = {name: value.clone() for name, value in guide.teacher.state_dict().items()}
    loss, terms = guide(observe(student, IMAGE), student, IMAGE)
    assert set(terms) == {f"kd_{kind}"} and float(loss.detach()) > 0
    loss.backward()
    assert student.backbone.patch_embed.proj.weight.grad is not None
    assert all(p.grad is None for p in guide.teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in guide.teacher.state_dict().items())
    unused = [name for name, p in guide.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused, "what is trained is used, or processes would wait for each other"


def test_weights_of_the_terms_act() -> None:
    student, net = build_student(SEGMENT).eval(), teacher("segment", 1)
    found = []
    for weight in (1.0, 3.0):
        config = AdaptConfig(student=SEGMENT, kd=("logits",), kd_logits=weight)
        found.append(float(Guide(net, config)(observe(student, IMAGE), student, IMAGE)[0].detach()))
    assert found[1] == pytest.approx(3 * found[0], rel=1e-5)


def test_exits_weigh_by_their_place_and_follow_the_last() -> None:
    torch.manual_seed(0)
    answers, target = [torch.randn(4, 3) for _ in range(3)], torch.tensor([0, 1, 2, 0])
    loss = nn.CrossEntropyLoss()
    each = [F.cross_entropy(answer, target) for answer in answers]
    weighted = (each[0] + 2 * each[1] + 3 * each[2]) / 6
    torch.testing.assert_close(exits_loss(answers[:2], answers[2], target, loss, 0.0), weighted)
    follow = [F.kl_div(a.log_softmax(1), answers[2].softmax(1), reduction="batchmean") for a in answers[:2]]
    torch.testing.assert_close(
        exits_loss(answers[:2], answers[2], target, loss, 0.5), weighted + 0.5 * (follow[0] + follow[1]) / 2
    )
