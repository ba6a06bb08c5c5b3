"""Studies: runs of several methods, settings and seeds, of which validation data choose the settings."""
