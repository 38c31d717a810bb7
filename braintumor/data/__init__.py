"""Images before any model: the sample, intake, manifest, copies, checks and splits."""
