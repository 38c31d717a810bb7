"""The four classes and the sides of a split, under the names that files, folders and models use."""

# The order of a model's outputs.
CLASS_NAMES = ("glioma", "meningioma", "notumor", "pituitary")
NO_TUMOUR = "notumor"
DECLARED_SPLITS = ("train", "test")
SPLIT_NAMES = ("train", "val", "calibration", "test")
# The origin, in groups.csv, of an image that shows nobody.
PHANTOM = "phantom"
