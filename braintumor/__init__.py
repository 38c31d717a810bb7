"""Retraining pipeline for a brain-tumour MRI classifier; a research tool, not a diagnostic device."""
