import pandas as pd

from braintumor.data.split_check import check_split

SOUND = pd.DataFrame(
    {"path": list("abcd"), "group": ["g1", "g1", "g2", "g3"], "split": ["train", "train", "val", "test"]}
)


def test_a_sound_split_has_no_problem() -> None:
    assert check_split(SOUND) == []


def test_a_group_on_two_sides_is_named_by_all_its_images() -> None:
    divided = SOUND.assign(split=["train", "val", "val", "test"])
    assert check_split(divided) == ["2 images share a group with images on another side: a, b"]


def test_an_image_that_stands_twice_is_named() -> None:
    assert check_split(SOUND.assign(path=["a", "a", "c", "d"])) == ["2 rows repeat an image: a"]
