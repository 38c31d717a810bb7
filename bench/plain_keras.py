"""The recipe as one writes it by hand in Keras: a generator that decodes every image every epoch, `fit`, `fit` again.

DenseNet201 of keras.applications, in 32 bits, an ImageDataGenerator with the same augmentation, first with the backbone
frozen, then with all of it trained by Adam. `jit` is Keras' jit_compile; its "auto" is XLA where there is a GPU, and no
XLA on a CPU. `batch_norm` "train" is what comes of chaining layers: BatchNorm learns when the backbone is unfrozen.
"rest" is the advice of Keras' guide, the backbone called with training=False: the statistics rest, scale and shift
learn. With "frozen" these rest, too, as in this project. Nothing of this project is used.
"""

import functools
import time
from itertools import pairwise
from typing import Any

import trial
from trial import Result, Spec


class Clock:
    """When steps and epochs ended; made into a callback of Keras."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.epochs: list[float] = []
        self.rows: list[dict[str, float]] = []
        self.stops: Any = None

    def callback(self) -> Any:
        """A keras.callbacks.Callback that writes here."""
        import keras

        clock = self

        class Told(keras.callbacks.Callback):  # type: ignore[misc]
            def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
                clock.steps.append(time.monotonic())

            def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
                clock.epochs.append(time.monotonic())
                clock.rows.append({name: float(value) for name, value in (logs or {}).items()})
                if clock.stops is not None and clock.stops():
                    self.model.stop_training = True

        return Told()


def make_shallow(blocks: list[int]) -> None:
    """keras.applications.DenseNet201 has so few layers from here on: for a trial of the benchmark itself."""
    import keras
    from keras.src.applications.densenet import DenseNet

    keras.applications.DenseNet201 = functools.partial(DenseNet, blocks, name="densenet201")


def build(spec: Spec) -> tuple[Any, Any]:
    """(backbone, model) with a new head; the backbone has the sample's weights, where ImageNet's would be loaded."""
    import keras

    size = spec["size_px"]
    keras.utils.set_random_seed(spec["seed"])
    if spec.get("layers"):
        make_shallow(spec["layers"])
    backbone = keras.applications.DenseNet201(include_top=False, weights=None, input_shape=(size, size, 3))
    if spec.get("weights"):
        backbone.load_weights(spec["weights"])
    if spec.get("batch_norm", "rest") != "train":
        image = keras.Input((size, size, 3))
        features = backbone(image, training=False)
    else:
        image, features = backbone.input, backbone.output
    pooled = keras.layers.GlobalAveragePooling2D()(features)
    answers = keras.layers.Dense(4, activation="softmax")(keras.layers.Dropout(spec["dropout"])(pooled))
    return backbone, keras.Model(image, answers)


def freeze_batch_norm(backbone: Any) -> None:
    """No BatchNorm learns anything."""
    import keras

    for layer in backbone.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = False


def generators(spec: Spec) -> tuple[Any, Any]:
    """Keras' own generators of (images, one-hot labels): train, augmented, and val."""
    import pandas as pd
    import tensorflow as tf
    from keras.applications.densenet import preprocess_input

    how = spec["augmentation"]
    varied = tf.keras.preprocessing.image.ImageDataGenerator(
        rotation_range=how["rotation_degrees"],
        width_shift_range=how["shift_fraction"],
        height_shift_range=how["shift_fraction"],
        zoom_range=how["zoom_fraction"],
        brightness_range=(1 - how["contrast_fraction"], 1 + how["contrast_fraction"]),
        horizontal_flip=how["flip_horizontal"],
        fill_mode="constant",
        preprocessing_function=preprocess_input,
    )
    plain = tf.keras.preprocessing.image.ImageDataGenerator(preprocessing_function=preprocess_input)
    found = []
    for part, generator in (("train", varied), ("val", plain)):
        paths, labels = trial.rows_of(spec, part)
        frame = pd.DataFrame({"path": paths, "label": [trial.CLASSES[label] for label in labels]})
        found.append(
            generator.flow_from_dataframe(
                frame, x_col="path", y_col="label", classes=list(trial.CLASSES), class_mode="categorical",
                target_size=(spec["size_px"], spec["size_px"]), batch_size=spec["batch_size"],
                shuffle=part == "train", seed=spec["seed"], validate_filenames=False,
            )
        )  # fmt: skip
    return found[0], found[1]


