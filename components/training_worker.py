"""What a node of a TrainJob runs: `python3 -m components.training_worker FOLDER`, with the folder that its task filled.

The first worker leaves the model in the folder, and whoever fails there leaves the reason.
"""

import socket
import sys
from pathlib import Path

from braintumor import artifacts
from braintumor.errors import UserError
from braintumor.params import parse_params
from braintumor.progress import shown
from braintumor.registry.attempts import without_traceback
from components.training_job import FAILURES, MODEL, REQUEST, SPLIT


def work(folder: Path) -> None:
    """This worker has done its share of the training, and the first one has written the model."""
    from braintumor.model.distribution import WorkerLost
    from braintumor.steps.train import train

    worker = socket.gethostname()
    told = folder / FAILURES / f"{worker}.json"
    # Of the start before this one.
    told.unlink(missing_ok=True)
    try:
        request = artifacts.read_json(folder / REQUEST, "the task train")
        params = parse_params(request["params"])
        with shown() as progress:
            dataset = Path(request["dataset"])
            train(dataset, folder / SPLIT, folder / MODEL, params, progress, image=request["image"])
    except Exception as error:
        message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        is_loss = isinstance(error, WorkerLost)
        artifacts.write_json(told, {"worker": worker, "message": message[:4000], "is_loss": is_loss})
        raise


if __name__ == "__main__":
    with without_traceback():
        if len(sys.argv) != 2 or not Path(sys.argv[1]).is_absolute():
            raise UserError(f"usage: python3 -m components.training_worker FOLDER, not {sys.argv[1:]}")
        work(Path(sys.argv[1]))
