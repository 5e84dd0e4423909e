"""The curriculum: when training moves on to longer runs, and which weights it keeps."""

from __future__ import annotations

import torch

from learned_opt.config import CurriculumConfig
from learned_opt.training.curriculum import Curriculum


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor([value])}


def test_a_stage_ends_when_validation_at_the_next_length_no_longer_improves() -> None:
    curriculum = Curriculum(CurriculumConfig((10, 20, 40), patience=2))
    assert (curriculum.length, curriculum.validation_length) == (10, 20)
    for score, value in ((0.5, 1.0), (0.3, 2.0), (0.4, 3.0)):
        assert curriculum.validated(score, weights(value)) is None
    assert curriculum.length == 10
    assert curriculum.validated(0.3, weights(4.0)) == weights(2.0)  # no better: from the best
    assert (curriculum.length, curriculum.validation_length) == (20, 40)
    for score in (0.9, 0.8, 0.9, 0.85):  # scores at other lengths do not compare
        found = curriculum.validated(score, weights(score))
    assert found == weights(0.8)
    assert (curriculum.length, curriculum.validation_length) == (40, 40)
    assert not any(curriculum.validated(1.0, weights(0.0)) for _ in range(5))  # to the end


def test_what_is_kept_are_the_weights_of_then() -> None:
    curriculum, w = Curriculum(CurriculumConfig((10, 20), patience=1)), weights(1.0)
    curriculum.validated(0.5, w)
    w["w"] += 1
    assert curriculum.validated(0.6, w) == weights(1.0)


def test_a_curriculum_goes_on_where_it_was() -> None:
    config = CurriculumConfig((10, 20, 40), patience=2)
    whole, first, resumed = (Curriculum(config) for _ in range(3))
    scores = [0.5, 0.3, 0.4, 0.4, 0.2, 0.3, 0.3, 0.1]
    found = [whole.validated(score, weights(score)) for score in scores]
    again = [first.validated(score, weights(score)) for score in scores[:3]]
    resumed.load_state_dict(first.state_dict())
    again += [resumed.validated(score, weights(score)) for score in scores[3:]]
    assert found == again and resumed.state_dict() == whole.state_dict()
