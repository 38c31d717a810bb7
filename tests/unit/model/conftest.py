from pathlib import Path

import pytest

from braintumor.params import Params, load_params

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def recipe() -> Params:
    """The smallest recipe: 32 px, a model of random weights."""
    params = load_params(ROOT / "params.yaml")
    train = params.train.model_copy(update={"image_size_px": 32, "weights": "none", "epochs": 1, "batch_size": 4})
    return params.model_copy(update={"train": train})
