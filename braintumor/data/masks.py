"""Outlines of lesions that a data set may carry: masks/<declared split>/<class>/<image's name without suffix>.png.

White is within the lesion. An image without a mask is one whose lesion nobody outlined.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from braintumor.data.contents import mask_path
from braintumor.model.images import decode_grey, resize_square


def load_masks(dataset: Path, paths: Sequence[str], size_px: int) -> dict[int, NDArray[np.bool_]]:
    """The lesion (size_px, size_px) of each image that has a mask with one, by its index in `paths`."""
    masks = {}
    for index, path in enumerate(paths):
        file = dataset / mask_path(path)
        if file.is_file():
            lesion = resize_square(decode_grey(file), size_px) >= 128
            if lesion.any():
                masks[index] = lesion
    return masks
