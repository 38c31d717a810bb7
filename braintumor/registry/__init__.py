"""The gate's rules, and the only door to MLflow."""
