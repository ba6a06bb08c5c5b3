"""What the flatness methods are made of, without a Trainer."""
