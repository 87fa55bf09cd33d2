"""Which views an image gives, and where its windows lie."""

import random

from hdl.data.views import Sizes, View, random_window, views_of

DIGEST = "ab" * 32


def test_one_area_is_the_whole_image_without_a_name() -> None:
    assert views_of(96, 64, DIGEST, Sizes((96,))) == [View(None, (0, 0, 96, 64), 2, 3)]


def test_a_view_for_every_area_and_window() -> None:
    sizes = Sizes((64, 128), crops=2)
    views = views_of(400, 400, DIGEST, sizes)
    assert [view.name for view in views] == sizes.names() == ["64", "128", "crop1", "crop2"]
    assert [(view.rows, view.cols) for view in views[:2]] == [(2, 2), (4, 4)]
    assert all(10 <= view.rows * view.cols <= 16 for view in views[2:])
    assert views == views_of(400, 400, DIGEST, sizes) != views_of(400, 400, "cd" * 32, sizes)


def test_views_that_a_small_image_cannot_give_are_left_out() -> None:
    assert [view.name for view in views_of(70, 70, DIGEST, Sizes((64, 512, 1024)))] == ["64"]
    assert [view.name for view in views_of(32, 32, DIGEST, Sizes((1024,), crops=3))] == ["1024"]


def test_windows_lie_within_and_nearly_keep_the_shape() -> None:
    draw = random.Random(0)
    for i in range(500):
        width, height = draw.randint(64, 3000), draw.randint(64, 3000)
        left, top, right, bottom = random_window(width, height, str(i))
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        assert 0.5 * width - 1 <= right - left <= 0.9 * width + 1
        assert 0.5 * height - 1 <= bottom - top <= 0.9 * height + 1
        skewed = (right - left) / (bottom - top) * height / width
        assert 1 / 1.3 < skewed < 1.3
