"""Text classification: any pretrained model with a head for the classes."""
