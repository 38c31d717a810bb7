"""How often a test set has been used to decide: each decision on the same images makes the next figure less honest.

Dwork et al., Science 349 (2015), doi:10.1126/science.aaa9375, show how a test set that is used again and again stops
to be one. The count starts with the runs that this MLflow server knows.
"""

from braintumor.errors import UserError
from braintumor.progress import warn
from braintumor.registry.server import connected, holds_nothing_yet

TEST_MD5 = "test_md5"
VERDICT = "gate"
MODEL_DIGEST = "model_digest"
RUNS_PER_PAGE = 1000


def earlier_decisions(test_md5: str, model_digest: str) -> int:
    """The number of other models that the gate has judged on this test set, whether they passed or not.

    Raises RegistryUnreachable.
    """
    if holds_nothing_yet():
        return 0
    judged = set()
    with connected(is_patient=False) as client:
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        # An md5 holds no quotes: the filter can't be led astray.
        condition, page = f"tags.{TEST_MD5} = '{test_md5}'", None
        while page != "":
            runs = client.search_runs(experiments, condition, max_results=RUNS_PER_PAGE, page_token=page)
            judged |= {run.data.tags.get(MODEL_DIGEST) for run in runs if VERDICT in run.data.tags}
            page = runs.token or ""
    return len(judged - {model_digest, None})


def earlier_decisions_if_reachable(test_md5: str, model_digest: str) -> int | None:
    """As `earlier_decisions`; None, with a warning, where MLflow does not answer."""
    try:
        return earlier_decisions(test_md5, model_digest)
    except UserError as error:
        warn(f"{error}. How often this test set was used is not known")
        return None
