"""The paper's tables, one command each."""
