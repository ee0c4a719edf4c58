"""One model -> the part of each worker, computing the same thing."""
