"""This project's side of the benchmarks: the public functions of braintumor.model, as the step `train` calls them."""

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import trial
from plain_keras import make_shallow
from trial import Result, Spec


def params_of(spec: Spec) -> Any:
    """The parameters' section `train`: the recipe of the specification, and its `changes`."""
    from braintumor.params import TrainParams, load_profile

    base = load_profile("sample").train.model_dump()
    own = {
        "seed": spec["seed"], "image_size_px": spec["size_px"], "batch_size": spec["batch_size"],
        "dropout": spec["dropout"], "weights": spec.get("weights") or "none", "head_epochs": spec.get("head_epochs", 0),
        "epochs": max(1, spec["epochs"]), "early_stopping_epochs": 0, "label_smoothing": 0.0,
        "class_weights": False, "augmentation": spec["augmentation"],
    }  # fmt: skip
    return TrainParams.model_validate(base | own | spec.get("changes", {}))


class Bench:
    """A classifier, its engine and its images, and when the work began."""

    def __init__(self, spec: Spec) -> None:
        from braintumor.model import training
        from braintumor.model.densenet import build_classifier

        self.spec, self.params = spec, params_of(spec)
        if spec.get("is_deterministic", True):
            training.make_reproducible(self.params.seed, xla=self.params.xla)
        started = time.monotonic()
        self.train, self.val = (load(spec, part) for part in ("train", "val"))
        self.decoding_s = time.monotonic() - started
        if spec.get("layers"):
            make_shallow(spec["layers"])
        self.classifier = build_classifier(self.params)
        self.history = training.History(on_epoch=lambda epoch: self.ends.append(time.monotonic()))
        self.ends: list[float] = []
        self.steps: list[float] = []
        self.engine = training.make_engine(self.classifier, self.params, len(self.train.labels))

    def fit_head(self) -> None:
        """The head phase."""
        from braintumor.model import training
        from braintumor.progress import silent

        training.fit_head(self.engine, self.classifier, self.train, self.val, self.params, self.history, silent)

    def fine_tune(self) -> None:
        """The fine-tuning."""
        from braintumor.model import training

        training.fine_tune(self.engine, self.train, self.val, self.params, self.history, self._on_step)

    def _on_step(self) -> None:
        # A step is only queued when it is told of: the first has to be waited for, or its time would be a later one's.
        if not self.steps:
            self.wait()
        self.steps.append(time.monotonic())

    def wait(self) -> None:
        """All that was queued is computed."""
        _ = self.engine.sums


def load(spec: Spec, part: str) -> Any:
    """The images of a part, decoded once."""
    from braintumor.model import training
    from braintumor.model.images import load_images

    paths, labels = trial.rows_of(spec, part)
    return training.LabelledImages(load_images(Path("/"), paths, spec["size_px"]), np.array(labels, np.int64))


def head(spec: Spec) -> Result:
    """The head phase: images decoded and features computed once (of each view), then epochs; with the compilation."""
    bench = Bench(spec)
    started = time.monotonic()
    bench.fit_head()
    return {"seconds": bench.decoding_s + time.monotonic() - started}


def fine_tune(spec: Spec) -> Result:
    """All kernels trained: from the start of the process, and of `fine_tune`, to the first step; the epochs.

    An epoch's time is without the validation, which `fit` of the plain recipe does not do here either.
    """
    bench = Bench(spec)
    started = time.monotonic()
    times: list[float] = []
    bench.history.on_epoch = lambda epoch: times.append(time.monotonic())
    timed_sums(bench)
    bench.fine_tune()
    begins = [started, *times]
    seconds = [end - begin for begin, end in zip(begins, bench.ends, strict=False)]
    return {
        "start_to_first_step": bench.steps[0] - spec["started"],
        "call_to_first_step": bench.steps[0] - started,
        "epochs": seconds,
        "images_an_epoch": len(bench.train.labels),
        "loss": bench.history.epochs[-1].train_loss,
    }


def timed_sums(bench: Bench) -> None:
    """`bench.ends` holds when the last step of each epoch was computed, before the validation."""
    from braintumor.model import training

    outputs_of = training.outputs_of

    def told(engine: Any, *given: Any, **named: Any) -> Any:
        bench.wait()
        bench.ends.append(time.monotonic())
        return outputs_of(engine, *given, **named)

    training.outputs_of = told


def race(spec: Spec) -> Result:
    """Head phase and fine-tuning, with validation each epoch, until `budget_s` are over: (seconds, accuracy)."""
    bench = Bench(spec)
    curve: list[tuple[float, float]] = []

    class Over(Exception):
        pass

    def on_epoch(epoch: Any) -> None:
        curve.append((trial.since_start(spec), epoch.val_accuracy))
        if trial.since_start(spec) > spec["budget_s"]:
            raise Over

    bench.history.on_epoch = on_epoch
    try:
        if bench.params.head_epochs:
            bench.fit_head()
        bench.fine_tune()
    except Over:
        pass
    return {"curve": curve}


def pipeline(spec: Spec) -> Result:
    """Images a second that the batches alone give, shuffled and drawn; augmentation is a part of the step."""
    from braintumor.model.batches import batches
    from braintumor.model.training import sample_weights

    params = params_of(spec)
    data = load(spec, "train")
    weights = sample_weights(data.labels, params)
    next(iter(batches(data.images, data.labels, weights, params, 1)))
    started, n = time.monotonic(), 0
    for epoch in range(1, spec["epochs"] + 1):
        for batch in batches(data.images, data.labels, weights, params, epoch):
            n += len(batch.weights)
    seconds = time.monotonic() - started
    return {"images_a_second": n / seconds, "augmented_images_a_second": _augmented(spec, data, params)}


def _augmented(spec: Spec, data: Any, params: Any) -> float:
    """Images a second of batches and augmentation, on the cores that the step else has."""
    import tensorflow as tf

    from braintumor.model.augmentation import augment
    from braintumor.model.batches import batches
    from braintumor.model.training import sample_weights

    @tf.function
    def vary(images: Any, draws: Any) -> Any:
        return augment(tf.cast(images, tf.float32), draws, params.augmentation)

    weights = sample_weights(data.labels, params)
    rates = []
    for epoch in range(1, spec["epochs"] + 2):
        started, n = time.monotonic(), 0
        for batch in batches(data.images, data.labels, weights, params, epoch):
            vary(batch.images, batch.draws).numpy()
            n += len(batch.weights)
        rates.append(n / (time.monotonic() - started))
    # The first epoch holds the compilation.
    return statistics.median(rates[1:])


if __name__ == "__main__":
    trial.main({"head": head, "fine_tune": fine_tune, "race": race, "pipeline": pipeline})
