"""The HOD pipeline: hand-object detections become tracks, tracks become facts, facts become checked narrations."""