def compile_model(model: Any, spec: Spec, rate: float) -> None:
    """As a person compiles it."""
    import keras

    kinds = {"adam": keras.optimizers.Adam, "sgd": keras.optimizers.SGD}
    model.compile(
        kinds[spec.get("optimizer", "adam")](rate),
        "categorical_crossentropy",
        metrics=["accuracy"],
        jit_compile=spec.get("jit", "auto"),
    )


def head(spec: Spec) -> Result:
    """Frozen epochs: the whole `fit`, with its compilation, and each epoch."""
    train, _ = generators(spec)
    backbone, model = build(spec)
    backbone.trainable = False
    compile_model(model, spec, 1e-3)
    clock, started = Clock(), time.monotonic()
    model.fit(train, epochs=spec["epochs"], verbose=0, callbacks=[clock.callback()])
    ends = [started, *clock.epochs]
    return {"seconds": ends[-1] - started, "epochs": [b - a for a, b in pairwise(ends)]}


def fine_tune(spec: Spec) -> Result:
    """All kernels trained: from the start of the process, and of `fit`, to the first step; the epochs."""
    train, _ = generators(spec)
    backbone, model = build(spec)
    if spec.get("batch_norm") == "frozen":
        freeze_batch_norm(backbone)
    compile_model(model, spec, spec.get("learning_rate", 1e-5))
    clock, started = Clock(), time.monotonic()
    model.fit(train, epochs=spec["epochs"], verbose=0, callbacks=[clock.callback()])
    ends = [started, *clock.epochs]
    return {
        "start_to_first_step": clock.steps[0] - spec["started"],
        "call_to_first_step": clock.steps[0] - started,
        "epochs": [b - a for a, b in pairwise(ends)],
        "images_an_epoch": len(trial.rows_of(spec, "train")[0]),
        "loss": clock.rows[-1]["loss"],
    }


def race(spec: Spec) -> Result:
    """Frozen `fit`, then `fit` of all, with validation each epoch, until `budget_s` are over; (seconds, accuracy)."""
    train, val = generators(spec)
    backbone, model = build(spec)
    clock = Clock()

    def is_over() -> bool:
        return trial.since_start(spec) > spec["budget_s"]

    clock.stops = is_over
    begun = []
    for is_frozen, epochs, rate in (
        (True, spec["head_epochs"], 1e-3),
        (False, spec["epochs"], spec.get("learning_rate", 1e-5)),
    ):
        if is_over():
            break
        backbone.trainable = not is_frozen
        compile_model(model, spec, rate)
        begun.append(time.monotonic() - spec["started"])
        model.fit(train, validation_data=val, epochs=epochs, verbose=0, callbacks=[clock.callback()])
    curve = [(end - spec["started"], row["val_accuracy"]) for end, row in zip(clock.epochs, clock.rows, strict=True)]
    return {"curve": curve, "phases_began_s": begun}


def pipeline(spec: Spec) -> Result:
    """Images a second that the generator alone gives."""
    train, _ = generators(spec)
    len(train[0][1])
    started, n = time.monotonic(), 0
    for _ in range(spec["epochs"]):
        for index in range(len(train)):
            n += len(train[index][1])
        train.on_epoch_end()
    return {"images_a_second": n / (time.monotonic() - started)}


if __name__ == "__main__":
    trial.main({"head": head, "fine_tune": fine_tune, "race": race, "pipeline": pipeline})
