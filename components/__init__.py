"""Kubeflow components: artifact types and one call of the step of the same name."""
