"""Narrators: facts of a clip in, a sentence out."""
