"""What is measured of a model: metrics, intervals and plots."""
