"""A policy as on a robot: a control loop with deadlines, inference beside it."""
