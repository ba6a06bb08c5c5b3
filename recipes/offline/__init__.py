"""Models and data inside packages, in place of a model hub."""
