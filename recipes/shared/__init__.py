"""What recipes and programmes of every kind share: the command line, data, training, ledgers and progress."""
