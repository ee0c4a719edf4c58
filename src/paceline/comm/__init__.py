"""The process groups of a run, and the operations on them. Every wait has a time-out."""
