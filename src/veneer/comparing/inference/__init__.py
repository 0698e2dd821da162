"""Inference: from scores to what may be said, and the proof that it may."""
