"""Robot manipulation as a benchmark: behaviour cloning on frozen features, success in simulation (docs/robot.md)."""
