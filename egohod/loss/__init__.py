"""Objectives over features; no model and no data in here."""
