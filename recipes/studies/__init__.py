"""Studies: runs of several methods, settings and seeds; validation data choose the settings."""
