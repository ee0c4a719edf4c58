"""What things cost: the machine, its devices, its arithmetic."""
