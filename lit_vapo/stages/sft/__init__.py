"""Making a base policy."""
