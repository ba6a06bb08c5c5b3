"""What stands in for a model hub: models and data inside packages."""
