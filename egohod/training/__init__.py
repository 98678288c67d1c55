"""The optimisation loop and what it needs: step, schedule, checkpoints, preemption, telemetry."""
