"""Images unlike the training's, against which the out-of-distribution score is measured.

Photographs and pictures of other organs are real ones, which scikit-learn and pydicom ship; nothing is fetched.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from braintumor.data.dicom import read_shipped
from braintumor.model.images import Grey, resize_square
from braintumor.model.perturbations import content_seed

# What the images of each kind are.
PROBE_KINDS = {
    "photographs": "squares cut out of two photographs, a temple and a flower",
    "noise": "grey levels by chance, each pixel for itself",
    "texture": "test slices whose phases are left to chance: their spectrum, without a head",
    "other organs": "abdomen (MR), thorax (CT), skeleton (scintigraphy), heart and lymph node (ultrasound)",
    "turned by 90°": "test slices lying on a side; the score learned from training images so turned",
    "turned by 180°": "test slices upside down; the score learned from training images so turned",
    "inverted": "test slices, black for white",
    "cropped": "a corner of a test slice, enlarged to the whole image",
    "blank": "one grey level each, from black to white",
    "web page": "a test slice as a small picture on a page of text",
}
WHITE = 255
PHOTOGRAPHS = ("china.jpg", "flower.jpg")
# Abdomen (MR), thorax (CT), whole body (scintigraphy), heart and lymph node (ultrasound).
ORGANS = ("examples_overlay.dcm", "CT_small.dcm", "JPEG2000.dcm", "examples_ybr_color.dcm", "examples_jpeg2k.dcm")
# Of the grey levels of a file: what lies beyond is white or black, as in a viewer.
WINDOW_PERCENTILES = (1, 99.5)
PAGE_PX = 256


def draw_probes(test_images: NDArray[np.uint8], n_each: int, seed: int) -> dict[str, NDArray[np.uint8]]:
    """`n_each` images of each of PROBE_KINDS, as large as the test images (n, size, size, 1).

    Kinds made of slices take test images, chosen by their content, as many as there are. The same test images in any
    order, with the same seed, give the same probes.
    """
    size_px = test_images.shape[1]
    slices = _choose(test_images, n_each, seed)
    photographs, organs = [_photograph(name) for name in PHOTOGRAPHS], [_organ(name) for name in ORGANS]

    def drawn(kind: int, draw: Callable[[int, np.random.Generator], Grey]) -> NDArray[np.uint8]:
        # A generator for each image: as many others as there are change nothing.
        images = [draw(index, np.random.default_rng((seed, kind, index))) for index in range(n_each)]
        return np.stack(images)[..., None]

    def changed(kind: int, change: Callable[[Grey, np.random.Generator], Grey]) -> NDArray[np.uint8]:
        images = [change(image, np.random.default_rng((seed, kind, content_seed(image)))) for image in slices]
        return np.stack(images)[..., None]

    images = {
        "photographs": drawn(
            0, lambda index, random: _cut_square(photographs[index % len(photographs)], size_px, random)
        ),
        "noise": drawn(1, lambda index, random: random.integers(0, WHITE + 1, (size_px, size_px)).astype(np.uint8)),
        "texture": changed(2, _scramble),
        "other organs": drawn(3, lambda index, random: _cut(organs[index % len(organs)], 0.75, size_px, random)),
        "turned by 90°": changed(4, lambda image, random: np.rot90(image, random.choice([1, 3]))),
        "turned by 180°": changed(5, lambda image, random: np.rot90(image, 2)),
        "inverted": changed(6, lambda image, random: WHITE - image),
        "cropped": changed(7, _crop),
        "blank": drawn(
            8, lambda index, random: np.full((size_px, size_px), WHITE * index // max(1, n_each - 1), np.uint8)
        ),
        "web page": changed(9, _put_on_page),
    }
    assert images.keys() == PROBE_KINDS.keys()
    return images


def _choose(images: NDArray[np.uint8], count: int, seed: int) -> list[Grey]:
    """As many different images as asked for, or as there are: those whose content comes first, by the seed."""
    by_content = {content_seed(image): image[..., 0] for image in images}
    numbers = np.random.default_rng(seed).permutation(len(by_content))[:count]
    contents = sorted(by_content)
    return [by_content[contents[number]] for number in numbers]


def _photograph(name: str) -> Grey:
    from sklearn.datasets import load_sample_image

    return np.asarray(Image.fromarray(load_sample_image(name)).convert("L"))


def _organ(name: str) -> Grey:
    picture = read_shipped(name)
    low, high = np.percentile(picture, WINDOW_PERCENTILES)
    return np.asarray(np.rint(((picture - low) / (high - low)).clip(0, 1) * WHITE), np.uint8)


def _cut_square(picture: Grey, size_px: int, random: np.random.Generator) -> Grey:
    side = min(picture.shape)
    start = random.integers(max(picture.shape) - side + 1)
    square = picture[:, start : start + side] if picture.shape[1] > side else picture[start : start + side]
    return _cut(square, 0.4, size_px, random)


def _cut(picture: Grey, smallest: float, size_px: int, random: np.random.Generator) -> Grey:
    """A part of the picture, at least `smallest` of its sides long, mirrored or not."""
    picture = picture[:, ::-1] if random.integers(2) else picture
    share = random.uniform(smallest, 1)
    height, width = (max(1, round(side * share)) for side in picture.shape)
    top, left = random.integers(picture.shape[0] - height + 1), random.integers(picture.shape[1] - width + 1)
    return resize_square(np.ascontiguousarray(picture[top : top + height, left : left + width]), size_px)


def _scramble(image: Grey, random: np.random.Generator) -> Grey:
    # The phases of noise are those of a real image.
    noise = np.fft.rfft2(random.normal(size=image.shape))
    noise[0, 0] = 1
    scrambled = np.fft.irfft2(np.abs(np.fft.rfft2(image)) * noise / np.abs(noise), image.shape)
    return np.rint(scrambled.clip(0, WHITE)).astype(np.uint8)


def _crop(image: Grey, random: np.random.Generator) -> Grey:
    side = round(len(image) * random.uniform(0.4, 0.5))
    top, left = random.choice([0, len(image) - side], 2)
    return resize_square(np.ascontiguousarray(image[top : top + side, left : left + side]), len(image))


def _put_on_page(image: Grey, random: np.random.Generator) -> Grey:
    page = Image.new("L", (PAGE_PX, PAGE_PX), WHITE)
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    pen.rectangle((0, 0, PAGE_PX, 28), int(random.integers(40, 120)))
    pen.text((8, 7), "Radiology of the week     Home   Cases", WHITE, font)
    side = int(random.integers(90, 130))
    left, top = int(random.integers(8, PAGE_PX - side - 8)), int(random.integers(60, PAGE_PX - side - 30))
    for row in range(36, PAGE_PX, 14):
        pen.text((8, row), "The patient was seen with a headache of three weeks.", 70, font)
    pen.rectangle((left - 6, top - 6, left + side + 6, top + side + 20), WHITE)
    page.paste(Image.fromarray(np.ascontiguousarray(image)).resize((side, side), Image.Resampling.BICUBIC), (left, top))
    pen.text((left, top + side + 4), "Figure 1", 70, font)
    return resize_square(np.asarray(page), len(image))
