"""Which layouts to consider and which to take, and why. Pure arithmetic on records: no torch."""
