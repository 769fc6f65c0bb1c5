"""What a training step would cost on a TPU slice, read from the program its compiler writes."""
