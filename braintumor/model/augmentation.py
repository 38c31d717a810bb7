"""Random small changes of training images, as one affine resampling a batch."""

from typing import Any

from braintumor.params import Augmentation


def augment(images: Any, seed: Any, params: Augmentation) -> Any:
    """Images (n, size, size, 1) float32 in 0..255, each rotated, shifted, zoomed, mirrored and re-contrasted.

    `seed`, an int32 pair, decides all of it: the same seed gives the same images. What leaves the frame is lost,
    what enters it is black. Runs in TensorFlow's input pipeline, whichever backend Keras has.
    """
    import numpy as np
    import tensorflow as tf

    n = tf.shape(images)[0]
    size = tf.cast(tf.shape(images)[1], tf.float32)

    def draw(number: int, low: float, high: float) -> Any:
        return tf.random.stateless_uniform((n,), tf.stack([seed[0], seed[1] * 8 + number]), low, high)

    angle = draw(0, -1, 1) * (params.rotation_degrees * np.pi / 180)
    zoom = 1 + draw(1, -1, 1) * params.zoom_fraction
    shift_x = draw(2, -1, 1) * params.shift_fraction * size
    shift_y = draw(3, -1, 1) * params.shift_fraction * size
    mirror = tf.where(draw(4, 0, 1) < (0.5 if params.flip_horizontal else 0.0), -1.0, 1.0)

    # The matrix takes an output pixel to the input pixel that it shows, both measured from the centre.
    centre = (size - 1) / 2
    a, b = mirror * tf.cos(angle) / zoom, -mirror * tf.sin(angle) / zoom
    c, d = tf.sin(angle) / zoom, tf.cos(angle) / zoom
    offset_x = centre - (a + b) * centre + shift_x
    offset_y = centre - (c + d) * centre + shift_y
    zeros = tf.zeros_like(a)
    moved = tf.raw_ops.ImageProjectiveTransformV3(
        images=images,
        transforms=tf.stack([a, b, offset_x, c, d, offset_y, zeros, zeros], axis=1),
        output_shape=tf.shape(images)[1:3],
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode="CONSTANT",
    )
    contrast = 1 + draw(5, -1, 1)[:, None, None, None] * params.contrast_fraction
    mean = tf.reduce_mean(moved, axis=(1, 2, 3), keepdims=True)
    return tf.clip_by_value((moved - mean) * contrast + mean, 0.0, 255.0)
