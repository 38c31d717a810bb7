"""The graph of the steps on Kubeflow Pipelines: compiled, run locally, submitted, scheduled."""
