"""DenseNet201: image decoding, building, training and inference."""
