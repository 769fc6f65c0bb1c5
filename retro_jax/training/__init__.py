"""Training: mesh and sharding, optimizer, the jitted step, checkpoints, the loop."""
