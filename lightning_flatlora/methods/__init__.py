"""The steps of the methods, independent of any Trainer or training loop."""
