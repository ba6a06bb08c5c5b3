"""The command line of recipes and programs."""
