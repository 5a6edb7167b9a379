"""How far results can be trusted: the engine's gradients against autograd, what is on disk."""
