"""Patient images are guests: what of them may leave the data set, and under which name.

Data Docs, MLflow and galleries are copies that outlive a data version and are read by more people than the images are.
"""

from pathlib import PurePosixPath

import pandas as pd

from braintumor.params import PrivacyParams

NAME_DIGITS = 12


def shown_name(path: str, sha256: str, privacy: PrivacyParams) -> str:
    """The path under which an image of the manifest may be named outside it.

    With `hash_names` folders and suffix stay, and the name becomes the first 12 digits of the content's SHA-256: who
    has the image finds it again (the manifest holds both), who has not learns nothing of a patient from the name.
    """
    if not privacy.hash_names:
        return path
    place = PurePosixPath(path)
    return str(place.with_name(f"{sha256[:NAME_DIGITS]}{place.suffix}"))


def shown_names(images: pd.DataFrame, privacy: PrivacyParams) -> "pd.Series[str]":
    """`shown_name` for each row of a manifest; takes path and sha256."""
    names = [shown_name(path, sha256, privacy) for path, sha256 in zip(images["path"], images["sha256"], strict=True)]
    return pd.Series(names, index=images.index, dtype=object)


def may_be_shown(images: pd.DataFrame, privacy: PrivacyParams) -> "pd.Series[bool]":
    """Which rows of a manifest may appear as pictures; takes is_phantom."""
    match privacy.copy_images:
        case "all":
            return pd.Series(True, index=images.index)
        case "phantoms":
            return images["is_phantom"].astype(bool)
        case "none":
            return pd.Series(False, index=images.index)
