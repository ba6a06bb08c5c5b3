"""Small models, trained here for the recipes without a packaged one."""
