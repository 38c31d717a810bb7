import numpy as np
import pytest

from braintumor.errors import UserError
from braintumor.evidence.neighbours import nearest_labels


def test_the_label_is_that_of_the_nearest_image() -> None:
    train = np.stack([np.full((4, 4, 1), level, np.uint8) for level in (0, 100, 255)])
    test = np.stack([np.full((4, 4, 1), level, np.uint8) for level in (10, 90, 240, 60)])
    labels = nearest_labels(train, ["glioma", "notumor", "pituitary"], test)
    assert labels.tolist() == ["glioma", "notumor", "pituitary", "notumor"]


def test_distances_do_not_wrap_around_as_bytes_would() -> None:
    train = np.array([[[[255]]], [[[100]]]], np.uint8)
    assert nearest_labels(train, ["glioma", "notumor"], np.array([[[[1]]]], np.uint8)).tolist() == ["notumor"]


def test_an_empty_side_is_refused() -> None:
    images = np.zeros((1, 4, 4, 1), np.uint8)
    with pytest.raises(UserError, match="empty"):
        nearest_labels(images, ["glioma"], images[:0])
