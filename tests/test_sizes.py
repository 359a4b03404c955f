"""What follows from images and objects for segmentation and detection, and when a training was too short."""

import numpy as np
import pytest

from underpaint.evaluation.detect import finest
from underpaint.evaluation.sizes import fitting_batch, fitting_size, small_side
from underpaint.evaluation.trained import Learned, last_fall, too_short

pytestmark = pytest.mark.quick


def test_large_objects_need_no_large_images() -> None:
    # blood cells: images of 480x640 with many large objects and a few small ones, of which 16 px will do
    sides = np.concatenate([np.linspace(80, 120, 500), np.linspace(34, 54, 21)])
    small = small_side(sides, np.repeat([1, 2], [500, 21]))
    assert small == pytest.approx(36)
    size, why = fitting_size([(480, 640)] * 9, small, (16, 16))
    assert size == (224, 288)
    assert "nine of ten objects of every class have a side of" in why
    # small objects keep the image as it is, and it is never enlarged
    assert fitting_size([(200, 256)] * 3, 6.0, (16, 16))[0] == (208, 256)
    assert fitting_size([(32, 40)], 30.0, (8, 8))[0] == (24, 24)
    # a class with hardly an object tells nothing alone
    assert small_side(np.array([5.0, *[50.0] * 20]), np.array([1] + [2] * 20)) == 5
    assert small_side(np.array([5.0, *[50.0] * 9]), np.array([1] + [2] * 9)) == pytest.approx(45.5)
    assert small_side(np.zeros(0), np.zeros(0, int)) is None
    # at least two patches a side, and no more patches than can be afforded
    assert fitting_size([(32, 40)], 30.0, (16, 16))[0] == (32, 32)
    size, why = fitting_size([(1000, 2000)], None, (16, 16))
    assert size[0] * size[1] / 256 <= 1.1 * 1024
    assert size[1] == pytest.approx(2 * size[0], rel=0.05)
    assert "would cost too much" in why
    assert all(side % 32 == 0 for side in fitting_size([(100, 300)], None, None)[0])


def test_a_step_has_about_as_many_pixels_whatever_the_size() -> None:
    assert [fitting_batch((side, side), 16 * 224**2, 16) for side in (32, 224, 320, 448, 2000)] == [16, 16, 4, 4, 2]
    assert [fitting_batch((side, side), 4 * 448**2, 8) for side in (64, 256, 448, 640)] == [8, 8, 4, 2]


def test_small_objects_have_finer_maps() -> None:
    assert (finest((64, 64)), finest((96, 96)), finest((96, 96), 6.0), finest((512, 512), 6.0)) == (2, 4, 2, 4)


def learned(fall: float | None, steps: int = 500) -> Learned:
    return Learned(steps=steps, minutes=1.0, loss=0.5, passes=3.0, fall=fall)


def test_a_loss_that_levels_off_is_not_falling_steeply() -> None:
    steps = np.arange(400)
    settled, going = np.exp(-steps / 60) + 0.3, 1 - steps / 500
    found = [last_fall(losses.tolist()) for losses in (settled, going)]
    assert found[0] == pytest.approx(0.02, abs=0.02)
    assert found[1] == pytest.approx(1 / 3, abs=0.02)
    assert last_fall([1.0, 1.0, 2.0, 2.0]) is None
    assert too_short({"encoder": learned(found[0]), "untrained": learned(0.1)}, 0.3) == ""
    said = too_short({"encoder": learned(found[0]), "untrained": learned(found[1])}, 0.3)
    assert "still falling steeply" in said
    assert "untrained (33 %)" in said
    assert "encoder (" not in said


def test_networks_on_the_floor_and_a_few_steps_say_nothing() -> None:
    assert "no network is off the floor" in too_short({"encoder": learned(0.1)}, 0.01)
    assert "had fewer than 20 steps" in too_short({"encoder": learned(0.1, steps=19)}, 0.3)
    assert too_short({"encoder": learned(None)}, 0.3) == ""
