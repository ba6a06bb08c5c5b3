"""The methods as callbacks: when the weights are perturbed, and from which gradient."""
