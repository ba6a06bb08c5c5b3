"""The methods, step by step, for whoever runs the training loop: no Trainer is known here."""
