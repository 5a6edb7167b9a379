"""Per-example gradients: captured activations, the lean pass and preconditioners."""
