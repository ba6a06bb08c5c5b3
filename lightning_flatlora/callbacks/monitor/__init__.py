"""FlatnessMonitor, which measures flatness while a model trains and leaves the training undisturbed."""
