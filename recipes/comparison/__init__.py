"""All methods on the same real tasks, with error bars."""
