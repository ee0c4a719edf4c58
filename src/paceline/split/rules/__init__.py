"""Which calls to torch can be made on pieces of a tensor. Importing it fills the tables of `tensor_mode`."""

from paceline.split.rules import elementwise, layers, losses, products, reductions, shapes

__all__ = ["elementwise", "layers", "losses", "products", "reductions", "shapes"]
