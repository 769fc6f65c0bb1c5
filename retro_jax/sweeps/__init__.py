"""Many training runs from one file: expansion, running, and what came out of them."""
