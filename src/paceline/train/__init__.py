"""The step, the loop, the data order, evaluation."""
