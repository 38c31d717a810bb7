"""The four classes and the sides of a split, under the names that files, folders and models use."""

import re

# The order of a model's outputs.
CLASS_NAMES = ("glioma", "meningioma", "notumor", "pituitary")
NO_TUMOUR = "notumor"
DECLARED_SPLITS = ("train", "test")
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff"})
SPLIT_NAMES = ("train", "val", "calibration", "test")
# The origin, in groups.csv, of an image that shows nobody.
PHANTOM = "phantom"
# The column of groups.csv that names an image's plane, where that is known.
PLANE = "plane"
PLANES = ("sagittal", "coronal", "axial")  # perpendicular to x, y, z
# Stands for the patient of slices that belong together, of one volume, while nobody knows whose they are.
UNKNOWN_PATIENT_PREFIX = "volume-"
# A patient named by a digest of a number and a site's key: the same wherever the same person comes from.
HASHED_PATIENT = re.compile(r"patient-(?P<key>[0-9a-f]{6})-[0-9a-f]{16}")
# What the folders of other people's data sets are called, in lower case, and what they are here.
SPLIT_FOLDERS = {"training": "train", "train": "train", "testing": "test", "test": "test"}
CLASS_FOLDERS = {
    "glioma": "glioma",
    "glioma_tumor": "glioma",
    "meningioma": "meningioma",
    "meningioma_tumor": "meningioma",
    "no_tumor": "notumor",
    "notumor": "notumor",
    "no": "notumor",
    "pituitary": "pituitary",
    "pituitary_tumor": "pituitary",
}
