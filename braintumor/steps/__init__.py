"""The steps of the pipeline: one file a step, its function repeats the file's name."""
