"""Small models, trained here for the recipes that have no packaged one."""
