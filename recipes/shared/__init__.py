"""What recipes and programs of every kind share: the command line, data, training, ledgers and progress."""
