"""How far results can be trusted: gradients, fidelity, retraining, planted answers and files."""
