"""The dual encoder: vision tower, text tower, geometries, weights."""
