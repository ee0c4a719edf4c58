"""Starting workers, and hearing from them: this host, or torchrun."""
