"""Random small changes of training images, as one affine resampling a batch."""

from typing import Any

from braintumor.params import Augmentation

N_DRAWS = 6


def augment(images: Any, draws: Any, params: Augmentation) -> Any:
    """Images (n, size, size, 1) float32 in 0..255, each rotated, shifted, zoomed, mirrored and re-contrasted.

    `draws`, (n, 6) float32 in [0, 1), decide all of it: angle, zoom, shift to the left, shift upwards, mirroring and
    contrast of each image, whatever stands beside it. What leaves the frame is lost, what enters it is black. Runs
    eagerly and in a graph of TensorFlow, whichever backend Keras has.
    """
    import numpy as np
    import tensorflow as tf

    size = tf.cast(tf.shape(images)[1], tf.float32)
    # Each uniform in -1..1.
    angle, zoom, shift_x, shift_y, _, contrast = tf.unstack(2 * draws - 1, N_DRAWS, axis=1)
    angle = angle * (params.rotation_degrees * np.pi / 180)
    zoom = 1 + zoom * params.zoom_fraction
    shift_x = shift_x * params.shift_fraction * size
    shift_y = shift_y * params.shift_fraction * size
    mirror = tf.where(draws[:, 4] < (0.5 if params.flip_horizontal else 0.0), -1.0, 1.0)

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
    contrast = 1 + contrast[:, None, None, None] * params.contrast_fraction
    mean = tf.reduce_mean(moved, axis=(1, 2, 3), keepdims=True)
    return tf.clip_by_value((moved - mean) * contrast + mean, 0.0, 255.0)
