"""The floor that any model has to beat: the label of the most similar training image, pixel by pixel."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from braintumor.errors import UserError

NEIGHBOUR_SIZE_PX = 32


def nearest_labels(
    train_images: NDArray[np.uint8], train_labels: Sequence[str], test_images: NDArray[np.uint8]
) -> NDArray[np.str_]:
    """The label of the nearest training image (Euclidean, grey pixels) of each test image, (n_test,).

    Images are uint8 of equal shape after the first axis, best (n, 32, 32, 1). Where these labels are mostly right, the
    split can be solved by looking images up: copies or neighbouring slices of one patient stand on both sides.
    """
    from sklearn.neighbors import KNeighborsClassifier

    if not len(train_images) or not len(test_images):
        raise UserError("the nearest-neighbour floor needs training and test images; one side of the split is empty")
    classifier = KNeighborsClassifier(n_neighbors=1, algorithm="brute")
    classifier.fit(_vectors(train_images), np.asarray(train_labels, dtype=str))
    return np.asarray(classifier.predict(_vectors(test_images)), dtype=str)


def _vectors(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    return images.reshape(len(images), -1).astype(np.float32)
