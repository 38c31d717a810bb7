"""Whether a split keeps its promise, asked of the finished rows and not of the code that made them.

Plain pandas: Great Expectations takes seconds to load, for two questions.
"""

import pandas as pd

from braintumor.errors import name_some


def check_split(rows: pd.DataFrame) -> list[str]:
    """What is wrong with rows (path, group, split) that should hold no group on two sides and no image twice.

    Not for a protocol that keeps leaks on purpose.
    """
    sides = rows.groupby("group")["split"].nunique()
    divided = rows.loc[rows["group"].isin(sides.index[sides > 1]), "path"]
    repeated = rows.loc[rows["path"].duplicated(keep=False), "path"]
    found = {"images share a group with images on another side": divided, "rows repeat an image": repeated}
    return [
        f"{len(paths)} {problem}: {name_some(sorted(set(paths)))}" for problem, paths in found.items() if len(paths)
    ]
